"""`ByteLM`: exact next-byte probabilities of a token model, one model call a byte.

With Q(t) the model's probability of a token sequence t, a text begins with x iff its encoding begins with a member of

    cover(x) = {reachable t: t without its last token stops short of the end of x, t reaches or passes it}
    P(x) = sum of Q(t) over cover(x)      P(b | x) = P(x b) / P(x)      P(end | x) = Q(encoding of x, end) / P(x)

The cover is kept as branches: a sequence T that ends inside x, with all tokens that may follow it and agree with x, which
are a slice of the sorted vocabulary. A byte narrows every slice by a binary search. What now ends exactly at the end of x
makes a new branch (one, or a few where the pre-tokenizer still hesitates), and only that is forwarded, on the cache of what
it shares with the branches before. So the cost is one call a byte, of one to two tokens.

semantics     "renormalised": Q is the model with unreachable tokens cut away and the rest scaled to 1 at every step, a
              proper distribution for which every identity above is exact. "raw": the model's own probabilities of
              reachable sequences, scaled to 1 over the next byte only (the published code's fast path).
boundary      what a prompt that may end inside a token is taken for. "exact": its whole cover. "healed": the members that
              leave its encoding at the last token (token healing). "tokens": its encoding alone, as in plain generation.

A prompt's trunk is never encoded again: all up to its last special token, so that a template's words behind it count as
text; or its first token where there is no special one, since such a model says nothing about how a text begins. A control
of a steered model acts on every distribution read. B texts, U usable tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trimtab.control import Steered
from trimtab.decode.byte_view import START, ByteView, Config, Left
from trimtab.errors import TrimtabError, UsageError
from trimtab.lm import LM
from trimtab.policy import Cost, Prompt

Floats = npt.NDArray[np.float64]
Semantics = Literal["renormalised", "raw"]
Boundary = Literal["exact", "healed", "tokens"]
Slot = tuple[int, tuple[int, ...]]  # a row and a token sequence behind its trunk
END = 256  # the symbol behind the 256 bytes


class Context(NamedTuple):
    """A prompt: the tokens that stay, how they may go on, and the text behind them as bytes and as encoded."""

    trunk: list[int]
    config: Config
    data: bytes
    tokens: tuple[int, ...]


class Read(NamedTuple):
    """The model after a sequence: probabilities of the usable tokens [U], of the end, and of what is unreachable."""

    after: Floats
    end: float
    leak: float


class Branch(NamedTuple):
    """A token sequence that ends inside the text, and the tokens that go on as the text does and pass its end.

    scale      probability of the sequence, given the text
    low, high  these tokens: a slice of `read.after`
    depth      bytes of the text behind the sequence
    """

    tokens: tuple[int, ...]
    config: Config
    scale: float
    read: Read
    low: int
    high: int
    depth: int

    def members(self) -> Floats:
        """Probability of each of the branch's members of the cover: one a token, or the sequence itself."""
        return self.scale * (self.read.after[self.low : self.high] if self.depth else np.ones(1))


class ByteLM:
    """See the module. policy: an `LM`, or a `Steered` one."""

    def __init__(self, policy: Any, semantics: Semantics = "renormalised", boundary: Boundary = "exact"):
        steered = isinstance(policy, Steered)
        self.lm: LM = policy.lm if steered else policy
        if not isinstance(self.lm, LM):
            name = getattr(policy, "name", type(policy).__name__)
            raise UsageError(
                f"byte-level reads a local model's next-token probabilities and {name} is none: wrap the model (or a "
                f"steered one), and put {name} outside of byte-level ({name} over byte-level)"
            )
        self.control = policy.control if steered else None
        self.semantics, self.boundary = semantics, boundary
        self.view = ByteView(self.lm.tokenizer, self.lm.vocab_size)
        self.ends = sorted(self.lm.eos_ids)

    def start(self, prompts: Sequence[Prompt], meter: Cost | None = None) -> ByteSession:
        """A session after the prompts, one row each. What it forwards is charged to `meter`."""
        return ByteSession(self, [self.context(prompt) for prompt in prompts], meter)

    def prefix_logprobs(self, prompts: Sequence[Prompt]) -> list[float]:
        """log P(text begins with the prompt) in nats, given its trunk."""
        return ByteSession(self, [self.context(prompt) for prompt in prompts], whole=True).prefix_logprobs

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], end: bool = False) -> list[torch.Tensor]:
        """Log-probability in nats of every byte of each text after its prompt [T_i]; with `end` of the end behind it too."""
        symbols = [[*text.encode(), *([END] if end else [])] for text in texts]
        out: list[list[float]] = [[] for _ in symbols]
        rows = [row for row in range(len(prompts)) if symbols[row]]
        session = self.start([prompts[row] for row in rows]) if rows else None
        while session is not None:
            if any(text.full for text in session.texts):
                raise UsageError(f"a text does not fit the context of {self.lm.name} ({self.lm.context_length} tokens)")
            step = [symbols[row][len(out[row])] for row in rows]
            for row, symbol, logprobs in zip(rows, step, session.logprobs, strict=True):
                out[row].append(float(logprobs[symbol]))
            more = [at for at, row in enumerate(rows) if len(out[row]) < len(symbols[row])]
            session = None if not more else session if len(more) == len(rows) else session.fork(more)
            rows = [rows[at] for at in more]
            if session is not None:
                session.step([step[at] for at in more])
        return [torch.tensor(row, dtype=torch.float64) for row in out]

    def context(self, prompt: Prompt) -> Context:
        """Where a prompt's trunk ends and its text begins."""
        (ids,) = self.lm.encode([prompt])
        view, config = self.view, START
        cut = next((at for at in range(len(ids), 0, -1) if not view.bytes_of(ids[at - 1 : at])), 0)
        if not cut:
            cut, config = 1, view.walk(ids[:1]) or START
        return Context(ids[:cut], config, view.bytes_of(ids[cut:]), tuple(ids[cut:]))

    def lefts(self, context: Context) -> list[Left]:
        """The left contexts of the prompt's cover, as the boundary has it."""
        view, (_, config, data, tokens) = self.view, context
        if self.boundary == "exact" or not data:
            found = view.cover(data, config)
        else:
            ways = [tokens] if self.boundary == "tokens" else [tokens[:-1], tokens]
            walked = [(way, view.walk(way, config)) for way in ways]
            found = [Left(way, after, len(view.bytes_of(way))) for way, after in walked if after is not None]
        if not found:
            raise view.refusal(data, config)
        return found

    def read(self, config: Config, logits: Floats) -> Read:
        """The next-token distribution after a sequence, from its logits [V]."""
        chances = np.exp(logits - logits.max())
        total = float(chances.sum())
        if not math.isfinite(total):
            raise TrimtabError(f"{self.lm.name} gave logits that are not numbers (NaN or infinite weights?)")
        after = np.where(self.view.allowed(config), chances, 0)[self.view.order]
        end = float(chances[self.ends].sum()) if self.view.may_end(config) else 0.0
        valid = float(after.sum()) + end
        scale = valid if self.semantics == "renormalised" else total
        return Read(after / scale, end / scale, max(0.0, 1 - valid / total))


@dataclass
class Text:
    """One row. logprob: of what was said since the prompt, in nats; leak: unreachable mass met on the way, weighted by the
    share of the text that went there, over `reads` symbols; full: the model's context has no room left."""

    context: Context
    branches: list[Branch] = field(default_factory=list)
    logprob: float = 0.0
    leak: float = 0.0
    reads: int = 1
    full: bool = False


class ByteSession:
    """A batch of texts that grow byte by byte.

    texts            [B] the rows
    prefix_logprobs  [B] log P(prompt) in nats, given what all members of its cover share (`whole`: given its trunk)
    """

    def __init__(self, model: ByteLM, contexts: Sequence[Context], meter: Cost | None = None, whole: bool = False):
        self.model, self.view = model, model.view
        self.texts = [Text(context) for context in contexts]
        self.prefix_logprobs: list[float] = []
        self._next: Floats | None = None
        lefts = [model.lefts(context) for context in contexts]
        shared = [() if whole else _shared([left.tokens for left in row]) for row in lefts]
        self._slots: list[Slot] = list(enumerate(shared))
        firsts = [[*context.trunk, *tokens] for context, tokens in zip(contexts, shared, strict=True)]
        self.tokens = model.lm.session(firsts, model.control, meter)
        logs, reads = self._climb(lefts)
        for row, (text, found) in enumerate(zip(self.texts, lefts, strict=True)):
            top = max(logs[row, left.tokens] for left in found)
            for left in found if top > -math.inf else ():
                rest, slot = text.context.data[left.end :], (row, left.tokens)
                low, high = self.view.starting(rest)
                low += low < high and self.view.sorted[low] == rest  # ends with the text: another of the left contexts
                scale = math.exp(logs[slot] - top)
                text.branches.append(Branch(left.tokens, left.config, scale, reads[slot], low, high, len(rest)))
            total = sum(float(branch.members().sum()) for branch in text.branches)
            if not total > 0:
                raise UsageError(f"{model.lm.name} gives prompt {row} probability 0: nothing can be said after it")
            self.prefix_logprobs.append(top + math.log(total))
            text.branches = [branch._replace(scale=branch.scale / total) for branch in text.branches]
            text.leak = sum(branch.scale * branch.read.leak for branch in text.branches if not branch.depth)

    @property
    def rows(self) -> int:
        return len(self.texts)

    @property
    def logprobs(self) -> torch.Tensor:
        """[B, 257] float64 in nats, of the next byte and, last, of the end. All -inf where the model cannot go on: its
        context is full, or its tokenizer cannot spell what was said."""
        masses = self._masses()
        with np.errstate(divide="ignore", invalid="ignore"):
            return torch.from_numpy(
                np.nan_to_num(np.log(masses / masses.sum(-1, keepdims=True)), nan=-np.inf, neginf=-np.inf)
            )

    @property
    def mass(self) -> torch.Tensor:
        """[B] what the next symbols add up to before they are scaled to 1: 1 to rounding unless `raw` leaks."""
        return torch.from_numpy(self._masses().sum(-1))

    def step(self, symbols: Sequence[int]) -> None:
        """Every text goes on with a byte. (END: the text stays as it is; drop it by a `fork` of the others.)"""
        masses, heads = self._masses(), list[Branch]()
        owners: list[int] = []
        for row, (text, symbol) in enumerate(zip(self.texts, symbols, strict=True)):
            found = self._narrow(text, symbol, masses[row]) if symbol != END else []
            limit = self.model.lm.context_length
            if limit is not None and any(len(text.context.trunk) + len(head.tokens) > limit for head in found):
                text.full, text.branches, found = True, [], []
            heads += found
            owners += [row] * len(found)
        self._next = None
        if not heads:
            return
        wanted = [(row, head.tokens) for row, head in zip(owners, heads, strict=True)]
        idle = set(range(self.rows)) - set(owners)
        self._seek(wanted + [self._slots[slots[0]] for row, slots in self._slots_of_rows().items() if row in idle])
        for row, head, logits in zip(owners, heads, self._logits(), strict=False):
            text, read = self.texts[row], self.model.read(head.config, logits)
            text.branches.append(head._replace(read=read))
            text.leak += head.scale * read.leak

    def fork(self, rows: Sequence[int]) -> ByteSession:
        """A new session whose row j copies row `rows[j]`."""
        new = copy.copy(self)
        new.texts = [replace(self.texts[row], branches=list(self.texts[row].branches)) for row in rows]
        slots = self._slots_of_rows()
        sources = [(at, slot) for at, row in enumerate(rows) for slot in slots[row]]
        new._slots = [(at, self._slots[slot][1]) for at, slot in sources]
        new.tokens = self.tokens.fork([slot for _, slot in sources])
        new.prefix_logprobs = [self.prefix_logprobs[row] for row in rows]
        new._next = None if self._next is None else self._next[list(rows)]
        return new

    # tokens

    def encoded(self, row: int) -> int | None:
        """Tokens behind the trunk in the text's own encoding; None inside a character that only a longer token spells."""
        return next((len(branch.tokens) for branch in self.texts[row].branches if not branch.depth), None)

    def cover(self, row: int) -> tuple[Floats, list[Branch]]:
        """Probability of each member of the text's cover, branch by branch. What does not fit the context is left out."""
        text, limit = self.texts[row], self.model.lm.context_length
        room = math.inf if limit is None else limit - len(text.context.trunk)
        branches = [branch for branch in text.branches if len(branch.tokens) + (branch.depth > 0) <= room]
        return np.concatenate([branch.members() for branch in branches]), branches

    def member(self, branches: Sequence[Branch], number: int) -> tuple[tuple[int, ...], bytes]:
        """Member `number` of a cover: its tokens, and the bytes by which it passes the end of the text."""
        sizes = [len(branch.members()) for branch in branches]
        at = next(at for at in range(len(sizes)) if number < sum(sizes[: at + 1]))
        branch, place = branches[at], branches[at].low + number - sum(sizes[:at])
        if not branch.depth:
            return branch.tokens, b""
        return (*branch.tokens, int(self.view.order[place])), self.view.sorted[place][branch.depth :]

    def tokens_at(self, wanted: Sequence[Slot]) -> Any:
        """A token session of these sequences, on what is cached here; this session stays as it is."""
        new = self.fork(range(self.rows))
        new._seek(list(wanted))
        return new.tokens

    # inside

    def _climb(self, lefts: list[list[Left]]) -> tuple[dict[Slot, float], dict[Slot, Read]]:
        """Down the tree of left contexts, a token at a time: log-probability of each, and the model after it."""
        logs, reads = dict.fromkeys(self._slots, 0.0), dict[Slot, Read]()
        configs = {(row, tokens): self.view.walk(tokens, self.texts[row].context.config) for row, tokens in self._slots}
        while True:
            for slot, logits in zip(self._slots, self._logits(), strict=True):
                config = configs[slot]
                if slot not in reads and config is not None:
                    reads[slot] = self.model.read(config, logits)
            wanted: list[Slot] = []
            for row, tokens in self._slots:
                size = len(tokens)
                longer = {left.tokens[: size + 1] for left in lefts[row] if left.tokens[:size] == tokens}
                inner = sorted(longer - {tokens})
                for more in inner:
                    share = float(reads[row, tokens].after[self.view.rank[more[-1]]])
                    logs[row, more] = logs[row, tokens] + (math.log(share) if share > 0 else -math.inf)
                    configs[row, more] = self.view.walk(more[-1:], configs[row, tokens] or START)
                wanted += [(row, more) for more in inner] or [(row, tokens)]
            if wanted == self._slots:
                return logs, reads
            self._seek(wanted)

    def _masses(self) -> Floats:
        """[B, 257] probability of each next symbol, given the text; they add up to 1 unless `raw` leaks."""
        if self._next is None:
            self._next = np.zeros((self.rows, END + 1))
            for out, text in zip(self._next, self.texts, strict=True):
                for branch in text.branches:
                    column = self.view.byte_at(branch.depth)[branch.low : branch.high]
                    weights = branch.read.after[branch.low : branch.high]
                    out[:END] += branch.scale * np.bincount(column, weights, minlength=END)
                    out[END] += 0 if branch.depth else branch.scale * branch.read.end
        return self._next

    def _narrow(self, text: Text, byte: int, masses: Floats) -> list[Branch]:
        """Narrow a text's branches by a byte; returns, still to be read, the sequences that now end with it."""
        chance = float(masses[byte])
        text.reads += 1
        text.logprob += math.log(chance / float(masses.sum())) if chance > 0 else -math.inf
        branches, heads = list[Branch](), list[Branch]()
        for branch in text.branches if chance > 0 else ():
            column = self.view.byte_at(branch.depth)[branch.low : branch.high]
            low, high = (branch.low + int(np.searchsorted(column, byte, side)) for side in ("left", "right"))
            depth, scale = branch.depth + 1, branch.scale / chance
            if low < high and self.view.lengths[low] == depth:
                token, share = int(self.view.order[low]), float(branch.read.after[low])
                config = self.view.step(branch.config, token) if share > 0 else None
                if config is not None:
                    sequence = (*branch.tokens, token)
                    heads.append(Branch(sequence, config, scale * share, branch.read, 0, len(self.view.order), 0))
                low += 1
            if branch.read.after[low:high].any():
                branches.append(branch._replace(scale=scale, low=low, high=high, depth=depth))
        text.branches = branches
        return heads

    def _slots_of_rows(self) -> dict[int, list[int]]:
        out: dict[int, list[int]] = {}
        for slot, (row, _) in enumerate(self._slots):
            out.setdefault(row, []).append(slot)
        return out

    def _logits(self) -> Floats:
        logits: Floats = self.tokens.logits.cpu().double().numpy()
        return logits

    def _seek(self, wanted: list[Slot]) -> None:
        """Bring the token session to these sequences, one a slot, on what is cached already."""
        sources, kept = list[int](), list[int]()
        slots = self._slots_of_rows()
        for row, tokens in wanted:
            same = {slot: len(_shared([tokens, self._slots[slot][1]])) for slot in slots[row]}
            sources.append(max(same, key=same.__getitem__))
            kept.append(same[sources[-1]])
        if sources != list(range(len(self._slots))):
            self.tokens = self.tokens.fork(sources)
        trunks = [len(self.texts[row].context.trunk) for row, _ in wanted]
        self.tokens.rewind([trunk + same for trunk, same in zip(trunks, kept, strict=True)])
        self.tokens.append([tokens[same:] for (_, tokens), same in zip(wanted, kept, strict=True)])
        self._slots = wanted


def _shared(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common beginning."""
    first, last = min(sequences), max(sequences)
    size = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:size]
