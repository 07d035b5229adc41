"""Nudging: a large base model writes, a small aligned one takes the pen whenever the base is unsure.

    u(s) = max_v p_base(v | s)        the base keeps writing while u >= gamma

Where u < gamma the nudger writes at least one whole word; the base gets the pen back at the first later word boundary
where it is confident, or where its likeliest token agrees with what the nudger would write next. Only the nudger's end
token ends the answer. Fei, Razeghi, Singh, "Nudging: Inference-time Alignment of LLMs via Guided Decoding",
arXiv 2410.09300. The models share text, not tokens: any two tokenizers and prompt formats do.

One round: (1) the nudger drafts up to `draft` tokens, d; (2) d without its leading spaces is split at single spaces into
words w_1..w_m: if m = 1 all of d is the nudge, else the last word is only looked ahead at; (3) for j = 1..m-1 the base
reads w_1..w_j: hand back at the first j where u >= gamma or its greedy token t begins " w_{j+1}" (agreement);
(4) the base writes t, then every token with u >= gamma, until one is unsure, it would end, or the limit.
Where both models have the same tokens, step 3 is one forward of the whole draft (`Session.states`) instead of one a word;
the answers are the same.

Departures from the published code: >= accepts everywhere (the text version and the cached demo differ at equality); an
empty t (a base that would end) never agrees; length is counted in the base's tokens; the cached path has the agreement
test; caches are kept by the longest common prefix of tokens. `select=sample` draws tokens; u stays that of temperature 1.

Cost an answer: its tokens once with the base, once with the nudger, and the nudger's drafts that were not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trimtab.card import Card
from trimtab.decode.follow import Follower, answer_tokens
from trimtab.divergence import same_tokens
from trimtab.errors import UsageError
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.sampling import Sampling, derive_seed, draw
from trimtab.stepping import steppable

CARD = Card(
    slug="nudging",
    name="Nudging",
    paper="arXiv 2410.09300",
    summary="A small aligned model writes a word or more wherever the base model is unsure.",
    goal="instruction",
    stage="decode",
    mechanism="contrastive-decoding",
    signal=("weak model",),
    access="logits",
    produces="decoder",
    needs=("a local base model", "a small aligned model, of any tokenizer"),
    infer_multiplier="1 (and 1 to 3 of the nudger)",
    fit_cost="none",
    benefit_metrics=("gold", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "nudged_fraction"),
    limits=("languages without spaces: every draft is a nudge",),
    risks=("a nudger that writes most of the answer: then it is the nudger's",),
    composes_with=("best-of-n", "natural-control"),
    choose="When a strong base model knows the facts and a small aligned model, of any family, knows the "
    "manners, and nothing may be trained. With one vocabulary and strength as a dial, proxy tuning; with "
    "models of equal skill, an ensemble.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --gold pocket/judge --prompts prompts.txt "
    "--policy nudging:nudger=pocket/nano --policy model:path=pocket/nano",
)


@dataclass(frozen=True)
class NudgingConfig:
    # the aligned model that helps: pocket/NAME, a folder or a Hub id
    nudger: str = "pocket/nano"
    # the base writes while its likeliest token has at least this probability; 0: always
    gamma: float = 0.3
    # tokens that the nudger drafts at a time
    draft: int = 16
    # also hand back where the base's likeliest token is what the nudger would write
    agreement: bool = True
    # the likeliest token, or draw one (the uncertainty is that of temperature 1 all the same)
    select: Literal["greedy", "sample"] = "greedy"
    # refuse a base run that repeats more than 5 words of the answer, and cut a repeated end of 30 characters or more
    guard: bool = True
    # rounds after which the answer ends
    max_rounds: int = 150
    # test a whole draft in one forward where both models have the same tokens; the answers are the same
    fast: bool = True
    # a control: hand back at a word with this probability instead of by confidence; none: off
    random_handback: float | None = None
    # the control's probability of stopping the base after a token
    random_stop: float = 0.3

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UsageError(f"gamma must be 0 or more, not {self.gamma}")
        if self.gamma > 1 and self.agreement:
            raise UsageError(
                f"gamma={self.gamma} leaves all writing to the nudger: say agreement=false if that is meant"
            )
        if self.draft < 1 or self.max_rounds < 1:
            raise UsageError("draft and max_rounds must be 1 or more")
        for rate in (self.random_stop, self.random_handback or 0):
            if not 0 <= rate <= 1:
                raise UsageError(f"random_handback and random_stop are probabilities, not {rate}")


@dataclass
class _Row:
    """One answer being written. segments: (who, text); notes: why a nudge began where the rule alone would not say."""

    text: str = ""
    segments: list[tuple[str, str]] = field(default_factory=list)
    rounds: int = 0
    repeats: int = 0
    stop: str = ""

    def write(self, who: str, text: str) -> None:
        if text:
            self.text += text
            self.segments.append((who, text))


class Nudging:
    """`Nudging(base, nudger, gamma=0.3)` is a policy; both may be any policies that can be stepped."""

    slug = "nudging"
    Config = NudgingConfig
    NEEDS_REWARD = False
    MODELS = ("nudger",)

    def __init__(self, policy: Policy, nudger: Policy, name: str | None = None, **options: Any):
        self.policy, self.nudger = steppable(policy, "nudging"), steppable(nudger, "nudging")
        self.config = NudgingConfig(**{"nudger": nudger.name, **options})
        self.lm, self.name = self.policy.lm, name or f"nudging({nudger.name})"
        self.fast = self.config.fast and same_tokens(self.nudger.lm, self.lm) and self.policy is self.lm

    @classmethod
    def make(cls, parts: Any, config: NudgingConfig) -> Nudging:
        options = {key: value for key, value in vars(config).items() if key != "nudger"}
        return cls(parts.policy, parts.load(config.nudger), **options)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: `segments` [(who, text)], `rounds`, `nudged` (share of the tokens), `stop`."""
        meter = Cost()
        out: list[_Row] = []
        asked = [prompt for prompt in prompts for _ in range(sampling.samples)]
        rows = max(1, self.lm.batch_rows // 4)
        self.lm.encode(prompts)
        for first in range(0, len(asked) if sampling.max_new_tokens else 0, rows):
            part = asked[first : first + rows]
            out += _Writing(self, part, sampling, meter, first).run()
        return self._completions(asked, out or [_Row(stop="length") for _ in asked], sampling, meter)

    def _completions(self, asked: list[Prompt], rows: list[_Row], sampling: Sampling, meter: Cost) -> Completions:
        texts, tokens, telemetry = [], [], []
        ids = self.lm.encode(asked) if asked else []
        for prompt, start, row in zip(asked, ids, rows, strict=True):
            answer = answer_tokens(self.lm, self.lm.render(prompt), start, row.text)
            if len(answer) > sampling.max_new_tokens:
                answer = answer[: sampling.max_new_tokens]
                row.text, row.stop = self.lm.decode(answer), "length"
            texts.append(row.text)
            tokens.append(answer)
            telemetry.append(
                {"segments": row.segments, "rounds": row.rounds, "nudged": nudged(self.lm, row), "stop": row.stop}
            )
        reasons = ["stop" if row.stop == "nudger ended" else "length" for row in rows]
        blank: list[list[float]] = [[] for _ in texts]
        return Completions(asked, texts, tokens, blank, reasons, meter, None, telemetry)


def nudged(lm: Any, row: _Row) -> float:
    """Share of the answer's tokens, in the base's tokenizer, that the nudger wrote."""
    counts = {"nudge": 0, "base": 0}
    for who, text in row.segments:
        counts[who] += len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return counts["nudge"] / max(1, sum(counts.values()))


def words_of(draft: str) -> tuple[str, list[str]]:
    """The leading spaces of a draft and its words: split at single spaces, so that two in a row make an empty word."""
    lead = draft[: len(draft) - len(draft.lstrip(" "))]
    return lead, draft[len(lead) :].split(" ")


class _Writing:
    """A batch of answers, in lockstep: all unfinished rows draft, are tested, and are continued by the base together."""

    def __init__(self, method: Nudging, asked: list[Prompt], sampling: Sampling, meter: Cost, first: int):
        self.config, self.lm, self.sampling, self.fast = method.config, method.lm, sampling, method.fast
        self.base = Follower(method.policy, asked, sampling, meter)
        self.nudger = Follower(method.nudger, asked, sampling, meter)
        self.rows = [_Row() for _ in asked]
        seeds = [derive_seed(sampling.seed, "nudging", first + row) for row in range(len(asked))]
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds]

    def run(self) -> list[_Row]:
        while live := [i for i, row in enumerate(self.rows) if not row.stop]:
            drafts = self._drafts(live)
            handed = self._hand_back(live, drafts)
            self._base_run(handed)
            for i in live:
                row = self.rows[i]
                row.rounds += 1
                if not row.stop and self._length(i) >= self.sampling.max_new_tokens:
                    row.stop = "length"
                elif not row.stop and row.rounds >= self.config.max_rounds:
                    row.stop = "rounds"
        for row in self.rows:
            if self.config.guard:
                row.text = without_repeated_end(row.text)
        return self.rows

    # 1. the nudger's draft

    def _drafts(self, live: Sequence[int]) -> dict[int, tuple[str, list[int]]]:
        """Text and tokens of each row's draft. Rows whose nudger ends, or has no room left, are finished here."""
        self.nudger.follow([self.rows[i].text for i in live], live)
        lm, session = self.nudger.lm, self.nudger.session
        starts = {i: len(session.tokens[i]) for i in live}
        going, ended = set(live), set()
        for _ in range(self.config.draft):
            room = lm.context_length
            going = {i for i in going if room is None or int(session.lengths[i]) < room}
            if not going:
                break
            chosen = self._choose(session.logits, going)
            ended |= {i for i in going if chosen[i] in lm.eos_ids}
            going -= ended
            session.append([[chosen[i]] if i in going else [] for i in range(session.rows)])
        out = {}
        for i in live:
            tokens = session.tokens[i]
            text = _added(lm, tokens, self.nudger.starts[i], starts[i])
            out[i] = text, tokens[starts[i] :]
            if i in ended:
                self.rows[i].write("nudge", text)
                self.rows[i].stop = "nudger ended"
            elif not text:
                self.rows[i].stop = "length"
        return out

    def _choose(self, logits: torch.Tensor, rows: set[int]) -> dict[int, int]:
        """The next token of some rows: the likeliest, or a draw at the sampling's temperature."""
        if self.config.select == "greedy" or self.sampling.temperature == 0:
            best = logits.argmax(-1).tolist()
            return {i: best[i] for i in rows}
        order = sorted(rows)
        uniform = torch.tensor([float(torch.rand((), generator=self.random[i])) for i in order], dtype=torch.float64)
        drawn = draw(self.sampling.logprobs(logits[order]), uniform).tolist()
        return dict(zip(order, drawn, strict=True))

    # 2. and 3. how much of it is the nudge, and who goes on

    def _hand_back(self, live: Sequence[int], drafts: dict[int, tuple[str, list[int]]]) -> list[int]:
        """Write each row's nudge; the rows whose pen goes back to the base."""
        waiting: dict[int, tuple[str, list[str]]] = {}
        for i in live:
            if self.rows[i].stop:
                continue
            lead, words = words_of(drafts[i][0])
            if len(words) == 1:
                self._nudge(i, drafts[i][0])
            else:
                waiting[i] = lead, words
        tested = self._fast_test if self.fast else self._text_test
        handed = []
        for i, count in tested(waiting, drafts).items():
            lead, words = waiting[i]
            self._nudge(i, lead + " ".join(words[: count or len(words) - 1]))
            if count and not self.rows[i].stop:
                handed.append(i)
        return handed

    def _text_test(
        self, waiting: dict[int, tuple[str, list[str]]], drafts: dict[int, tuple[str, list[int]]]
    ) -> dict[int, int]:
        """For each row after how many words the base takes over, 0 if after none: one call of the base a word."""
        out = dict.fromkeys(waiting, 0)
        for j in range(1, max((len(words) for _, words in waiting.values()), default=1)):
            open_ = [i for i in waiting if not out[i] and j < len(waiting[i][1])]
            if not open_:
                break
            texts = [self.rows[i].text + waiting[i][0] + " ".join(waiting[i][1][:j]) for i in open_]
            self.base.follow(texts, open_)
            logits = self.base.session.logits
            for i in open_:
                tokens = self.base.session.tokens[i]
                if self._takes_over(i, logits[i], tokens, " " + waiting[i][1][j]):
                    out[i] = j
        return out

    def _fast_test(
        self, waiting: dict[int, tuple[str, list[str]]], drafts: dict[int, tuple[str, list[int]]]
    ) -> dict[int, int]:
        """The same from one forward of each whole draft: the base's state before every word."""
        out = dict.fromkeys(waiting, 0)
        if not waiting:
            return out
        rows = list(waiting)
        self.base.follow([self.rows[i].text for i in rows], rows)
        session = self.base.session
        starts = {i: int(session.lengths[i]) for i in rows}
        room = self.lm.context_length or 10**9
        session.append([drafts[i][1][: room - starts[i]] if i in out else [] for i in range(session.rows)])
        for i in rows:
            tokens, states = session.tokens[i], session.states(i)
            lead, words = waiting[i]
            ends = {len(lead + " ".join(words[:j])): j for j in range(1, len(words))}
            for end in range(starts[i] + 1, len(tokens)):
                j = ends.get(len(_added(self.lm, tokens[:end], self.base.starts[i], starts[i])))
                if j is None:
                    continue
                logits = self.lm.head(states[end - 1])
                if self._takes_over(i, logits, tokens[:end], " " + words[j]):
                    out[i] = j
                    break
        return out

    def _takes_over(self, i: int, logits: torch.Tensor, tokens: list[int], ahead: str) -> bool:
        """Whether the base is sure of what follows `tokens`, or would write what the nudger does: `ahead`."""
        if self.config.random_handback is not None:
            return float(torch.rand((), generator=self.random[i])) < self.config.random_handback
        best = int(logits.argmax())
        word = "" if best in self.lm.eos_ids else _added(self.lm, [*tokens, best], self.base.starts[i], len(tokens))
        if not word:
            return False
        sure = float(logits.softmax(-1).max()) >= self.config.gamma
        return sure or (self.config.agreement and ahead.startswith(word))

    def _nudge(self, i: int, text: str) -> None:
        """Write a nudge; the same one four times in a row ends the answer."""
        row = self.rows[i]
        last = next((said for who, said in reversed(row.segments) if who == "nudge"), None)
        row.repeats = row.repeats + 1 if text == last else 0
        row.write("nudge", text)
        if row.repeats >= 3:
            row.stop = "repeated nudges"

    # 4. the base writes

    def _base_run(self, handed: Sequence[int]) -> None:
        """The base's greedy token, then every one it is sure of."""
        if not handed:
            return
        session = self.base.session
        self.base.follow([self.rows[i].text for i in handed], handed)
        starts = {i: int(session.lengths[i]) for i in handed}
        going, first = set(handed), True
        while going:
            logits = session.logits
            room = self.lm.context_length
            limit = self.sampling.max_new_tokens
            going = {i for i in going if int(session.lengths[i]) - self.base.starts[i] < limit}
            going = {i for i in going if room is None or int(session.lengths[i]) < room}
            top = logits.softmax(-1).max(-1).values.tolist()
            if not first and self.config.random_handback is not None:
                draws = {i: float(torch.rand((), generator=self.random[i])) for i in sorted(going)}
                going = {i for i in going if draws[i] >= self.config.random_stop}
            elif not first:
                going = {i for i in going if top[i] >= self.config.gamma}
            chosen = self._choose(logits, going)
            going = {i for i in going if chosen[i] not in self.lm.eos_ids}
            if going:
                session.append([[chosen[i]] if i in going else [] for i in range(session.rows)])
            first = False
        for i in handed:
            row, tokens = self.rows[i], session.tokens[i]
            text = _added(self.lm, tokens, self.base.starts[i], starts[i])
            while text.endswith("\ufffd"):  # half a character: another token would complete it
                tokens = tokens[:-1]
                text = _added(self.lm, tokens, self.base.starts[i], starts[i])
            if self.config.guard and len(text.split(" ")) > 5 and text in row.text:
                continue
            row.write("base", text)

    def _length(self, i: int) -> int:
        """Tokens of the answer so far, as the base counts them."""
        return len(self.lm.tokenizer(self.rows[i].text, add_special_tokens=False)["input_ids"])


def _added(lm: Any, tokens: Sequence[int], prompt: int, start: int) -> str:
    """The text that tokens[start:] add to the answer that begins at token `prompt`."""
    before = lm.decode(tokens[prompt:start])
    text: str = lm.decode(tokens[prompt:])
    return text[len(before) :]


def without_repeated_end(text: str, least: int = 30) -> str:
    """The text without an end of `least` characters or more that stands right before itself, as often as it does."""
    while True:
        for size in range(len(text) // 2, least - 1, -1):
            if text[-size:] == text[-2 * size : -size]:
                text = text[:-size]
                break
        else:
            return text
