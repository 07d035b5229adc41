"""Complement data for PAS (arXiv 2407.06027; 2410.14940): prompts without near-copies, drafts, checks, the critic loop.

    pool(prompts)                        one prompt of each cluster
    write_pairs(asks, writer, critic)    draft -> fault? -> critic? -> keep, at most `rounds` times, then drop

A writer drafts a complement for every ask; a critic says of every draft whether it is right. Both may be a model
(`draft_with`, `check_with`), and a critic may be a reward instead (see `prompt_complement`).

Departures from the published scripts. They take the category from a column of another name than the one selected and
stop with KeyError; here every prompt has a category and every category a template. Their critic is told to write "Final
APE" and read for "FinalAPE", so corrections are lost, and a reply that does not parse keeps the unverified complement;
here there is one name, and what no critic verified is never kept. Their fifth criterion of a wrong complement describes
a right one. About 30 words are asked for and never enforced; here the length is counted (`complement_checks`). The paper
asks again until a draft is accepted, the scripts take the critic's correction unseen: `correct=False` and
`correct=True`, both bounded, and a correction has to pass the checks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.files import dump_json, write_atomic
from trimtab.policy import Cost, Policy, Prompt
from trimtab.prompt.complement_checks import MAX_WORDS, demands_format, fault
from trimtab.prompt.complement_place import has_room
from trimtab.prompt.complement_templates import (
    CATEGORIES,
    category_of,
    check_request,
    draft_request,
    sort_request,
    sorted_into,
)
from trimtab.prompt.guideline_prompt import model_of
from trimtab.prompt.rewriter import charge
from trimtab.sampling import Sampling, derive_seed


@dataclass(frozen=True)
class Ask:
    """A prompt to be complemented. words: the user's own words in it. gold: what a complement must not give away."""

    prompt: Prompt
    words: str
    category: str
    gold: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """What a complement model is trained on: the user's words and the complement."""

    prompt: str
    complement: str
    category: str = "other"


@dataclass(frozen=True)
class Verdict:
    """What a critic says of a draft; `final` is the draft, corrected where it was wrong and the critic could."""

    is_correct: bool
    final: str = ""
    reason: str = ""


@dataclass
class Written:
    """The pairs kept, how many drafts were seen, and how many asks were dropped for which last reason."""

    pairs: list[Pair] = field(default_factory=list)
    drafts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


Writer = Callable[[Sequence[Ask], int], Sequence[str]]  # (asks, round) -> a draft each
Verdicts = Sequence[Verdict | None]  # None: no verdict
Critic = Callable[[Sequence[Ask], Sequence[str], int], Verdicts]  # (asks, drafts, round)
Embed = Callable[[Sequence[str]], npt.ArrayLike]  # texts [N] -> vectors [N, D]
Quality = Callable[[Sequence[str]], Sequence[float | None]]


# prompts


def pool(
    words: Sequence[str],
    distance: float = 0.1,
    embed: Embed | None = None,
    quality: Quality | None = None,
    threshold: float = 0.0,
) -> list[int]:
    """Numbers of the prompts to use: the first of every cluster, and of those `quality` puts at `threshold` or above.

    Prompts nearer than `distance` (cosine) are in one cluster, and so are those that others between them connect; 0 only
    drops equal ones. embed: default TF-IDF over runs of 2 to 4 characters. A prompt without a quality is not used.
    """
    if not 0 <= distance < 2:
        raise UsageError(f"a cosine distance lies in [0, 2), not {distance}")
    kept = sorted({text: number for number, text in reversed(list(enumerate(words)))}.values())
    if distance and len(kept) > 1:
        from sklearn.cluster import DBSCAN

        vectors: Any = (embed or _tfidf)([words[i] for i in kept])  # [N, D], sparse from TF-IDF
        labels = DBSCAN(eps=distance, min_samples=1, metric="cosine").fit_predict(vectors)
        first = np.unique(labels, return_index=True)[1]
        kept = [kept[i] for i in sorted(first.tolist())]
    if quality is None:
        return kept
    scores = quality([words[i] for i in kept])
    return [i for i, score in zip(kept, scores, strict=True) if score is not None and score >= threshold]


def _tfidf(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform([text or " " for text in texts])


# the loop


def write_pairs(
    asks: Sequence[Ask],
    writer: Writer,
    critic: Critic,
    rounds: int = 3,
    max_words: int = MAX_WORDS,
    correct: bool = False,
) -> Written:
    """Drafts for every ask until the checks and the critic accept one, at most `rounds` times; then the ask is dropped.

    correct: take the critic's correction of a wrong draft where it passes the checks, instead of drafting again.
    Asks whose format is settled are dropped at once. Replies of the wrong number raise `UsageError`.
    """
    done = Written()
    live = [number for number, ask in enumerate(asks) if not demands_format(ask.words)]
    done.dropped["strict format"] = len(asks) - len(live)
    kept: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for turn in range(rounds):
        if not live:
            break
        drafts = _one_each("writer", writer([asks[i] for i in live], turn), len(live))
        done.drafts += len(drafts)
        sound: dict[int, str] = {}
        for i, draft in zip(live, map(one_line, drafts), strict=True):
            wrong = fault(asks[i].words, draft, max_words, asks[i].gold)
            if wrong is None:
                sound[i] = draft
            else:
                reasons[i] = wrong
        verdicts = critic([asks[i] for i in sound], list(sound.values()), turn) if sound else []
        for i, verdict in zip(sound, _one_each("critic", verdicts, len(sound)), strict=True):
            final = "" if verdict is None else one_line(verdict.final)
            if verdict is not None and verdict.is_correct:
                kept[i] = sound[i]
            elif correct and final and fault(asks[i].words, final, max_words, asks[i].gold) is None:
                kept[i] = final
            else:
                reasons[i] = "no verdict" if verdict is None else "refused by the critic"
        live = [i for i in live if i not in kept]
    done.dropped.update(reasons[i] for i in live)
    done.dropped = +done.dropped
    done.pairs = [Pair(asks[i].words, kept[i], asks[i].category) for i in sorted(kept)]
    return done


def one_line(text: str) -> str:
    """A complement as it is stored and used: one line, so that it cannot open a new turn."""
    return " ".join(text.split())


def phrase_writer(phrases: Sequence[str] = (), seed: int = 0) -> Writer:
    """Drafts from a list, or from the seeds of the ask's category: another one each round, in a random order an ask."""

    def write(asks: Sequence[Ask], turn: int) -> list[str]:
        drafts = []
        for ask in asks:
            choice = list(phrases) or [
                complement for _, complement in CATEGORIES.get(ask.category, CATEGORIES["other"]).seeds
            ]
            order = np.random.default_rng(derive_seed(seed, ask.words)).permutation(len(choice))
            drafts.append(choice[order[turn % len(choice)]])
        return drafts

    return write


def draft_with(policy: Policy, sampling: Sampling, meter: Cost) -> Writer:
    """A writer that asks a model with the few-shot template of each category; `meter` is charged."""

    def write(asks: Sequence[Ask], turn: int) -> list[str]:
        requests = [draft_request(ask.category, ask.words) for ask in asks]
        return reply(policy, requests, sampling.but(seed=derive_seed(sampling.seed, "draft", turn)), meter)

    return write


def check_with(policy: Policy, sampling: Sampling, meter: Cost) -> Critic:
    """A critic that asks a model whether one of five faults holds; a reply without a readable verdict gives None."""

    def check(asks: Sequence[Ask], drafts: Sequence[str], turn: int) -> list[Verdict | None]:
        requests = [check_request(ask.words, draft) for ask, draft in zip(asks, drafts, strict=True)]
        draws = sampling.but(seed=derive_seed(sampling.seed, "check", turn))
        return [parse_verdict(text) for text in reply(policy, requests, draws, meter)]

    return check


def sort_with(policy: Policy, sampling: Sampling, meter: Cost) -> Callable[[Sequence[str]], list[str]]:
    """A function that asks a model for the category of each text; without a readable reply it is "other"."""

    def sort(words: Sequence[str]) -> list[str]:
        return [sorted_into(text) for text in reply(policy, [sort_request(text) for text in words], sampling, meter)]

    return sort


def reply(policy: Policy, requests: Sequence[str], sampling: Sampling, meter: Cost) -> list[str]:
    """One reply to each request, charged to `meter`; "" to a request for which the model has no room."""
    local = model_of(policy)
    rows = [row for row, text in enumerate(requests) if has_room(local, text)]
    out = [""] * len(requests)
    if rows:
        done = policy.generate([requests[row] for row in rows], sampling.but(samples=1))
        charge(meter, done.cost)
        for row, text in zip(rows, done.texts, strict=True):
            out[row] = text
    return out


def parse_verdict(text: str) -> Verdict | None:
    """The JSON object in a critic's reply, code fences allowed; None where there is none or it lacks `is_correct`."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        row = json.loads(found.group()) if found else None
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    said = str(row.get("is_correct")).strip().lower()
    if said not in ("true", "yes", "false", "no"):
        return None
    final = row.get("final_complement")
    return Verdict(said in ("true", "yes"), final if isinstance(final, str) else "", str(row.get("reason", "")))


def _one_each(what: str, given: Sequence[Any], count: int) -> Sequence[Any]:
    if len(given) != count:
        raise UsageError(f"the {what} gave {len(given)} replies for {count} prompts: one each is needed")
    return given


# files


def save_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """One JSON object a line: prompt, complement, category."""
    write_atomic(path, "".join(dump_json(asdict(pair), indent=None) for pair in pairs))


def load_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file. `UsageError` naming file:line for a row that is no pair, and for a file without any."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the complements file {path}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        fields = ("prompt", "complement")
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) and row[k].strip() for k in fields):
            raise UsageError(f"{path}:{number}: an object with the texts 'prompt' and 'complement' is needed")
        pairs.append(
            Pair(row["prompt"], row["complement"], cast(str, row.get("category") or category_of(row["prompt"])))
        )
    if not pairs:
        raise UsageError(f"the complements file {path} is empty: one object with 'prompt' and 'complement' a line")
    return pairs
