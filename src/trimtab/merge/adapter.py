"""A LoRA adapter as a parent: its base with the low-rank changes added as rows are read.

    W = W_0 + s B A        s = alpha / r, or alpha / sqrt(r) (rsLoRA); A [r, in], B [out, r]
    W = W_0 + s (B A)^T    for embeddings, and for layers that store [in, out] (GPT-2's Conv1D)

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. Reads what peft writes (adapter_config.json
and adapter_model.safetensors), biases and modules saved whole included, and equals its `merge_and_unload`, but for rounding:
peft rounds to the base's dtype, this hands on the sum in float64, so that no rounding swallows small changes before they are
merged.

What is more than a sum (DoRA, PiSSA's residual bases, other kinds of peft) is refused: fold it with peft first.

Cost: r multiplications an entry, each time it is read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.merge.heads import embedding_of, head_of, set_setting, tied
from trimtab.merge.source import ALONE, INDEX, Entry, Folder, Source, Stored, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOLD = "fold it with peft (merge_and_unload), save the model and merge that"
# Options of a LoRA that change more than the sum above.
BEYOND = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Beginnings that leave the base as it is; the others (pissa, olora, corda, loftq, ...) subtract theirs from it.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # models whose layers store [in, out]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(path)
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (ALONE, INDEX))


def open_source(path: str | Path, base: Source | None = None) -> Source:
    """A model folder; an adapter on `base` (None: on the one that it names, where that is a folder here); MODEL+ADAPTER."""
    model, plus, adapter = str(path).rpartition("+")
    if plus and model and is_adapter(adapter) and not Path(path).exists():  # mergekit's way to write it
        source = Adapter(adapter, Folder(model))
        source.name = str(path)
        return source
    return Adapter(path, base) if is_adapter(path) else Folder(path)


class _Low(NamedTuple):
    """A low-rank change: the names of its factors, its factor s, whether the stored tensor is (B A)^T."""

    a: str
    b: str
    scale: float
    across: bool


class Adapter(Source):
    """See the module. note: what the user should know of its base, or ""."""

    def __init__(self, path: str | Path, base: Source | None = None) -> None:
        self.name = str(path)
        folder = Path(path)
        self.options = read_json(folder / CONFIG, self.name)
        self._refuse()
        if not (folder / WEIGHTS).is_file():
            raise UsageError(f"the adapter {self.name!r} has no {WEIGHTS}: save it as safetensors")
        self.base, self.note = self._base(base)
        self.weights = Stored(self.name, folder, {}, [folder / WEIGHTS])
        self.folder = folder if any((folder / name).is_file() for name in TOKENIZERS) else self.base.folder
        self.config = dict(self.base.config)
        self._whole: dict[str, str] = {}  # tensor -> what replaces it
        self._low: dict[str, _Low] = {}
        self._left_out: set[str] = set()
        self._sort()
        entries = {**self.base.entries, **{name: self._replacing(name) for name in self._whole}}
        self.entries = entries
        self._check()
        self.entries = {name: entry for name, entry in entries.items() if name not in self._left_out}

    def _refuse(self) -> None:
        kind = self.options.get("peft_type")
        if kind != "LORA":
            raise UsageError(f"the adapter {self.name!r} is of the kind {kind!r}, not LORA: {FOLD}")
        for key in BEYOND:
            if self.options.get(key):
                raise UsageError(f"the adapter {self.name!r} uses {key}, which is more than a LoRA's sum: {FOLD}")
        begin = self.options.get("init_lora_weights", True)
        if begin not in BEGINNINGS:
            raise UsageError(f"the adapter {self.name!r} began as {begin!r}, which changes its base too: {FOLD}")

    def _base(self, given: Source | None) -> tuple[Source, str]:
        named = str(self.options.get("base_model_name_or_path") or "")
        here = bool(named) and (named.startswith("pocket/") or (Path(named) / "config.json").is_file())
        if given is None:
            if not here:
                raise UsageError(
                    f"the adapter {self.name!r} was trained on {named!r}, which is no folder here: give --base"
                )
            return Folder(named), ""
        if not here or Path(named).resolve() == given.folder.resolve():
            return given, ""
        try:
            same = Folder(named).fingerprint == given.fingerprint
        except UsageError:  # it is not needed
            same = False
        return given, "" if same else f"the adapter {self.name!r} was trained on {named!r} and is put on {given.name!r}"

    def _sort(self) -> None:
        """Finds out what each stored tensor changes."""
        factors: dict[str, dict[str, str]] = {}
        for key in self.weights.entries:
            name = key.removeprefix("base_model.model.")
            low = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)", name)
            if low:
                factors.setdefault(low[1], {})[low[3]] = key
            elif ".lora_" in name or not re.search(r"\.(weight|bias)$", name):
                raise UsageError(f"the adapter {self.name!r} holds {key!r}, which is no part of a plain LoRA: {FOLD}")
            else:
                self._whole[self._known(re.sub(r"\.(base_layer|modules_to_save)\.", ".", name))] = key
        across = self._across(factors)
        for module, pair in factors.items():
            if set(pair) != {"A", "B"}:
                raise UsageError(f"the adapter {self.name!r} has only one of the two factors of {module!r}: {FOLD}")
            name = self._known(f"{module}.weight")
            rank = self.weights.entries[pair["B"]].shape[-1:] or (1,)
            alpha = _pattern(self.options.get("alpha_pattern") or {}, module, self.options.get("lora_alpha", 8))
            scale = alpha / (math.sqrt(rank[0]) if self.options.get("use_rslora") else rank[0])
            embedding = pair["A"].endswith("lora_embedding_A")
            self._low[name] = _Low(pair["A"], pair["B"], scale, embedding or across)

    def _across(self, factors: dict[str, dict[str, str]]) -> bool:
        """Whether this model's layers store [in, out]: as any of another shape shows, or as the config says."""
        for module, pair in factors.items():
            entry = self.base.entries.get(self._known(f"{module}.weight"))
            if (
                entry is None
                or len(entry.shape) != 2
                or entry.shape[0] == entry.shape[1]
                or "lora_A" not in pair.get("A", "")
            ):
                continue
            return entry.shape[0] == self.weights.entries[pair["A"]].shape[-1]
        return bool(self.options.get("fan_in_fan_out")) or self.config.get("model_type") in CONV1D

    def _known(self, name: str) -> str:
        """A module's tensor as the base's files call it (they may leave the outermost module's name away, or add it)."""
        entries = self.base.entries
        outer = sorted({entry.partition(".")[0] for entry in entries})
        for guess in (name, name.partition(".")[2], *(f"{one}.{name}" for one in outer)):
            if guess in entries:
                return guess
        return name

    def _check(self) -> None:
        """UsageError for what does not fit the base. Takes in a vocabulary that grew with the adapter."""
        base = self.base.entries
        embedding, head = embedding_of(base), head_of(base)
        if tied(self.base) and embedding is not None:
            self._check_tied(embedding, head)
        grown = {name for name in (embedding, head) if name in self._whole}
        for name in sorted({*self._whole, *self._low}):
            if name not in base:
                raise UsageError(
                    f"the adapter {self.name!r} changes {name!r}, which {self.base.name!r} lacks: give the --base it was "
                    "trained on"
                )
            shape = self.entries[name].shape
            needed = base[name].shape if name not in grown else (*shape[:1], *base[name].shape[1:])
            if shape != needed:
                raise self._misfit(name, shape)
            low = self._low.get(name)
            if low is None:
                continue
            a, b = self.weights.entries[low.a].shape, self.weights.entries[low.b].shape
            product = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else ()
            if (product[::-1] if low.across else product) != shape or len(shape) != 2:
                raise self._misfit(name, product)
        if embedding is not None and embedding in self._whole:
            set_setting(self.config, "vocab_size", self.entries[embedding].shape[0])

    def _check_tied(self, embedding: str, head: str | None) -> None:
        """A head that is the embeddings cannot change alone; a saved copy of them both is left out."""
        alone = head if head is not None else "lm_head.weight"
        both = alone in self._whole and embedding in self._whole
        if both and torch.equal(*(self.weights.read(self._whole[name]) for name in (alone, embedding))):
            del self._whole[alone]
            self._left_out.add(alone)
            if not {alone, embedding} & self._low.keys():
                return
        if {alone, embedding} & {*self._whole, *self._low}:
            raise UsageError(
                f"the adapter {self.name!r} changes the head or the embeddings of {self.base.name!r}, where they are one: "
                f"{FOLD}"
            )

    def _replacing(self, name: str) -> Entry:
        """The entry of a tensor that is saved whole: of the base's dtype, as the others are."""
        saved = self.weights.entries[self._whole[name]]
        return Entry(self.base.entries[name].dtype if name in self.base.entries else saved.dtype, saved.shape)

    def _misfit(self, name: str, shape: Iterable[int]) -> UsageError:
        return UsageError(
            f"the adapter {self.name!r} changes {name!r} by the shape {tuple(shape)}, but {self.base.name!r} has "
            f"{self.base.entries[name].shape}: give the --base it was trained on"
        )

    def read_runs(self, name: str, runs: Sequence[tuple[int, int]]) -> Tensor:
        changed = name in self._whole or name in self._low
        return super().read_runs(name, runs) if changed else self.base.read_runs(name, runs)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        rows = (
            self.weights.read(self._whole[name], start, stop)
            if name in self._whole
            else self.base.read(name, start, stop)
        )
        low = self._low.get(name)
        if low is None:
            return rows
        # Added up in float64: a float32 sum would bury a small change of low rank in noise of full rank.
        work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        stop = start + len(rows)
        if low.across:
            left, right = self.weights.read(low.a)[:, start:stop].T, self.weights.read(low.b).T
        else:
            left, right = self.weights.read(low.b, start, stop), self.weights.read(low.a)
        return rows.to(torch.float64).add_(left.to(work) @ right.to(work), alpha=low.scale)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        scales = sorted((name, low.scale) for name, low in self._low.items())
        words = f"{self.base.fingerprint} {self.weights.fingerprint} {scales}"
        return hashlib.sha256(words.encode()).hexdigest()[:16]


def _pattern(patterns: dict[str, Any], module: str, otherwise: float) -> float:
    """peft's rule: the first key that the module's name, or its end after a dot, matches."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(otherwise)
