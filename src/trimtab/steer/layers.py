"""The decoder blocks of a model that is not ours: find them, read what they put out, tell the prompt from the answer.

A block is named by its number from 0, everywhere. States are read and edited through the same hook, on the block's
output, so a vector lands exactly where it was measured. (`output_hidden_states` has one entry more than there are
blocks, and its last one is after the final norm: counting from its end is a known source of vectors one block off.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.lm import LM

Where = Literal["all", "prompt", "response"]
Read = Literal["mean", "last"]
NAMES = ("layers", "h", "blocks", "block")
_known: WeakKeyDictionary[Any, dict[str, nn.ModuleList]] = WeakKeyDictionary()


def find_blocks(model: Any, path: str = "") -> nn.ModuleList:
    """The decoder blocks of a transformers model, in order.

    path: where they are ("model.layers"), for a model in which they are not found by themselves. Searched once a model.
    """
    known = _known.setdefault(model, {})
    if path not in known:
        known[path] = _search(model, path)
    return known[path]


def _search(model: Any, path: str) -> nn.ModuleList:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path:
        if path not in lists:
            raise UsageError(
                f"{type(model).__name__} has no list of blocks {path!r} (lists: {', '.join(lists) or 'none'})"
            )
        return lists[path]
    count = getattr(text_config(model), "num_hidden_layers", None)
    found = [module for name, module in lists.items() if name.split(".")[-1] in NAMES and len(module) == count]
    if len(found) != 1:
        raise UsageError(
            f"cannot tell which list holds the decoder blocks of {type(model).__name__} "
            f"(lists: {', '.join(lists) or 'none'}): give its path with the option blocks"
        )
    return found[0]


def text_config(model: Any) -> Any:
    """The language model's part of a model's config."""
    return model.config.get_text_config(decoder=True)


def block_width(model: Any) -> int:
    """Width of the residual stream. In OPT it may differ from that of the final hidden state."""
    return int(text_config(model).hidden_size)


def resolve_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Block numbers from 0, sorted; negative ones count from the end; none given: the middle third of `count`."""
    if not layers:
        first = min(round(count / 3), count - 1)
        return tuple(range(first, max(first + 1, round(2 * count / 3))))
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise UsageError(f"layer {wrong[0]} does not exist: the model has {count} blocks, 0 to {count - 1}")
    return tuple(sorted({layer % count for layer in layers}))


def edit_output(block: nn.Module, edit: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace a block's output [B, S, D] by `edit` of it, in every forward; returns the hook's handle."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return edit(output)
        return (edit(output[0]), *output[1:])

    return block.register_forward_hook(hook)


class Span:
    """Which positions of the running forward belong to the prompt, or to the answer.

    A forward with an empty key-value cache is the prompt, one with a filled cache the answer. The prompt's last
    position counts as "response": the first answer token is drawn from it, so "response" touches every state an answer
    token is drawn from and "prompt" reaches the answer only through the cache. Together they are "all". Pads are edited
    like their neighbours; no real position attends to them. A whole text scored in one forward counts as prompt (an `LM`
    scores prompt and answer in two).

    Install `pre_hook` on the backbone (with_kwargs=True), then `pick(edited, hidden)` inside blocks.
    """

    def __init__(self, where: Where):
        self.where = where
        self._mask: torch.Tensor | bool = where == "all"

    def pick(self, edited: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`edited` at the positions meant, `hidden` elsewhere; both [B, S, D]."""
        if isinstance(self._mask, bool):
            return edited if self._mask else hidden
        return torch.where(self._mask.to(hidden.device), edited, hidden)

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**kwargs, **bound}
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if cache is None and given.get("use_cache") is False:
            raise UsageError(
                f"positions={self.where} needs the key-value cache: without it prompt and answer look the same "
                "(set use_cache=True, or positions=all)"
            )
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._mask = self.where == "response"
            return
        tokens = given.get("input_ids")
        shape = tokens.shape if tokens is not None else given["inputs_embeds"].shape[:2]
        columns = torch.arange(shape[1])
        if mask is None:
            last = torch.full((shape[0],), shape[1] - 1)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            last = (mask.cpu().ne(0) * columns).amax(-1)
        else:
            raise UsageError(f"positions={self.where} needs a plain [B, T] attention mask (a static cache gives none)")
        response = (columns == last[:, None])[..., None]  # [B, S, 1]
        self._mask = response if self.where == "response" else ~response


@torch.no_grad()
def read_blocks(
    lm: LM, rows: Sequence[Sequence[int]], starts: Sequence[int], read: Read, blocks: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N, L, D] and their mean norms [N, L], float32 on the CPU: the output of each of the L blocks.

    rows: token ids. starts[i]: where the part that is read begins in row i; "mean" averages over it (norms too), "last"
    takes the row's last token. Raises `UsageError` for a row that is too long and for states that are not finite.
    """
    found = find_blocks(lm.model, blocks)
    states = torch.zeros(len(rows), len(found), block_width(lm.model))
    norms = torch.zeros(len(rows), len(found))
    limit = lm.context_length
    for number, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            raise UsageError(f"text {number} has {len(row)} tokens; {lm.name} has a context of {limit}: shorten it")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), lm.batch_rows):
        part = order[at : at + lm.batch_rows]
        lengths = torch.tensor([len(rows[i]) for i in part])
        width = int(lengths.max())
        first = lengths - 1 if read == "last" else torch.tensor([starts[i] for i in part])
        columns = torch.arange(width)
        weight = ((columns >= first[:, None]) & (columns < lengths[:, None])).float()
        weight = (weight / weight.sum(-1, keepdim=True)).to(lm.device)
        ids = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part], device=lm.device)
        mask = (columns < lengths[:, None]).to(lm.device, torch.long)
        seen: list[torch.Tensor] = []
        with watching(found, seen):
            lm.backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        for layer, hidden in enumerate(seen):
            states[part, layer] = torch.einsum("bs,bsd->bd", weight, hidden.float()).cpu()
            norms[part, layer] = (weight * hidden.float().norm(dim=-1)).sum(-1).cpu()
    bad = (~states.isfinite().all(-1)).any(0).nonzero()[:, 0].tolist()
    if bad:
        raise UsageError(
            f"block {bad[0]} of {lm.name} gives states that are not finite: load the model in float32 or bfloat16"
        )
    return states, norms


class watching:
    """Append every block's output [B, S, D] to a list, inside the `with` block."""

    def __init__(self, blocks: Iterable[nn.Module], seen: list[torch.Tensor]):
        self.blocks, self.seen = blocks, seen

    def __enter__(self) -> None:
        def keep(hidden: torch.Tensor) -> torch.Tensor:
            self.seen.append(hidden)
            return hidden

        self.handles = [edit_output(block, keep) for block in self.blocks]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
