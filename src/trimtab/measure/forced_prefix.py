"""The nudging experiment: does a base model narrow like a tuned one when a few of the tuned one's first tokens are forced?

1. Count the first tokens of the tuned model's answers in a prefix tree; keep the longest prefixes (at most k tokens) that
   begin a given share of them. 2. The base answers after such a prefix, drawn by its count, whatever the prompt.
3. Measure its branching factor on the tokens after the prefix.

Branching falls along an answer anyway, so every arm is measured after as many tokens: the base after its own first
tokens, after the tuned model's, after uniformly random ones of the same number (control), and the tuned model after its
own.      moved = (log BF_own - log BF_forced) / (log BF_own - log BF_tuned)      0: not at all, 1: all the way.
Where base and tuned model branch alike there is no way to move, and `moved` is undefined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.divergence import same_tokens
from trimtab.errors import UsageError
from trimtab.generation import sample
from trimtab.lm import LM
from trimtab.measure.entropy_rate import ALIVE, Array, exponential, nats_per_token, share_interval
from trimtab.measure.measurement import Dots, Line, Lines, Row
from trimtab.measure.stats import mean_interval
from trimtab.measure.truncated import Scored, score_answers
from trimtab.policy import Completions, Cost, Prompt
from trimtab.sampling import Sampling, derive_seed, uniforms

if TYPE_CHECKING:
    from trimtab.measure.diagnostic import Subject

Prefix = tuple[int, ...]


@dataclass
class Nudged:
    """The model that is nudged, and which prefixes are forced on it: `tokens` at most, beginning `share` of answers."""

    base: LM
    tokens: int
    share: float

    @classmethod
    def load(cls, subject: Subject, name: str, tokens: int, share: float) -> Nudged:
        base = LM.load(name)
        if not same_tokens(subject.policy, base):
            raise UsageError(
                f"{subject.name} and {name} have different tokens: one's first tokens mean nothing to the other"
            )
        if tokens >= subject.sampling.max_new_tokens:
            raise UsageError(
                f"prefix_tokens={tokens} leaves nothing to measure of {subject.sampling.max_new_tokens} tokens"
            )
        return cls(base, tokens, share)


def modal_prefixes(
    answers: Sequence[Sequence[int]], tokens: int, share: float, ends: Collection[int] = ()
) -> list[tuple[Prefix, int]]:
    """The longest prefixes of at most `tokens` tokens that begin at least `share` of the answers, most frequent first.

    A prefix is left out where a longer one of the list begins with it; none holds an end token.
    """
    tree: Counter[Prefix] = Counter()
    for answer in answers:
        for length in range(1, min(tokens, len(answer)) + 1):
            if answer[length - 1] in ends:
                break
            tree[tuple(answer[:length])] += 1
    frequent = {prefix: count for prefix, count in tree.items() if count >= share * len(answers)}
    inner = {prefix[:length] for prefix in frequent for length in range(1, len(prefix))}
    longest = [(prefix, count) for prefix, count in frequent.items() if prefix not in inner]
    return sorted(longest, key=lambda entry: (-entry[1], entry[0]))


@torch.no_grad()
def continued(
    policy: Any, prompts: Sequence[Prompt], prefixes: Sequence[Prefix], sampling: Sampling, meter: Cost
) -> list[list[int]]:
    """Answers (prefix included) that begin with prefixes[i]; one a row, `sampling.max_new_tokens` long at most."""
    uniform = uniforms(len(prompts), sampling.max_new_tokens, sampling.seed)
    out: list[list[int]] = []
    for first in range(0, len(prompts), policy.lm.batch_rows):
        part = slice(first, first + policy.lm.batch_rows)
        session = policy.open(list(prompts[part]), sampling, meter)
        begun = [list(prefix) for prefix in prefixes[part]]
        session.append(begun)
        out += sample(session, sampling, uniform[part], begun=begun).tokens
    return out


def nats_after(scored: Sequence[Scored], skipped: Sequence[int], prompts: int) -> Array:
    """Entropy per token after the first `skipped[i]` tokens of each answer, one value a prompt; NaN without a token."""
    each = len(scored) // prompts
    rests = [one.entropy[skip:] for one, skip in zip(scored, skipped, strict=True)]
    return np.array([nats_per_token(rests[row * each : (row + 1) * each]) for row in range(prompts)])


def nudge_table(
    nudged: Nudged, subject: Subject, prompts: Sequence[Prompt], answers: Completions, scored: Sequence[Scored],
    sampling: Sampling,
) -> tuple[list[Row], list[Dots | Lines], dict[str, Any]]:  # fmt: skip
    """Rows, figures and details of the experiment; `answers` and `scored` are the tuned model's own."""
    base, meter = nudged.base, subject.meter
    special = {*base.eos_ids, *base.tokenizer.all_special_ids}
    found = modal_prefixes(answers.tokens, nudged.tokens, nudged.share, special)
    if not found:
        raise UsageError(f"no first tokens begin {nudged.share:.0%} of {subject.name}'s answers: lower --prefix-share")
    generator = np.random.default_rng(derive_seed(sampling.seed, "forced prefix"))
    counts = np.array([count for _, count in found], dtype=np.float64)
    picks = generator.choice(len(found), len(answers), p=counts / counts.sum())
    modal = [found[pick][0] for pick in picks]
    ordinary = [token for token in range(base.vocab_size) if token not in special]
    chance = [tuple(generator.choice(ordinary, len(prefix)).tolist()) for prefix in modal]
    skipped = [len(prefix) for prefix in modal]

    free = replace(subject, policy=base, identity=base.fingerprint).answers(prompts, sampling)
    drawn = {"its own": free.tokens}
    for label, prefixes in ((f"{subject.name}'s", modal), ("random", chance)):
        subject.say(f"{base.name}: answering after {label} first tokens")
        seeded = sampling.but(seed=derive_seed(sampling.seed, "forced", label == "random"))
        drawn[label] = continued(base, answers.prompts, prefixes, seeded, meter)
    nats = {}
    whole = score_answers(base, free.prompts, free.tokens, sampling, meter)
    for label, tokens in drawn.items():
        arm = whole if label == "its own" else score_answers(base, answers.prompts, tokens, sampling, meter)
        nats[label] = nats_after(arm, skipped, len(prompts))
    tuned, own = nats_after(scored, skipped, len(prompts)), nats["its own"]

    arms = {f"{base.name}, whole answers": nats_after(whole, [0] * len(whole), len(prompts))}
    arms |= {f"{base.name} after {label} first tokens": values for label, values in nats.items()}
    arms[f"{subject.name} after its own first tokens"] = tuned
    rows = [Row.of(label, exponential(mean_interval(values))) for label, values in arms.items()]
    dots = Dots(
        "Branching factor after forced first tokens",
        "branching factor",
        [(r.label, r.value, r.low, r.high) for r in rows],
    )
    for label in list(drawn)[1:]:
        moved = share_interval(own - nats[label], own - tuned, sampling.seed)
        rows.append(Row.of(f"moved by {label} first tokens", moved, note="0: not at all, 1: as far as the tuned model"))
    details = {
        "base": base.name,
        "prefixes": [{"text": base.decode(prefix), "tokens": list(prefix), "count": count} for prefix, count in found],
    }
    return rows, [dots, disagreement(base, subject, answers, scored, sampling)], details


def disagreement(
    base: LM, subject: Subject, answers: Completions, scored: Sequence[Scored], sampling: Sampling
) -> Lines:
    """Along the tuned model's answers: how often its first choice is not among the base's k first ones."""
    theirs = score_answers(base, answers.prompts, answers.tokens, sampling, subject.meter)
    width = theirs[0].best.shape[1]
    lines = []
    for k in sorted({1, width}):
        missed = [~(b.best[:, :k] == s.best[:, :1]).any(1) for s, b in zip(scored, theirs, strict=True)]
        points: list[tuple[float, float]] = []
        for t in range(max(map(len, missed))):
            alive = [row[t] for row in missed if len(row) > t]
            if len(alive) < ALIVE:
                break
            points.append((t + 1, float(np.mean(alive))))
        lines.append(Line(f"not among the {k} most probable" if k > 1 else "another first choice", points))
    return Lines(f"Where {subject.name} differs from {base.name}", "token", "share of answers", lines)
