"""Byte-level: answers drawn from exact byte probabilities of token models, so that a prompt may end inside a token.

Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles", arXiv
2410.09303. A prompt that ends inside a token is encoded as training never encoded it, and the model's next token is badly
wrong. The remedy sums over all encodings of texts that begin with the prompt (`byte_lm`, `byte_view`).

One model:      draw a member t of the prompt's cover with probability Q(t) / P(prompt), then ordinary tokens after t (those
                that keep the sequence reachable): exactly a draw from P(. | prompt), without a cost per byte.
Several models: p(b | x) = sum_m w_m P_m(b | x), byte by byte, whatever their vocabularies; the end is a shared symbol.
                weights=uniform keeps w_m = 1 / M; weights=bayesian takes w_m in proportion to P_m(answer so far), which is
                the exact mixture of the models' distributions over answers.

Fill-in-the-middle: with the suffix first (suffix, then prefix) the prompt ends on the prefix's last byte and its cover is
that of the prefix behind the last special token. With the prefix first a special token follows it, and there is nothing
to mend.

Temperature and cuts act on the choice among the cover's members as on a token, on the tokens behind it, and with several
models on the distribution of the next byte. What the first model cannot spell is never said.

Departures from the published code: the prompt need not end on a character or hold a space, unreachable tokens are cut away
and the rest scaled at every step (semantics=raw gives the code's fast path), the end stops an answer, an impossible byte
stays impossible at any temperature, and only new tokens are forwarded. Defaults are plain sampling, not the demo's
temperature 0.6.

Cost an answer: one model, what plain sampling costs (the cover of a prompt takes one or two calls more and, on pocket/base,
0.05 tokens more). Several models: one call and about one token a byte of each.
"""

from __future__ import annotations

import itertools
import time
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from trimtab.card import Card
from trimtab.decode.byte_lm import END, Boundary, ByteLM, ByteSession, Semantics, Slot
from trimtab.decode.byte_view import Config
from trimtab.errors import UsageError, unknown
from trimtab.generation import cut_at, sample
from trimtab.guided import Guided
from trimtab.lm import LM
from trimtab.parts import Parts
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.sampling import Sampling, derive_seed, draw, uniforms

CARD = Card(
    slug="byte-level",
    name="Byte-level",
    paper="arXiv 2410.09303",
    summary="Exact next-byte probabilities of token models: prompts cut inside a token, ensembles across vocabularies.",
    goal="capability",
    stage="decode",
    mechanism="none",
    signal=("none",),
    access="logits",
    produces="decoder",
    needs=("a local causal language model", "a BPE tokenizer that does not change text"),
    infer_multiplier="1 (and a few tokens); several models: 1 to 2 tokens a byte of each",
    fit_cost="none",
    benefit_metrics=("reward", "nll_per_byte"),
    cost_metrics=("tokens_forwarded_per_answer",),
    limits=(
        "BPE tokenizers only; Unigram, WordPiece, normalizing tokenizers and unknown pre-tokenizers are refused",
        "a model without a special first token says nothing of a text's first token",
    ),
    risks=("an ensemble is as bad as its worst member's share",),
    composes_with=("best-of-n", "natural-control", "re-control"),
    conflicts=("methods that choose token by token around it",),
    choose="When prompts end inside a word (completion, fill-in-the-middle), or models of different vocabularies "
    "should vote exactly. For models of one vocabulary the plain ensemble is the same and cheaper.",
    status=("implemented", "verified_cpu"),
    example='trimtab compare pocket/base --reward pocket/reward --prompts p.txt --policy "byte-level:models=pocket/nano"',
)
Weights = Literal["uniform", "bayesian"]
LEAK = 0.05  # share of a model's mass on unreachable tokens that is warned about


class Leak(UserWarning):
    """A model puts much of its mass where no encoding goes."""


@dataclass(frozen=True)
class ByteLevelConfig:
    # further models, pocket/NAME, folders or Hub ids separated by |: the answer is written byte by byte by all together
    models: tuple[str, ...] = ()
    # of several models: equal, or in proportion to the probability that each gave the answer so far
    weights: Weights = "uniform"
    # all encodings that begin with the prompt, those that leave it at its last token (token healing), or its own alone
    prompt_boundary: Boundary = "exact"
    # cut unreachable tokens away and scale the rest at every step, or take the model's own probabilities of reachable ones
    semantics: Semantics = "renormalised"

    def __post_init__(self) -> None:
        known = {"weights": Weights, "prompt_boundary": Boundary, "semantics": Semantics}
        for name, choices in known.items():
            if getattr(self, name) not in get_args(choices):
                raise unknown(name, str(getattr(self, name)), get_args(choices))


@dataclass
class _Said:
    """One answer as drawn: pieces with the log-probability of each, whether it ended, and telemetry."""

    pieces: list[tuple[bytes, float]] = field(default_factory=list)
    ended: bool = False
    telemetry: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Without half a character at its end."""
        return b"".join(piece for piece, _ in self.pieces).decode("utf-8", "ignore")


@dataclass(frozen=True)
class _Chunk:
    """Answers drawn together: sessions after the prompts, one a model; whose prompt each answer has; the first's number."""

    sessions: list[ByteSession]
    prompts: Sequence[Prompt]
    owners: list[int]
    first: int

    @property
    def end(self) -> int:
        return self.first + len(self.owners)


class ByteLevel:
    """`ByteLevel(lm)`, `ByteLevel(lm, [other_lm])`. The first may be steered; any may be one already loaded or its path."""

    slug = "byte-level"
    Config = ByteLevelConfig
    NEEDS_REWARD = False
    MODELS = ("models",)

    def __init__(
        self,
        policy: Policy,
        models: Sequence[LM | str] = (),
        weights: Weights = "uniform",
        prompt_boundary: Boundary = "exact",
        semantics: Semantics = "renormalised",
        name: str | None = None,
    ):
        others = [LM.load(model) if isinstance(model, str) else model for model in models]
        self.config = ByteLevelConfig(tuple(other.name for other in others), weights, prompt_boundary, semantics)
        self.policy = policy
        self.models = [ByteLM(model, semantics, prompt_boundary) for model in (policy, *others)]
        self.lm, self.view = self.models[0].lm, self.models[0].view
        self.name = name or "+".join(["byte-level", *self.config.models])

    @classmethod
    def make(cls, parts: Parts, config: ByteLevelConfig) -> ByteLevel:
        return cls(parts.policy, **{**asdict(config), "models": [parts.load(path) for path in config.models]})

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """tokens: the first model's own encoding of the answer. A piece's log-probability stands at its first byte's token.

        telemetry: `leak`, the mean share of its mass that the model (of several: the worst) put on unreachable tokens; with
        several models `weights`, theirs at the end of the answer.
        """
        if len(self.models) == 1 and self.config.prompt_boundary == "tokens":
            return self.policy.generate(prompts, sampling)
        start = time.perf_counter()
        for model in self.models:
            model.lm.encode(prompts)  # every prompt is refused, by its number, before any work
        if sampling.repetition_penalty != 1 and len(self.models) > 1:
            raise UsageError("a repetition penalty counts tokens, and several models share bytes only: leave it at 1")
        meter, each, said = Cost(), sampling.samples, list[_Said]()
        draw_part = self._draw_tokens if len(self.models) == 1 else self._draw_bytes
        together = min(model.lm.batch_rows for model in self.models)
        step = max(1, together // each)
        for first in range(0, len(prompts), step) if sampling.max_new_tokens else ():
            part = prompts[first : first + step]
            sessions = [model.start(part, meter) for model in self.models]
            owners = [owner for owner in range(len(part)) for _ in range(each)]
            for at in range(0, len(owners), together):
                said += draw_part(_Chunk(sessions, part, owners[at : at + together], first * each + at), sampling)
        said = said or [_Said() for _ in range(len(prompts) * each)]
        leaks = [one.telemetry["leak"] for one in said if "leak" in one.telemetry]
        if leaks and sum(leaks) > LEAK * len(leaks):
            warnings.warn(
                f"{self.name}: {sum(leaks) / len(leaks):.0%} of a model's mass is on tokens that no encoding has there: "
                "its tokenizer may not be the one it was trained with",
                Leak,
                stacklevel=2,
            )
        rows_out = [self._finished(one, sampling) for one in said]
        meter.seconds = time.perf_counter() - start
        return Completions(
            prompts=[prompt for prompt in prompts for _ in range(each)],
            texts=[row[0] for row in rows_out],
            tokens=[row[1] for row in rows_out],
            logprobs=[row[2] for row in rows_out],
            finish_reasons=[row[3] for row in rows_out],
            cost=meter,
            telemetry=[one.telemetry for one in said],
        )

    def _draw_tokens(self, chunk: _Chunk, sampling: Sampling) -> list[_Said]:
        """One model: a member of each prompt's cover, then tokens."""
        (model,), (session,), owners = self.models, chunk.sessions, chunk.owners
        uniform = uniforms(chunk.end, 1 + sampling.max_new_tokens, sampling.seed)[chunk.first :]
        said, wanted = list[_Said](), list[Slot]()
        for owner in sorted(set(owners)):
            chances, branches = session.cover(owner)
            logprobs = sampling.but(repetition_penalty=1.0).logprobs(torch.from_numpy(chances).log()[None])
            mine = uniform[[at for at, one in enumerate(owners) if one == owner], 0]
            for number in draw(logprobs.expand(len(mine), -1), mine).tolist():
                tokens, rest = session.member(branches, number)
                said.append(_Said([(rest, float(logprobs[0, number]))]))
                wanted.append((owner, tokens))
        configs = [model.view.walk(tokens, session.texts[owner].context.config) for owner, tokens in wanted]
        reachable = Reachable(session.tokens_at(wanted), [chunk.prompts[owner] for owner in owners], model, configs)
        drawn = sample(reachable, sampling, uniform[:, 1:])
        for one, ids, logs, leaks in zip(said, drawn.tokens, drawn.logprobs, reachable.leaks, strict=True):
            one.ended = bool(ids) and ids[-1] in model.lm.eos_ids
            one.pieces += [(model.view.bytes_of([token]), log) for token, log in zip(ids, logs, strict=True)]
            one.telemetry["leak"] = sum(leaks) / max(1, len(leaks))
        return said

    def _draw_bytes(self, chunk: _Chunk, sampling: Sampling) -> list[_Said]:
        """Several models: the mixture's next byte, at which each of them advances."""
        sessions = [session.fork(chunk.owners) for session in chunk.sessions]
        said = [_Said() for _ in chunk.owners]
        before = [len(text.context.tokens) for text in sessions[0].texts]
        live, weights = list(range(len(said))), torch.zeros(len(sessions), len(said), dtype=torch.float64)
        for column in itertools.count():
            each = torch.stack([session.logprobs for session in sessions])  # [M, B, 257]
            mixed = mixture(each, weights).masked_fill(each[0].isneginf(), -torch.inf)
            logprobs = sampling.logprobs(mixed)
            uniform = uniforms(chunk.end, 1, derive_seed(sampling.seed, column))[chunk.first :][live, 0]
            drawn = draw(logprobs, uniform) if sampling.temperature else logprobs.argmax(-1)
            if self.config.weights == "bayesian":
                weights = weights + each.gather(-1, drawn[None, :, None].expand(len(each), -1, 1))[..., 0]
            for session in sessions:
                session.step(drawn.tolist())
            going = []
            for at, (row, symbol) in enumerate(zip(live, drawn.tolist(), strict=True)):
                one, texts = said[row], [session.texts[at] for session in sessions]
                one.pieces.append((bytes([symbol]) if symbol < END else b"", float(logprobs[at, symbol])))
                one.ended = symbol == END
                tokens = (sessions[0].encoded(at) or 0) - before[row]
                full = tokens > sampling.max_new_tokens or any(text.full for text in texts)
                if one.ended or full or any(word in one.text for word in sampling.stop):
                    one.telemetry["leak"] = max(text.leak / text.reads for text in texts)
                    one.telemetry["weights"] = weights[:, at].softmax(0).tolist()
                else:
                    going.append(at)
            if not going:
                return said
            if len(going) < len(live):
                sessions = [session.fork(going) for session in sessions]
                live, weights = [live[at] for at in going], weights[:, going]
        return said

    def _finished(self, said: _Said, sampling: Sampling) -> tuple[str, list[int], list[float], str]:
        """An answer's text, tokens, log-probabilities and finish reason."""
        text = said.text
        tokens, logprobs = self._encoded(text.encode(), said)
        ended = said.ended and len(tokens) <= sampling.max_new_tokens
        if len(tokens) > sampling.max_new_tokens:
            tokens, logprobs = tokens[: sampling.max_new_tokens], logprobs[: sampling.max_new_tokens]
            text = self.view.bytes_of(tokens).decode("utf-8", "ignore")
        cut = cut_at(text, sampling.stop)
        return cut, tokens, logprobs, "stop" if ended or cut != text else "length"

    def _encoded(self, data: bytes, said: _Said) -> tuple[list[int], list[float]]:
        tokens = self.view.encode(data)
        ends = [0]
        for token in tokens:
            ends.append(ends[-1] + len(self.view.bytes_of([token])))
        logprobs, at = [0.0] * (len(tokens) + 1), 0
        for piece, log in said.pieces:
            logprobs[bisect_right(ends, at) - 1] += log
            at += len(piece)
        if said.ended:
            return [*tokens, min(self.lm.eos_ids)], logprobs
        return tokens, logprobs[:-1]


class Reachable(Guided):
    """A session without the tokens that no encoding has there. configs [B]; leaks [rows at first] what was cut, each step."""

    def __init__(self, inner: Any, asked: Sequence[Prompt], model: ByteLM, configs: Sequence[Config | None]):
        super().__init__(inner, asked)
        self.model, self.configs = model, list(configs)
        self.owners: Sequence[int] = range(len(configs))
        self.leaks: list[list[float]] = [[] for _ in configs]

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        view = self.model.view
        nothing = np.zeros(view.size, bool)
        keep = torch.from_numpy(np.stack([nothing if one is None else view.allowed(one) for one in self.configs]))
        may_end = torch.tensor([one is not None and view.may_end(one) for one in self.configs])
        keep[:, self.model.ends] = may_end[:, None]
        cut = logits.masked_fill(~keep.to(logits.device), -torch.inf)
        kept = (cut.logsumexp(-1) - logits.logsumexp(-1)).exp().tolist()
        for owner, share in zip(self.owners, kept, strict=True):
            self.leaks[owner].append(max(0.0, 1 - share))
        return cut

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        super().append(tokens)
        added = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else tokens
        self.configs = [
            None if config is None else self.model.view.walk(row, config)
            for config, row in zip(self.configs, added, strict=True)
        ]

    def reindex(self, rows: Sequence[int]) -> None:
        self.configs = [self.configs[row] for row in rows]
        self.owners = [self.owners[row] for row in rows]


def mixture(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log sum_m w_m p_m: logprobs [M, B, S], weights [M, B] log, up to a constant -> [B, S]. A model that cannot go on
    (all -inf) has no part in it."""
    lost = logprobs.isneginf().all(-1)
    shares = weights.masked_fill(lost, -torch.inf).log_softmax(0)
    return (logprobs + shares[..., None]).logsumexp(0)
