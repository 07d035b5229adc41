"""A parent with its token rows in another vocabulary's order: the embeddings and the head, by rows, as they are read.

A row of the output's vocabulary comes from a parent as follows:

    the parent has the token             its own row
    it lacks the token, the base has it  the base's row (so the parent's difference to the base is 0 there)
    neither has it                       the mean of the rows of the models that do: with one owner, that owner's row
    the row belongs to no token          the parent's own row of that place if that belongs to no token there either;
                                         otherwise the mean of its tokens' rows

So every parent has every row, and a token that only one model knows comes out as that model has it, whatever the weights. The
last line departs from filling all spare rows with the mean: a merge of models that are padded alike keeps their spare rows.

Cost: a read a run of neighbouring rows; a parent whose ids are a permutation is read a row at a time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.merge.source import Entry, Source

Rows = NDArray[np.int64]
MISSING, SPARE = -1, -2  # in a table of old rows: a token that the parent lacks; a row without a token
CHUNK = 4096  # rows read at a time for a mean


class Remapped(Source):
    """`inner` with other token rows. own [V]: the old row of each new one, MISSING or SPARE.

    lenders: for MISSING rows, sources and their old rows (MISSING where they lend none); what several lend is their mean.
    named: the old rows that belong to a token. tensors: the names of those that have a row a token.
    """

    def __init__(
        self, inner: Source, tensors: Sequence[str], own: Rows, lenders: Sequence[tuple[Source, Rows]], named: Rows
    ) -> None:
        self.inner, self.own, self.lenders, self.named = inner, own, lenders, named
        self.name, self.folder, self.config = inner.name, inner.folder, inner.config
        self.tensors = frozenset(tensors)
        self.entries = {
            name: Entry(entry.dtype, (len(own), *entry.shape[1:])) if name in self.tensors else entry
            for name, entry in inner.entries.items()
        }
        self._means: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self.tensors:
            return self.inner.read(name, start, stop)
        own = self.own[start:stop]
        have = np.flatnonzero(own >= 0)
        rows = gather(self.inner, name, own[have])
        if len(have) == len(own):
            return rows
        work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        out = torch.empty(len(own), *rows.shape[1:], dtype=work)
        out[torch.from_numpy(have)] = rows.to(work)
        spare = np.flatnonzero(own == SPARE)
        if len(spare):
            out[torch.from_numpy(spare)] = self._mean(name).to(work)
        missing = np.flatnonzero(own == MISSING)
        if len(missing):
            out[torch.from_numpy(missing)] = self._lent(name, missing + start, out)
        return out

    def _lent(self, name: str, places: Rows, like: Tensor) -> Tensor:
        total = like.new_zeros(len(places), *like.shape[1:])
        count = like.new_zeros(len(places))
        for source, table in self.lenders:
            lends = np.flatnonzero(table[places] >= 0)
            if len(lends):
                where = torch.from_numpy(lends)
                total[where] += gather(source, name, table[places[lends]]).to(like.dtype)
                count[where] += 1
        return total / count.view(-1, *[1] * (total.dim() - 1))

    def _mean(self, name: str) -> Tensor:
        """The mean of the rows that belong to a token, float64."""
        with self._lock:
            if name not in self._means:
                total = torch.zeros(self.inner.entries[name].shape[1:], dtype=torch.float64)
                for start in range(0, len(self.named), CHUNK):
                    total += gather(self.inner, name, self.named[start : start + CHUNK]).double().sum(dim=0)
                self._means[name] = total / max(len(self.named), 1)
            return self._means[name]

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        digest = hashlib.sha256(self.inner.fingerprint.encode() + self.own.tobytes() + self.named.tobytes())
        for source, table in self.lenders:
            digest.update(source.fingerprint.encode() + table.tobytes())
        return digest.hexdigest()[:16]


def gather(source: Source, name: str, ids: Rows) -> Tensor:
    """Rows `ids` of a tensor, in that order; neighbours are read together."""
    if not len(ids):
        return source.read(name, 0, 0)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    if not len(breaks) and bool((order[:-1] < order[1:]).all()):
        return source.read(name, int(ordered[0]), int(ordered[-1]) + 1)
    starts, stops = ordered[np.append(0, breaks)], ordered[np.append(breaks, len(ordered)) - 1] + 1
    found = source.read_runs(name, [*zip(starts.tolist(), stops.tolist(), strict=True)])
    out = torch.empty_like(found)
    out[torch.from_numpy(order)] = found
    return out


def remap(
    sources: Sequence[Source],
    base: int | None,
    owned: Sequence[Mapping[str, int]],
    old_rows: Sequence[int],
    tensors: Sequence[str],
    ids: Mapping[str, int],
    rows: int,
) -> list[Source]:
    """Every source in the vocabulary `ids` (token -> row) of `rows` rows; those that are so already as they were.

    base: which source is the base. owned: each source's tokens and their rows, of `old_rows` in all.
    """
    places = np.fromiter(ids.values(), dtype=np.int64, count=len(ids))
    has_token = np.zeros(rows, dtype=bool)
    has_token[places] = True
    tables = []
    for tokens, count in zip(owned, old_rows, strict=True):
        own = np.full(rows, SPARE, dtype=np.int64)
        own[places] = np.fromiter((tokens.get(token, MISSING) for token in ids), dtype=np.int64, count=len(ids))
        free = np.ones(count, dtype=bool)
        free[list(tokens.values())] = False
        kept = np.flatnonzero(free[:rows] & ~has_token[: len(free[:rows])])
        own[kept] = kept
        tables.append(own)
    out: list[Source] = []
    for number, (source, own) in enumerate(zip(sources, tables, strict=True)):
        if len(own) == old_rows[number] and bool((own == np.arange(len(own))).all()):
            out.append(source)
            continue
        wanted = own == MISSING
        lenders = []
        if base is not None and base != number:
            lent = np.where(wanted, tables[base], MISSING)
            lenders.append((sources[base], lent))
            wanted &= lent < 0
        for other, table in enumerate(tables):
            if other not in (number, base):
                lenders.append((sources[other], np.where(wanted, table, MISSING)))
        lenders = [(lender, table) for lender, table in lenders if bool((table >= 0).any())]
        named = np.sort(np.fromiter(owned[number].values(), dtype=np.int64, count=len(owned[number])))
        out.append(Remapped(source, tensors, own, lenders, named))
    return out
