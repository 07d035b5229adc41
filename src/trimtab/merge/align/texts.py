"""The loss of weights, given as tensors, on texts: for the path between two language models and for matching by texts.

    loss    mean over texts of a text's negative log-likelihood, in nats a token
    error   mean over texts of the share of tokens that are not the most likely one

One value a text, so that intervals resample texts. A text's first token is scored where the model has a token to put before
it; texts are cut at the context's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.merge.align.permutation import Group, Place, Spec

_RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX: in files, and in modules since transformers 5
Batch = tuple[Tensor, Tensor]  # ids [B, T] int64, padded on the right; mask [B, T] int64


class Names:
    """The names of a checkpoint's tensors in a torch module, which may add a prefix."""

    def __init__(self, names: Sequence[str], model: nn.Module, what: str) -> None:
        own = {name: tuple(value.shape) for name, value in model.named_parameters()}
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.of: dict[str, str] = {}
        for name in names:
            known = _RENAMED.get(name, name)
            found = [one for one in every if one == known or one.endswith(f".{known}")]
            exact = [one for one in found if one == known] or found
            if len(exact) == 1 and exact[0] in own:
                self.of[name] = exact[0]
            elif not exact and not _a_buffer(name, model):
                raise UsageError(
                    f"{what}: the tensor {name!r} of the file has no counterpart of that name in the loaded model: "
                    "save the model again with this version of transformers"
                )
        lacking = sorted(set(own) - set(self.of.values()))
        if lacking:
            raise UsageError(
                f"{what}: the loaded model has {lacking[0]!r}, which the file lacks: its loss is not known"
            )

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under the module's names, in float32."""
        return {name: tensors[key].to(torch.float32) for key, name in self.of.items()}

    def spec(self, spec: Spec) -> Spec:
        """The spec under the module's names; a head that is stored beside the embedding it is tied to is left out."""
        return Spec(
            tuple(
                Group(
                    group.name,
                    group.size,
                    tuple(
                        Place(self.of[place.tensor], place.axis, place.start, place.block)
                        for place in group.places
                        if place.tensor in self.of
                    ),
                    group.after,
                )
                for group in spec.groups
            )
        )


def _a_buffer(name: str, model: nn.Module) -> bool:
    return any(one == name or one.endswith(f".{name}") for one, _ in model.named_buffers()) or "inv_freq" in name


def encode(lm: Any, texts: Sequence[Any], batch: int) -> list[Batch]:
    """Batches of similar length; texts of fewer than two tokens are refused."""
    rows = []
    start = lm.tokenizer.bos_token_id
    for number, ids in enumerate(_rows(lm, texts)):
        if start is not None and ids[:1] != [start]:
            ids = [start, *ids]
        ids = ids if lm.context_length is None else ids[: lm.context_length]
        if len(ids) < 2:
            raise UsageError(f"text {number} has {len(ids)} token: a loss needs two or more")
        rows.append(ids)
    rows.sort(key=len)
    out = []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        longest = max(map(len, part))
        out.append(
            (
                torch.tensor([[*row, *[0] * (longest - len(row))] for row in part]),
                torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part]),
            )
        )
    return out


def _rows(lm: Any, texts: Sequence[Any]) -> list[list[int]]:
    return [
        list(lm.tokenizer(text if isinstance(text, str) else lm.render(text, number))["input_ids"])
        for number, text in enumerate(texts)
    ]


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V]."""
    logits: Tensor = model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
    return logits


class TextLoss:
    """Losses of weights (under the module's names) on batches of texts."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, list(batches)
        self.texts = sum(len(ids) for ids, _ in self.batches)
        self.tokens = sum(int(mask.sum()) for _, mask in self.batches)
        self.forwarded = 0
        self.seen: list[list[float]] = []  # the loss of every text, of each call of `evaluate`

    def logits(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        self.forwarded += int(batch[1].sum())
        values: Tensor = torch.func.functional_call(
            self.model,
            dict(tensors),
            (),
            {"input_ids": batch[0], "attention_mask": batch[1], "use_cache": False},
        ).logits
        return values.float()

    def each(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss [B], error [B]) of the batch's texts."""
        logits, (ids, mask) = self.logits(tensors, batch)[:, :-1], batch
        targets, seen = ids[:, 1:], mask[:, 1:].to(logits.dtype)
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        wrong = (logits.argmax(-1) != targets).to(logits.dtype)
        count = seen.sum(1)
        return (nll * seen).sum(1) / count, (wrong * seen).sum(1) / count

    def loss(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean over the batch's texts, with its gradient."""
        return self.each(tensors, batch)[0].mean()

    def evaluate(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """{"loss", "error"} over all texts."""
        with torch.no_grad():
            found = [self.each(tensors, batch) for batch in self.batches]
        losses, errors = (torch.cat(side).tolist() for side in zip(*found, strict=True))
        self.seen.append(losses)
        return {"loss": sum(losses) / len(losses), "error": sum(errors) / len(errors)}
