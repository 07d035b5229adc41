"""Hidden states of every layer, pooled over the tokens of a text: one forward pass serves every probe.

Layer 0 is what enters the first block (the embeddings), layer l is the output of block l, layer L that of the last block
BEFORE the final norm (transformers' `hidden_states[-1]` is after it); `final` is the state after the final norm. Four
poolings are made in the same pass: the first token (often an attention sink), the last, the mean, and the mean weighted
by position (t / sum t, t = 1..T over the span). Pads are never seen: texts alone, in a batch, in any order give the same
states to rounding.

Nothing but pooled states is kept, in files of [n, L+1, D] float32 that are mapped, not read: memory does not grow with
the number of texts. Cost: the tokens of the texts, forwarded once through the backbone (no logits).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.policy import Cost
from trimtab.steer.layers import block_width, find_blocks

Pooling = Literal["first", "last", "mean", "weighted"]
POOLINGS: tuple[Pooling, ...] = ("first", "last", "mean", "weighted")
Array = npt.NDArray[np.float32]
Span = tuple[int, int]


@dataclass(frozen=True)
class States:
    """Pooled hidden states of n texts.

    layers    L + 1: the embeddings and L blocks
    counts    tokens in each span, [n]
    lengths   tokens in each text, [n]
    cache     whose folder it is; a temporary one goes with it
    """

    folder: Path
    layers: int
    counts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    cache: Cache

    def __len__(self) -> int:
        return len(self.counts)

    def pooled(self, pooling: Pooling, layer: int) -> Array:
        """[n, D] float32: one layer (0 to L; -1 is L) of every text."""
        if not -self.layers <= layer < self.layers:
            raise UsageError(f"layer {layer} does not exist: there are 0 (embeddings) to {self.layers - 1}")
        return np.array(np.load(self.folder / f"{pooling}.npy", mmap_mode="r")[:, layer])

    def final(self, pooling: Pooling) -> Array:
        """[n, D] float32: after the final norm."""
        return np.array(np.load(self.folder / f"final-{pooling}.npy", mmap_mode="r"))

    def norms(self) -> Array:
        """[n, L+1]: the mean norm of a token of the span."""
        return np.array(np.load(self.folder / "norms.npy", mmap_mode="r"))


def text_rows(lm: LM, texts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Token ids of texts. chat: as a user's message through the chat template (refused where there is none)."""
    if chat:
        if not getattr(lm.tokenizer, "chat_template", None):
            raise UsageError(f"{lm.name} has no chat template: measure it with the texts as they are (chat=false)")
        return lm.encode(list(texts))
    rows = [list(map(int, lm.tokenizer(text)["input_ids"])) for text in texts]
    for number, row in enumerate(rows):
        if len(row) > 1 and row[-1] in lm.eos_ids:
            del row[-1]
        if not row or not texts[number].strip():
            raise UsageError(f"text {number + 1} is empty")
    return rows


def char_spans(lm: LM, texts: Sequence[str], spans: Sequence[Span]) -> list[Span]:
    """Token spans of character spans [start, end) of texts as `text_rows(lm, texts)` encodes them.

    A token belongs to a span if it overlaps it. Needs a fast tokenizer.
    """
    out = []
    for number, (text, (start, end)) in enumerate(zip(texts, spans, strict=True)):
        offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        if not inside:
            raise UsageError(f"text {number + 1}: no token lies in characters {start} to {end} of {text[:60]!r}")
        out.append((inside[0], inside[-1] + 1))
    return out


def read_states(
    lm: LM,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Span] | None = None,
    *,
    control: Control | None = None,
    cache: Cache | None = None,
    meter: Cost | None = None,
    progress: Callable[[str], None] | None = None,
) -> States:
    """The states of token rows (see `text_rows`), pooled over token spans [start, end) (default: the whole row).

    control: the model is steered while it reads (such states are not cached). meter: charged unless the cache had them.
    Raises `UsageError` for rows that are empty or longer than the context, and for states that are not finite.
    """
    spans = list(spans) if spans is not None else [(0, len(row)) for row in rows]
    if not rows or len(spans) != len(rows):
        raise UsageError(f"states need texts, and one span each; got {len(rows)} and {len(spans)}")
    limit = lm.context_length
    for number, (row, (start, end)) in enumerate(zip(rows, spans, strict=True)):
        if limit is not None and len(row) > limit:
            raise UsageError(f"text {number + 1} has {len(row)} tokens; {lm.name} has a context of {limit}: shorten it")
        if not 0 <= start < end <= len(row):
            raise UsageError(f"text {number + 1}: there are no tokens {start} to {end} in its {len(row)}")
    keep = cache if cache is not None and control is None else Cache(None)
    dtype = str(lm.unembedding.dtype)
    key = fingerprint_of(lm.fingerprint, dtype, [list(row) for row in rows], [list(span) for span in spans])
    folder = keep.folder("states", key, lambda path: _fill(path, lm, rows, spans, control, meter, progress))
    about = json.loads((folder / "about.json").read_text())
    return States(folder, about["layers"], np.array(about["counts"]), np.array([len(row) for row in rows]), keep)


@torch.no_grad()
def _fill(
    folder: Path,
    lm: LM,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Span],
    control: Control | None,
    meter: Cost | None,
    progress: Callable[[str], None] | None,
) -> None:
    blocks = find_blocks(lm.model)
    shape = (len(rows), len(blocks) + 1, block_width(lm.model))
    shapes = dict.fromkeys(POOLINGS, shape) | {"norms": shape[:2]}
    shapes |= {f"final-{name}": (shape[0], lm.hidden_size) for name in POOLINGS}
    for name, one in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=one)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    step = max(1, min(64, lm.batch_rows))
    for at in range(0, len(order), step):
        part = order[at : at + step]
        # mapped for this batch alone: pages that stay mapped count as memory of the process
        files = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
        if progress is not None and at and at % (16 * step) == 0:
            progress(f"reading hidden states: {at} of {len(rows)} texts")
        batch = _Batch([rows[i] for i in part], [spans[i] for i in part], lm.device)
        with ExitStack() as stack:
            if control is not None:
                stack.enter_context(control.attached(lm.model))
            seen: dict[int, dict[str, torch.Tensor]] = {}

            def entered(_module: Any, args: Any, kwargs: Any, _batch: Any = batch, _seen: Any = seen) -> None:
                _seen[0] = _batch.pool(args[0] if args else kwargs["hidden_states"])

            def left(number: int, _batch: Any = batch, _seen: Any = seen) -> Callable[..., None]:
                def hook(_module: Any, _inputs: Any, output: Any) -> None:
                    _seen[number] = _batch.pool(output if isinstance(output, torch.Tensor) else output[0])

                return hook

            stack.callback(blocks[0].register_forward_pre_hook(entered, with_kwargs=True).remove)
            for number, block in enumerate(blocks, start=1):
                stack.callback(block.register_forward_hook(left(number)).remove)
            last = lm.backbone(
                input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False, return_dict=True
            ).last_hidden_state
        if meter is not None:
            meter.tokens[lm.name] = meter.tokens.get(lm.name, 0) + sum(len(rows[i]) for i in part)
        final = batch.pool(last)
        for name in POOLINGS:
            stacked = torch.stack([seen[layer][name] for layer in range(shape[1])], 1)  # [B, L+1, D]
            if not bool(stacked.isfinite().all()):
                raise UsageError(
                    f"{lm.name} has hidden states that are not numbers on text {part[0] + 1} or its neighbours: its "
                    "weights are damaged, or float16 overflows (load it in bfloat16 or float32)"
                )
            files[name][part], files[f"final-{name}"][part] = stacked.cpu().numpy(), final[name].cpu().numpy()
        files["norms"][part] = torch.stack([seen[layer]["norm"] for layer in range(shape[1])], 1).cpu().numpy()
    counts = [end - start for start, end in spans]
    (folder / "about.json").write_text(json.dumps({"layers": shape[1], "counts": counts}))


class _Batch:
    """Rows padded on the right, and the poolings over their spans."""

    def __init__(self, rows: Sequence[Sequence[int]], spans: Sequence[Span], device: torch.device) -> None:
        longest = max(map(len, rows))
        place = torch.arange(longest)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        starts, ends = (torch.tensor([span[side] for span in spans])[:, None] for side in (0, 1))
        self.tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        self.mask = (place < lengths).long().to(device)
        inside = ((place >= starts) & (place < ends)).float()
        rank = (place - starts + 1).float() * inside  # 1..T inside the span
        means = [weight / weight.sum(1, keepdim=True) for weight in (inside, rank)]
        self.weights = torch.stack(means, 1).to(device)  # [B, 2, T]: mean, weighted
        self.last, self.rows = (ends[:, 0] - 1).to(device), torch.arange(len(rows), device=device)

    def pool(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """hidden [B, T, D] -> each pooling [B, D], and "norm" [B], float32."""
        hidden = hidden.float()
        mean, weighted = torch.bmm(self.weights, hidden).unbind(1)
        norms = torch.linalg.vector_norm(hidden, dim=-1)  # [B, T]
        return {
            "first": hidden[:, 0],
            "last": hidden[self.rows, self.last],
            "mean": mean,
            "weighted": weighted,
            "norm": (self.weights[:, 0] * norms).sum(1),
        }
