"""`Session`: a batch of growing sequences with a key-value cache that can fork, rewind and drop rows.

Rows are ragged and kept right-aligned: row i occupies the last `lengths[i]` columns of every buffer, so a sliding
attention window sees the same tokens as an unpadded row would. The final hidden state of every column is kept beside
the cache (a small fraction of its size), which makes `rewind` free: no token is forwarded again.

The cache is transformers' plain `DynamicCache` layout with room to grow: appending a token writes one column instead of
copying the cache. Sliding-window models get the full layout too (the mask does the sliding), so they can rewind.
Recurrent models cannot be rewound or left-padded; `Session` refuses them by name.

    session = lm.session(lm.encode(prompts))          # one prefill
    session = session.fork([0, 0, 0, 1, 1, 1])        # three candidates each, prefix shared
    session.append(torch.multinomial(session.logits.softmax(-1), 1)[:, 0])
    session.rewind(session.lengths - 1)               # rows may differ
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from trimtab.attention import additive
from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.policy import Cost

if TYPE_CHECKING:
    from trimtab.lm import LM

GROWTH = 64  # columns of head room whenever a buffer is enlarged
FORKED = 8  # columns of head room in a fork, which often lives for a few tokens only


class GrowingLayer(DynamicLayer):
    """One layer's keys and values with head room: [rows, heads, capacity, head_dim], `length` columns are used."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.rows = 0
        self.buffers: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if not self.buffers:
            states = (key_states, value_states)
            with torch.inference_mode(False):
                self.buffers = [state.new_empty((*state.shape[:2], 0, state.shape[3])) for state in states]
            self.rows, self.is_initialized = key_states.shape[0], True
            self.dtype, self.device = key_states.dtype, key_states.device
        end = self.length + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            with torch.inference_mode(False):  # buffers outlive the forward pass and are written outside of it
                self.buffers = [with_room(buffer, 2, self.length, end) for buffer in self.buffers]
        for buffer, state in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.length : end] = state
        self.length = end
        self.keys, self.values = (buffer[: self.rows, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def with_room(buffer: torch.Tensor, dim: int, used: int, needed: int) -> torch.Tensor:
    """`buffer` itself, or a larger copy of its first `used` columns along `dim`, so that `needed` columns fit."""
    if needed <= buffer.shape[dim]:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = needed + GROWTH
    larger = buffer.new_empty(shape)
    larger.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return larger


def _taken(buffer: torch.Tensor, rows: torch.Tensor, used: int) -> torch.Tensor:
    """Some rows of a cache's used columns with room for a few more, so that the first append copies nothing again."""
    with torch.inference_mode(False):
        out = buffer.new_empty((len(rows), buffer.shape[1], used + FORKED, buffer.shape[3]))
        torch.index_select(buffer[:, :, :used], 0, rows, out=out[:, :, :used])
    return out


class Session:
    """A batch of sequences being written by one model, optionally under a control.

    rows      number of live rows B
    lengths   [B] tokens in each row, prompt included (CPU)
    prompts   [B] tokens of each row's prompt (CPU)
    hidden    [B, D] final hidden state at each row's last position, before any edit
    edited    [B, D] the same after the control's edit (`hidden` itself without one)
    logits    [B, V] float32 logits for the next token, from `edited`
    base_logits [B, V] the same without the control; None where it edits inside the blocks (they are not computed then)
    tokens_forwarded   real tokens forwarded so far; a fork starts at 0, so that shared prefixes are counted once
    meter     the `Cost` that every forwarded token is charged to, under the model's name; forks share it
    """

    guided = False  # whether something besides the model shapes `logits` (see `guided.Guided`)

    def __init__(
        self, lm: LM, prompts: Sequence[Sequence[int]], control: Control | None = None, meter: Cost | None = None
    ):
        refuse_recurrent(lm.model)
        if not prompts:
            raise UsageError("a session needs at least one prompt")
        self.lm = lm
        self.inside, self.final = control.split() if control is not None else (None, None)
        self.cache = DynamicCache()
        self.cache.layers = []
        self.cache.layer_class_to_replicate = GrowingLayer
        # Inference mode is faster; a hook of somebody else's may want autograd.
        self._unhooked = not any(module._forward_hooks or module._forward_pre_hooks for module in lm.backbone.modules())
        self.rows = len(prompts)
        self.columns = 0
        self.lengths = torch.zeros(self.rows, dtype=torch.long)
        self.tokens_forwarded = 0
        self.meter = Cost() if meter is None else meter
        self._ids = torch.zeros(self.rows, 0, dtype=torch.long)
        self._states: torch.Tensor | None = None
        self._edited: torch.Tensor | None = None
        self.append(prompts)
        self.prompts = self.lengths.clone()

    # what the next token is drawn from

    @property
    def hidden(self) -> torch.Tensor:
        assert self._states is not None
        return self._states[: self.rows, self.columns - 1]

    @property
    def edited(self) -> torch.Tensor:
        if self._edited is None:
            hidden = self.hidden
            if self.final is not None:
                hidden = self.final.edit(hidden, self.lengths - self.prompts).to(hidden.dtype)
            self._edited = hidden
        return self._edited

    @property
    def logits(self) -> torch.Tensor:
        return self.lm.head(self.edited)

    @property
    def base_logits(self) -> torch.Tensor | None:
        return None if self.inside is not None else self.lm.head(self.hidden)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of every row, prompt included."""
        return [
            row[self.columns - length : self.columns].tolist()
            for row, length in zip(self._ids[: self.rows], self.lengths.tolist(), strict=True)
        ]

    @property
    def input_ids(self) -> torch.Tensor:
        """[B, columns] token ids, each row right-aligned; columns before a row's start repeat its first token."""
        ids = self._ids[: self.rows, : self.columns]
        start = (self.columns - self.lengths)[:, None]
        return ids.gather(1, torch.arange(self.columns)[None].maximum(start))

    def states(self, row: int) -> torch.Tensor:
        """Final hidden states of every token of one row, [lengths[row], D], before any edit."""
        assert self._states is not None
        return self._states[row, self.columns - int(self.lengths[row]) : self.columns]

    # growing, copying, cutting

    @torch.no_grad()
    def append(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> None:
        """Forward new tokens: a tensor [B] (one a row) or one list a row (lengths may differ, and may be 0)."""
        if isinstance(tokens, torch.Tensor):
            chunk, counts = tokens.cpu().reshape(-1, 1), torch.ones(len(tokens), dtype=torch.long)
        else:
            counts = torch.tensor([len(row) for row in tokens], dtype=torch.long)
            width = int(counts.max()) if len(counts) else 0
            chunk = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens])
        if len(chunk) != self.rows:
            raise UsageError(f"append got {len(chunk)} rows for a session of {self.rows}")
        limit = self.lm.context_length
        if limit is not None and int((self.lengths + counts).max()) > limit:
            raise UsageError(f"a row would grow to {int((self.lengths + counts).max())} tokens; the context is {limit}")
        if bool((self.lengths + counts == 0).any()):
            raise UsageError("a row needs at least one token")
        if not bool(counts.any()):
            return
        states = self._forward(chunk, counts)
        self._store(chunk, states)
        self.lengths = self.lengths + counts
        self.columns += chunk.shape[1]
        forwarded = int(counts.sum())
        self.tokens_forwarded += forwarded
        self.meter.tokens[self.lm.name] = self.meter.tokens.get(self.lm.name, 0) + forwarded
        self._edited = None
        if bool((counts < chunk.shape[1]).any()):
            self._realign(chunk.shape[1] - counts)

    def fork(self, rows: Sequence[int]) -> Session:
        """A new session whose row j copies row `rows[j]`; the two share nothing that is written afterwards."""
        index = torch.tensor(list(rows), dtype=torch.long)
        if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= self.rows:
            raise UsageError(f"fork needs row numbers from 0 to {self.rows - 1}")
        new = object.__new__(Session)
        new.lm, new.columns, new.rows = self.lm, self.columns, len(index)
        new.inside, new.final, new._unhooked = self.inside, self.final, self._unhooked
        new.lengths, new.prompts = self.lengths[index], self.prompts[index]
        new.tokens_forwarded, new.meter = 0, self.meter
        new._ids = self._ids[index, : self.columns]
        assert self._states is not None
        device = index.to(self._states.device)
        new._states = self._states[device, : self.columns]
        new._edited = None if self._edited is None else self._edited[device]
        new.cache = DynamicCache()
        new.cache.layer_class_to_replicate = GrowingLayer
        new.cache.layers = []
        for layer in self._layers():
            copy = GrowingLayer()
            if layer.buffers:
                copy.buffers = [_taken(buffer, index.to(buffer.device), layer.length) for buffer in layer.buffers]
                copy.length, copy.rows, copy.is_initialized = layer.length, len(index), True
                copy.keys, copy.values = (buffer[:, :, : layer.length] for buffer in copy.buffers)
            new.cache.layers.append(copy)
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove rows in place (finished ones cost nothing from here on). Returns, for each new row, its old number.

        The last rows fill the gaps, so only as many rows are copied as are dropped.
        """
        gone = set(rows)
        if not gone <= set(range(self.rows)):
            raise UsageError(f"drop needs row numbers from 0 to {self.rows - 1}")
        keep = [row for row in range(self.rows) if row not in gone]
        count = len(keep)
        spare = [row for row in keep if row >= count]
        order = [row if row not in gone else spare.pop() for row in range(count)]
        moves = [(new, old) for new, old in enumerate(order) if new != old]
        edited = self._edited
        if moves:
            to, source = (torch.tensor(side) for side in zip(*moves, strict=True))
            self._ids[to] = self._ids[source]
            self.lengths[to], self.prompts[to] = self.lengths[source], self.prompts[source]
            assert self._states is not None
            for tensor in (self._states, *(buffer for layer in self._layers() for buffer in layer.buffers)):
                tensor[to.to(tensor.device)] = tensor[source.to(tensor.device)]
        self.rows = count
        self.lengths, self.prompts = self.lengths[:count], self.prompts[:count]
        self._edited = None if edited is None else edited[torch.tensor(order, dtype=torch.long, device=edited.device)]
        for layer in self._layers():
            layer.rows = count
        return order

    def rewind(self, lengths: torch.Tensor | Sequence[int]) -> None:
        """Cut every row back to its first `lengths[i]` tokens (1 <= lengths[i] <= current). Nothing is forwarded."""
        target = torch.as_tensor(lengths, dtype=torch.long)
        if target.shape != self.lengths.shape or bool((target > self.lengths).any() or (target < 1).any()):
            raise UsageError(f"rewind needs {self.rows} lengths from 1 to the current {self.lengths.tolist()}")
        cut = self.lengths - target
        if not bool(cut.any()):
            return
        self.lengths = target
        self.prompts = torch.minimum(self.prompts, target)
        self._edited = None
        if bool((cut == cut[0]).all()):
            self.columns -= int(cut[0])
            for layer in self._layers():
                layer.length = self.columns
        else:
            self._realign(cut)

    # inside

    def _layers(self) -> list[GrowingLayer]:
        return self.cache.layers  # type: ignore[return-value]

    def _forward(self, chunk: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, S, D] of a left-aligned chunk that follows what is cached."""
        device, width = self.lm.device, chunk.shape[1]
        full = bool((counts == width).all())
        mask: torch.Tensor | None = None
        if not full or int(self.lengths.min()) < self.columns:
            columns = torch.arange(self.columns + width)
            seen = columns >= (self.columns - self.lengths)[:, None]
            mask = (seen if full else seen & (columns < (self.columns + counts)[:, None])).to(device)
            if width == 1 and self.lm.takes_ready_mask:
                mask = additive(mask[:, None, None], self.lm.unembedding.dtype)
        elif width == 1 and self.lm.takes_ready_mask:
            mask = self.lm.unembedding.new_zeros(
                1, 1, 1, self.columns + 1
            )  # cheaper than letting the model find that out
        positions = self.lengths[:, None]
        if width > 1:
            positions = positions + torch.arange(width).minimum(counts[:, None] - 1).clamp(min=0)
        arguments: dict[str, Any] = {
            "input_ids": chunk.to(device),
            "attention_mask": mask,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self.lm.takes_position_ids:
            arguments["position_ids"] = positions.to(device)
        if self.inside is None:
            with torch.inference_mode(self._unhooked):
                return self.lm.backbone(**arguments).last_hidden_state
        with self.inside.attached(self.lm.model, positions="all"):
            return self.lm.backbone(**arguments).last_hidden_state

    def _store(self, chunk: torch.Tensor, states: torch.Tensor) -> None:
        end = self.columns + chunk.shape[1]
        if self._states is None:
            self._states = states.new_empty((self.rows, 0, states.shape[-1]))
        self._states = with_room(self._states, 1, self.columns, end)
        self._ids = with_room(self._ids, 1, self.columns, end)
        self._states[: self.rows, self.columns : end] = states
        self._ids[: self.rows, self.columns : end] = chunk

    def _realign(self, dropped: torch.Tensor) -> None:
        """Shift row i right by `dropped[i]` columns (its last ones are discarded) and cut columns nobody uses."""
        width = int(self.lengths.max())
        source = (torch.arange(width) - width + self.columns)[None] - dropped[:, None]
        source = source.clamp(min=0)
        rows = torch.arange(self.rows)[:, None]
        self._ids = self._ids[rows, source]
        assert self._states is not None
        where = source.to(self._states.device)
        index = rows.to(where.device)
        self._states = self._states[index, where]
        for layer in self._layers():
            if layer.buffers:
                layer.buffers = [
                    buffer[: self.rows].gather(
                        2, where[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
                    )
                    for buffer in layer.buffers
                ]
                layer.length = width
                layer.keys, layer.values = layer.buffers
        self.columns = width


def refuse_recurrent(model: Any) -> None:
    """Recurrent states (Mamba, RWKV, linear attention) cannot be rewound, forked by column or left-padded."""
    name = type(model).__name__
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    takes_cache = "past_key_values" in inspect.signature(model.base_model.forward).parameters
    if getattr(model, "_is_stateful", False) or kinds or not takes_cache:
        raise UsageError(
            f"{name} keeps a recurrent state, which cannot be rewound or left-padded: a session needs attention"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"{name} is an encoder-decoder; trimtab steers decoder-only language models")
