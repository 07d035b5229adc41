"""Retrievers: which guidelines of a library concern an input (Guide-Align, arXiv 2403.11838, stages 1e and 2).

Every retriever has `scores(queries) -> [Q, L]` for the L lines it was made with; `search` takes the exact top n. No index
library: a matrix product and a sort serve some hundred thousand lines.

    Lexical    TF-IDF cosine; no training; nothing is returned for an input that shares no word with the library
    Embedded   cosine under an installed sentence embedder
    Trained    two encoders, score = q . c, trained by the masked contrastive loss below
    Shuffled   any lines, by the input and a seed: the control that separates content from a longer prompt
    Fixed      the first lines, for every input: hand-written principles

The loss (DPR, arXiv 2004.04906, with one repair). Of a batch of B (input, guideline) pairs every guideline, and every
negative given with them, is a candidate c_j of every input q_i:
    L = -(1/B) sum_i log( exp(q_i . c_i) / sum over j in {i} and not P_i of exp(q_i . c_j) )
P_i are the candidates that are guidelines of x_i too. DPR pushes them away; an input has several guidelines, and a
guideline several inputs, so they are common and are masked out here.

Departure: the paper's encoders are two BERTs. Ours are two linear maps on fixed features (hashed words, or the frozen
sentence embedder), which train in seconds on a CPU; both start as the same map, so before training the score is that of
the features.
"""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from trimtab.errors import UsageError
from trimtab.files import write_atomic
from trimtab.measure.coherence import Embedder, load_embedder
from trimtab.sampling import derive_seed

SEEN = 1 << 16  # buckets in which the words of the training inputs are remembered
SHARP = 20.0  # of the untrained score: cosines of unit features are too flat for a softmax
QUERIES = 256  # scored together
Found = list[tuple[int, float]]  # (row, score), best first


class Retriever(ABC):
    """What ranks the lines of a library for an input."""

    name: str

    @abstractmethod
    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        """[Q, L]: higher is closer; a line at -inf is never returned."""

    def unknown(self, query: str) -> float:
        """The share of the query's words that the retriever was not trained on; 0 where it was not trained."""
        return 0.0


def search(retriever: Retriever, queries: Sequence[str], n: int) -> list[Found]:
    """The `n` best rows of each query and their scores; equal scores keep the library's order."""
    out: list[Found] = []
    for first in range(0, len(queries), QUERIES):
        scores, rows = retriever.scores(queries[first : first + QUERIES]).sort(dim=1, descending=True, stable=True)
        for score, row in zip(scores[:, :n].tolist(), rows[:, :n].tolist(), strict=True):
            out.append([(at, value) for at, value in zip(row, score, strict=True) if value > -math.inf])
    return out


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Lexical(Retriever):
    """TF-IDF cosine over words, in (0, 1]; -inf where no word is shared. In a small library function words decide."""

    name = "tfidf"

    def __init__(self, lines: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
        self._matrix = self._vectorizer.fit_transform(lines)  # [L, W] sparse, unit rows

    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        dense = torch.from_numpy((self._vectorizer.transform(queries) @ self._matrix.T).toarray()).float()
        return dense.masked_fill(dense <= 0, -math.inf)


class Embedded(Retriever):
    """Cosine of sentence embeddings, in [-1, 1]."""

    def __init__(self, lines: Sequence[str], embedder: Embedder):
        self.name, self._embedder = f"embedder {embedder.name}", embedder
        self._lines = torch.from_numpy(embedder.embed(lines))  # [L, D]

    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(self._embedder.embed(queries)) @ self._lines.T


class Shuffled(Retriever):
    """The control: any lines, uniformly, by (seed, input). Scores are uniform in [0, 1)."""

    name = "random"

    def __init__(self, lines: Sequence[str], seed: int = 0):
        self._count, self._seed = len(lines), seed

    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        seeds = [derive_seed(self._seed, "guidelines", query) for query in queries]
        rows = [torch.rand(self._count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows) if rows else torch.empty(0, self._count)


class Fixed(Retriever):
    """The library's first lines for every input; scores fall from 1 to 0 by place."""

    name = "fixed"

    def __init__(self, lines: Sequence[str]):
        self._scores = torch.linspace(1, 0, len(lines))

    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        return self._scores.repeat(len(queries), 1)


# the trained one


class Features(Protocol):
    """Fixed features of texts, [N, size], rows of length 1 (0 for a text without a word)."""

    name: str
    size: int

    def __call__(self, texts: Sequence[str]) -> torch.Tensor: ...


class HashedWords:
    """Words by hash, each with a sign so that collisions cancel on average."""

    name = "words"

    def __init__(self, size: int = 4096):
        self.size = size

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        codes = [(row, zlib.crc32(word.encode())) for row, text in enumerate(texts) for word in words(text)]
        at = torch.tensor([row * self.size + code % self.size for row, code in codes], dtype=torch.long)
        signs = torch.tensor([1.0 if code >> 31 else -1.0 for _, code in codes])
        out = torch.zeros(len(texts) * self.size).index_add_(0, at, signs).view(len(texts), self.size)
        return F.normalize(out, dim=1)


class SentenceFeatures:
    """The embeddings of a frozen sentence embedder; each text is embedded once."""

    def __init__(self, embedder: Embedder):
        self.name, self._embedder = embedder.name, embedder
        self._known: dict[str, torch.Tensor] = {}
        self.size = len(self._vectors(["size"])[0])

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return self._vectors(texts)

    def _vectors(self, texts: Sequence[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, torch.from_numpy(self._embedder.embed(new)), strict=True))
        return torch.stack([self._known[text] for text in texts])


class TwoTower(nn.Module):
    """q = A f(input), c = B f(guideline), both [N, D]; A = B at the start. `seen` remembers training words by hash."""

    seen: torch.Tensor

    def __init__(self, features: Features, dim: int = 128, seed: int = 0):
        super().__init__()
        self.features = features
        start = torch.randn(dim, features.size, generator=torch.Generator().manual_seed(seed))
        start *= math.sqrt(SHARP / dim)  # E[q . c] = SHARP f(x) . f(c)
        self.query = nn.Parameter(start.clone())  # A [D, F]
        self.guideline = nn.Parameter(start.clone())  # B [D, F]
        self.register_buffer("seen", torch.zeros(SEEN, dtype=torch.bool))

    def queries(self, texts: Sequence[str]) -> torch.Tensor:
        return self.features(texts) @ self.query.T

    def guidelines(self, texts: Sequence[str]) -> torch.Tensor:
        return self.features(texts) @ self.guideline.T

    def save(self, path: str | Path) -> None:
        write_atomic(path, save(self.state_dict(), {"features": self.features.name}))

    @classmethod
    def load(cls, path: str | Path, embedder: Embedder | None = None) -> TwoTower:
        """embedder: the one it was trained on (default: the installed one), where it was not trained on words."""
        try:
            with safe_open(str(path), framework="pt") as file:
                name = (file.metadata() or {})["features"]
                tensors = {key: file.get_tensor(key) for key in ("query", "guideline", "seen")}
            dim, size = tensors["query"].shape
            tower = cls(_features(name, size, embedder), dim)
            tower.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UsageError(f"{path} is not a guideline retriever that trimtab saved ({error})") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise UsageError(f"the guideline retriever {path} has weights that are not finite numbers")
        return tower


class Trained(Retriever):
    """A trained `TwoTower` over the lines of a library, which need not be those it was trained with."""

    @torch.no_grad()
    def __init__(self, lines: Sequence[str], tower: TwoTower):
        self.name, self.tower = f"trained on {tower.features.name}", tower
        self._lines = tower.guidelines(lines)  # [L, D]

    @torch.no_grad()
    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        return self.tower.queries(queries) @ self._lines.T

    def unknown(self, query: str) -> float:
        codes = [zlib.crc32(word.encode()) % SEEN for word in words(query)]
        return 1 - float(self.tower.seen[codes].float().mean()) if codes else 0.0


@dataclass(frozen=True)
class RetrieverFit:
    """How a `TwoTower` is trained. The published configuration has batch 32 and 10 epochs; its rate suits a BERT."""

    dim: int = 128
    epochs: int = 10
    batch: int = 32
    lr: float = 1e-2
    mask: bool = True  # False: DPR's own loss, false negatives included
    hard_negatives: bool = False  # with each pair the best-ranked line that is no guideline of the input
    seed: int = 0


def contrastive_loss(
    queries: torch.Tensor, candidates: torch.Tensor, positive: torch.Tensor, masked: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of the module, a scalar. queries [B, D], candidates [C, D]; positive [B]: the column of each c_i.

    masked [B, C], bool: columns left out of a row's sum (never its positive).
    """
    scores = queries @ candidates.T  # [B, C]
    if masked is not None:
        scores = scores.masked_fill(masked, -math.inf)
    return F.cross_entropy(scores, positive)


def false_negatives(owners: Sequence[int], columns: Sequence[int], pairs: set[tuple[int, int]]) -> torch.Tensor:
    """[B, C]: column j holds a guideline of input owners[i] and is not the one that row i is trained on (column i)."""
    rows = [[(owner, column) in pairs for column in columns] for owner in owners]
    return torch.tensor(rows) & ~torch.eye(len(owners), len(columns), dtype=torch.bool)


def train(
    inputs: Sequence[str],
    lines: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    features: Features,
    fit: RetrieverFit = RetrieverFit(),
    progress: Callable[[str], None] | None = None,
) -> TwoTower:
    """A `TwoTower` from (row of an input, row of a line) pairs. UsageError where there are none."""
    if not pairs:
        raise UsageError(
            "a retriever is trained on inputs and the guidelines that were written for them, and none of these prompts is "
            "an input of this library: give the file of a trained one, or another retriever"
        )
    tower, true = TwoTower(features, fit.dim, fit.seed), set(pairs)
    for word in {word for text in inputs for word in words(text)}:
        tower.seen[zlib.crc32(word.encode()) % SEEN] = True
    generator = torch.Generator().manual_seed(fit.seed)
    optimiser = torch.optim.Adam(tower.parameters(), lr=fit.lr)
    hard = None
    for epoch in range(fit.epochs):
        if fit.hard_negatives:
            hard = _hard_negatives(tower, inputs, lines, true)
        total = 0.0
        for batch in torch.randperm(len(pairs), generator=generator).split(fit.batch):
            owners, columns = (list(part) for part in zip(*(pairs[i] for i in batch.tolist()), strict=True))
            if hard is not None:
                columns += [hard[owner] for owner in owners]
            masked = false_negatives(owners, columns, true) if fit.mask else None
            queries = tower.queries([inputs[i] for i in owners])
            loss = contrastive_loss(
                queries, tower.guidelines([lines[j] for j in columns]), torch.arange(len(owners)), masked
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(owners)
        if progress is not None:
            progress(f"guideline retriever, epoch {epoch + 1}/{fit.epochs}: loss {total / len(pairs):.4f}")
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def _hard_negatives(
    tower: TwoTower, inputs: Sequence[str], lines: Sequence[str], pairs: set[tuple[int, int]]
) -> list[int]:
    """For every input the best-ranked line that is not its own; any line where all are."""
    most = max(Counter(owner for owner, _ in pairs).values())
    found = search(Trained(lines, tower), inputs, most + 1)
    return [next((at for at, _ in rows if (i, at) not in pairs), rows[-1][0]) for i, rows in enumerate(found)]


def _features(name: str, size: int, embedder: Embedder | None) -> Features:
    if name == HashedWords.name:
        return HashedWords(size)
    embedder = embedder or load_embedder()
    if embedder is None or embedder.name != name:
        have = "none is installed" if embedder is None else f"this is {embedder.name!r}"
        raise UsageError(f"the retriever was trained on the embedder {name!r}, and {have}: give the folder of that one")
    return SentenceFeatures(embedder)
