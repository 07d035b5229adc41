"""Ensemble: several models, of any tokenizers, vote on every token of one answer.

    P(v) = sum_m w_m q_m(v)        q_m the next-token distribution of model m in a common space, w_m uniform by default

The wrapped policy is the main model: the answer is written in its tokens, the assistants follow its text, each under its
own prompt format (`Follower`). `align` says what the common space is (`alignment`): the union of all surfaces (GaC,
arXiv 2406.12585), the main model's tokens alone (intersection), nearest surfaces (mined), nearest embeddings (eva), or
the union of every model's k likeliest surfaces at this position (unite, arXiv 2410.03777). `weighting=core` weighs by
consistency (`consistency`, the method `core`). Models with one vocabulary under `union` are the plain average.

A surface that the main model has no token for is spelled in its tokens: its probability goes to the first of them, and
once that one is drawn for this surface the rest follow without another vote. Drawing is thus exactly from P over surfaces.
`gate` votes only where the main model's likeliest token is below it (GaC's threshold).

Departures from the published code: one space marker for both tokenizer families; in `unite`, surfaces that begin with
one sub-token of a model share its probability (published: the second gets logit 0); the text is tokenized as a whole,
with the common prefix kept in each model's cache (published: all anew at every step). Half a character at the end of the
text is read by the assistants as a replacement character.

Cost an answer: its tokens once with every model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trimtab.card import Card
from trimtab.decode.alignment import ALIGNMENTS, Alignment, surfaces
from trimtab.decode.consistency import average, consistent
from trimtab.decode.follow import Follower
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.policy import Completions, Cost, Policy, Prompt
from trimtab.sampling import Sampling, derive_seed
from trimtab.stepping import answer_steps, steppable

CARD = Card(
    slug="ensemble",
    name="Token ensemble",
    paper="arXiv 2406.12585 (GaC), 2410.03777 (UniTE), 2404.09492 (EVA)",
    summary="Average the next-token distributions of several models, whatever their tokenizers.",
    goal="capability",
    stage="decode",
    mechanism="contrastive-decoding",
    signal=("none",),
    extra_models=1,
    access="logits",
    produces="decoder",
    needs=("two or more local causal language models of similar skill",),
    infer_multiplier="1 a model",
    fit_cost="none (eva: one singular value decomposition)",
    benefit_metrics=("gold", "reward"),
    cost_metrics=("tokens_forwarded_per_answer", "kl_per_token"),
    limits=("an alignment that is not exact loses or misplaces probability: see byte-level for the exact way",),
    risks=("one weak member pulls the average below the best single model",),
    composes_with=("best-of-n", "qalign", "natural-control"),
    choose="When several models of similar skill are at hand and one answer should draw on all. With unequal "
    "members, core; where tokens do not match, byte-level is exact and this is not.",
    status=("implemented", "verified_cpu"),
    example="trimtab compare pocket/base --reward pocket/reward --gold pocket/judge --prompts prompts.txt "
    "--policy ensemble:models=pocket/nano --policy ensemble:models=pocket/nano,align=unite",
)

ENOUGH = 0.5  # of an assistant's probability that should find a place among the main model's tokens


class LostMass(UserWarning):
    """Most of an assistant's probability has no place in the main model's tokens."""


@dataclass(frozen=True)
class EnsembleConfig:
    # the assistants, separated by |: pocket/NAME, folders or Hub ids
    models: tuple[str, ...] = ("pocket/nano",)
    # what the models' tokens have in common
    align: Literal["union", "intersection", "mined", "eva", "unite"] = "union"
    # every model alike, or by consistency (CoRE)
    weighting: Literal["uniform", "core"] = "uniform"
    # likeliest tokens of each model that vote; 0: all (unite: 10)
    k: int = 0
    # vote only where the main model's likeliest token has less probability than this; none: always
    gate: float | None = None
    # of core: how disagreement on a token lowers its weight
    filter: Literal["rbf", "linear", "power", "reciprocal", "sigmoid"] = "rbf"
    # of core at temperature 0: keep the main model's token where only the segmentation differs, and its end token
    guards: bool = True

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("an ensemble needs at least one assistant: models=NAME|NAME")
        if self.k < 0:
            raise UsageError(f"k must be 1 or more tokens (0: all), not {self.k}")
        if self.gate is not None and not 0 < self.gate <= 1:
            raise UsageError(f"gate is a probability above 0, not {self.gate}")


class Ensemble:
    """`Ensemble(main, [assistant, ...], align="union")` is a policy; all may be any policies that can be stepped."""

    slug = "ensemble"
    Config: type[EnsembleConfig] = EnsembleConfig
    NEEDS_REWARD = False
    MODELS = ("models",)

    def __init__(self, policy: Policy, assistants: Sequence[Policy], name: str | None = None, **options: Any):
        self.policy = steppable(policy, self.slug)
        self.assistants = [steppable(one, self.slug) for one in assistants]
        self.config = self.Config(**{"models": tuple(one.name for one in assistants), **options})
        self.lm, self.name = self.policy.lm, name or self.slug
        models = [self.lm, *(one.lm for one in self.assistants)]
        for model in models:
            refuse_normalizer(model)
        self.surfaces = [surfaces(model) for model in models]
        self.alignments: list[Alignment] = []
        if self.config.align != "unite":
            self.alignments = ALIGNMENTS[self.config.align](self.lm, models[1:])
        self.spelling = [spelled(self.lm, surface) for surface in (self.alignments[0].extra if self.alignments else [])]

    @classmethod
    def make(cls, parts: Any, config: EnsembleConfig) -> Ensemble:
        options = {key: value for key, value in vars(config).items() if key != "models"}
        return cls(parts.policy, [parts.load(path) for path in config.models], **options)

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> EnsembleSession:
        followers = [Follower(one, prompts, sampling, meter) for one in self.assistants]
        return EnsembleSession(self, self.policy.open(prompts, sampling, meter), prompts, followers, sampling)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        """telemetry of each row: the mean `weights` of the models and the mean mass `kept` by their alignment."""
        self.votes: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        answers = answer_steps(self, prompts, sampling)
        if self.votes:
            names = [self.lm.name, *(one.name for one in self.assistants)]
            weights, kept = (torch.cat(rows, 1).mean(1).tolist() for rows in (self.votes, self.kept))
            answers.telemetry = [
                {"weights": dict(zip(names, weights, strict=True)), "kept": dict(zip(names, kept, strict=True))}
                for _ in answers.texts
            ]
            for name, share in zip(names, kept, strict=True):
                if share < ENOUGH:
                    warnings.warn(
                        f"{share:.0%} of {name}'s probability has a place among the tokens of {self.lm.name} "
                        f"(align={self.config.align}): the ensemble hears little of it",
                        LostMass,
                        stacklevel=2,
                    )
        return answers

    def fuse(self, q: torch.Tensor) -> torch.Tensor:
        """P [..., U] from every model's q [M, ..., U]."""
        fused, weights = average(q) if self.config.weighting == "uniform" else consistent(q, self.config.filter)
        self.votes.append(weights.reshape(len(q), -1))
        self.kept.append(q.sum(-1).reshape(len(q), -1))
        return fused


Choices = dict[
    int, list[tuple[float, list[int]]]
]  # first token -> (probability, the tokens that follow) of its surfaces


class EnsembleSession(Guided):
    """The main model's session; the assistants follow its text."""

    def __init__(
        self, method: Ensemble, inner: Any, asked: Sequence[Prompt], followers: Sequence[Follower], sampling: Sampling
    ):
        super().__init__(inner, asked, **{str(number): one for number, one in enumerate(followers)})
        self.method, self.greedy = method, sampling.temperature == 0
        self.seed = sampling.seed
        self.pending: list[list[int]] = [[] for _ in asked]  # tokens that complete a surface already drawn
        self.choices: list[Choices] = [{} for _ in asked]
        method.votes = getattr(method, "votes", [])
        method.kept = getattr(method, "kept", [])

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(-1)
        gate = self.method.config.gate
        top = probabilities.max(-1).values.tolist()
        voting = [row for row in range(self.rows) if not self.pending[row] and (gate is None or top[row] < gate)]
        out = logits.log_softmax(-1)
        self.choices = [{} for _ in range(self.rows)]
        for row, rest in enumerate(self.pending):
            if rest:
                out[row] = _only(out[row], rest[0])
        if voting:
            texts = [self.lm.decode(self.answers()[row]) for row in voting]
            heard = [logits[voting]]
            for one in self.companions.values():
                one.follow(texts, voting)
                heard.append(one.session.logits[voting])
            fused = self._unite(heard, voting) if self.method.config.align == "unite" else self._fixed(heard, voting)
            if self.greedy and self.method.config.weighting == "core" and self.method.config.guards:
                fused = self._guarded(fused, logits[voting])
            out[voting] = fused.log().to(out)
        return out

    def _fixed(self, heard: list[torch.Tensor], rows: list[int]) -> torch.Tensor:
        """Votes in a common space that never changes; the mass of a spelled surface goes to its first token, [n, V_0]."""
        k, width = self.method.config.k, self.method.alignments[0].size
        q = [torch.nn.functional.pad(likeliest(heard[0], k), (0, width - heard[0].shape[-1]))]
        for alignment, logits in zip(self.method.alignments, heard[1:], strict=True):
            q.append(alignment.project(likeliest(logits, k)))
        fused = self.method.fuse(torch.stack(q).double())  # [n, U]
        own = heard[0].shape[-1]
        mass = fused[:, :own].clone()
        for at, row in enumerate(rows):
            for extra in fused[at, own:].nonzero()[:, 0].tolist():
                self._choose_spelling(row, mass[at], self.method.spelling[extra], float(fused[at, own + extra]))
            self._settle(row, mass[at], fused[at, :own])
        return mass

    def _unite(self, heard: list[torch.Tensor], rows: list[int]) -> torch.Tensor:
        """Votes on the union of the models' k likeliest surfaces at this position, [n, V_0]."""
        k = self.method.config.k or 10
        mass = torch.zeros(heard[0].shape, dtype=torch.float64)
        tops = [logits.topk(min(k, logits.shape[-1]), -1).indices.tolist() for logits in heard]
        models = [self.lm, *(one.lm for one in self.companions.values())]
        for at, row in enumerate(rows):
            said: dict[bytes, None] = {}  # b"" is the end
            for surface, top, model in zip(self.method.surfaces, tops, models, strict=True):
                for token in top[at]:
                    if token in model.eos_ids:
                        said[b""] = None
                    elif (word := surface[token]) is not None:
                        said[word] = None
            words = list(said)
            q = torch.stack(
                [
                    of_words(model, surface, words, logits[at].double())
                    for model, surface, logits in zip(models, self.method.surfaces, heard, strict=True)
                ]
            )
            fused = self.method.fuse(q)
            single = torch.zeros_like(mass[at])
            for word, p in zip(words, fused.tolist(), strict=True):
                tokens = spelled(self.lm, word) if word else [min(self.lm.eos_ids)]
                if len(tokens) == 1:
                    single[tokens[0]] += p
                else:
                    self._choose_spelling(row, mass[at], tokens, p)
            mass[at] += single
            self._settle(row, mass[at], single)
        return mass

    def _choose_spelling(self, row: int, mass: torch.Tensor, tokens: list[int], p: float) -> None:
        mass[tokens[0]] += p
        self.choices[row].setdefault(tokens[0], []).append((p, tokens[1:]))

    def _settle(self, row: int, mass: torch.Tensor, single: torch.Tensor) -> None:
        """Complete the row's choices; at temperature 0 the likeliest surface, not the likeliest first token, is taken."""
        for token, options in self.choices[row].items():
            options.append((float(single[token]), []))
        if not self.greedy:
            return
        best, at, rest = float(single.max()), int(single.argmax()), []
        for token, options in self.choices[row].items():
            for p, tokens in options:
                if p > best:
                    best, at, rest = p, token, tokens
        mass.copy_(torch.zeros_like(mass).scatter(0, torch.tensor([at]), 1.0))
        self.choices[row] = {at: [(1.0, rest)]}

    def _guarded(self, fused: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """CoRE's guards: the main model's end token stands, and so does its token where one text begins the other."""
        ours = self.method.surfaces[0]
        for at, (mine, theirs) in enumerate(zip(logits.argmax(-1).tolist(), fused.argmax(-1).tolist(), strict=True)):
            a, b = ours[mine], ours[theirs]
            only_split = a is not None and b is not None and (a.startswith(b) or b.startswith(a))
            if mine in self.lm.eos_ids or only_split:
                fused[at] = torch.zeros_like(fused[at]).scatter(0, torch.tensor([mine]), 1.0)
        return fused

    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        rows = tokens[:, None].tolist() if isinstance(tokens, torch.Tensor) else [list(row) for row in tokens]
        for row, new in enumerate(rows):
            for token in new:
                rest = self.pending[row]
                self.pending[row] = rest[1:] if rest and rest[0] == token else self._rest(row, token)
                self.choices[row] = {}
        super().append(tokens)

    def _rest(self, row: int, token: int) -> list[int]:
        """The tokens that complete the surface which `token` was drawn for."""
        options = self.choices[row].get(token)
        if not options:
            return []
        total = sum(p for p, _ in options)
        number = derive_seed(self.seed, "surface", *self.tokens[row]) / 2**63 * total
        for p, rest in options:
            number -= p
            if number < 0:
                return rest
        return options[-1][1]

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        cut = torch.as_tensor(lengths) < self.lengths
        super().rewind(lengths)
        for row in cut.nonzero()[:, 0].tolist():
            self.pending[row], self.choices[row] = [], {}

    def reindex(self, rows: Sequence[int]) -> None:
        self.pending = [list(self.pending[row]) for row in rows]
        self.choices = [dict(self.choices[row]) for row in rows]


def likeliest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """softmax [..., V] over the k largest logits (0: all), 0 elsewhere."""
    if not k or k >= logits.shape[-1]:
        return logits.softmax(-1)
    top = logits.topk(k, -1)
    return torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))


def of_words(model: Any, own: Sequence[bytes | None], words: Sequence[bytes], logits: torch.Tensor) -> torch.Tensor:
    """[n] a model's distribution over surfaces: the softmax of each one's token, or of its first sub-token.

    Surfaces that begin with the same sub-token share its probability.
    """
    firsts = []
    for word in words:
        tokens = spelled(model, word, own) if word else [min(model.eos_ids)]
        space = own[tokens[0]] == b" " and len(tokens) > 1
        firsts.append(tokens[1] if space else tokens[0])
    shared = torch.tensor([math.log(firsts.count(first)) for first in firsts], dtype=logits.dtype)
    return (logits[firsts] - shared).softmax(-1)


def spelled(lm: Any, surface: bytes, own: Sequence[bytes | None] | None = None) -> list[int]:
    """The tokens of a model that write a surface: its token where it has one, else its tokenizer's segmentation."""
    table: dict[bytes, int] | None = getattr(lm, "_surface_places", None)
    if table is None:
        table = {}
        for token, word in enumerate(own or surfaces(lm)):
            if word:
                table.setdefault(word, token)
        lm._surface_places = table
    if surface in table:
        return [table[surface]]
    tokens = list(lm.tokenizer(surface.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"])
    return tokens or [table.get(b" ", 0)]


def refuse_normalizer(model: Any) -> None:
    """A tokenizer that lower-cases or strips does not give back the text that it was given."""
    probe = "The Cat ran, THE end."
    back = model.tokenizer.decode(
        model.tokenizer(probe, add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )
    if back.strip() != probe and back.strip().lower() == probe.lower():
        raise UsageError(f"the tokenizer of {model.name} changes letters: its text cannot be shared with another model")


def _only(row: torch.Tensor, token: int) -> torch.Tensor:
    out = torch.full_like(row, -torch.inf)
    out[token] = 0.0
    return out
