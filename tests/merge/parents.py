"""What the tests of merging methods share: made-up changes of parents, merging by hand in parts, TIES' rule in plain Python.

`planted` is a merging problem whose answer is known. Three fine-tunes each learned a change on a third of the columns, and
have noise everywhere (outliers too, where asked for). A task only sees its own columns. `skill` is the mean over tasks of the
share of the loss that a merge takes away: 1 for the noiseless sum of what was learned, 0 for the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.merge.method import Method, Part, Place

SHAPES: list[tuple[int, ...]] = [(7,), (5, 3), (64, 33), (128, 64), (6, 1), (4, 3, 5), (), (300,)]


def changes(shape: Sequence[int], parents: int = 3, seed: int = 0, size: float = 0.1) -> list[Tensor]:
    """Normal random tensors, float32."""
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(tuple(shape), generator=generator) for _ in range(parents)]


def coarse(shape: Sequence[int], parents: int = 3, seed: int = 0) -> list[Tensor]:
    """Multiples of 1/64 from -1/8 to 1/8: sums are exact, and zeros, equal magnitudes and sums of 0 are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 9, tuple(shape), generator=generator) / 64 for _ in range(parents)]


def part_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Two numbers of rows to cut at, so that parts are many but not hundreds."""
    return (1, 3) if not shape or shape[0] <= 8 else (shape[0] // 2 + 1, shape[0] // 5)


def in_parts(
    method: Method, tensors: Sequence[Tensor], rows: int, weights: Sequence[float] | None = None, seed: int = 0
) -> Tensor:
    """The merge of parts of `rows` rows, put together; of the whole where the method asks for it."""
    shape = tuple(tensors[0].shape)
    place = Place("tensor", shape, tuple(weights or [1.0] * len(tensors)), seed)
    step = max(shape[0] if shape else 1, 1) if method.whole(place) or not shape else rows

    def parts() -> Iterator[Part]:
        if not shape:
            yield Part(place, 0, [tensor.clone() for tensor in tensors])
            return
        for row in range(0, shape[0], step):
            yield Part(place, row * math.prod(shape[1:]), [tensor[row : row + step].clone() for tensor in tensors])

    found = method.survey(parts)
    merged = [method.merge(part, found) for part in parts()]
    return torch.cat(merged) if shape else merged[0]


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A folder that merges: these tensors, of as many layers as their names say."""
    folder.mkdir(parents=True)
    layers = {name.split(".layers.")[1].split(".")[0] for name in tensors if ".layers." in name}
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up", "num_hidden_layers": len(layers)}))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def uniform(shape: Sequence[int], model: int, seed: int = 0, name: str = "tensor") -> Tensor:
    """The random numbers that a method sees for a whole tensor of parent `model`."""
    place = Place(name, tuple(shape), (1.0,) * (model + 1), seed)
    return Part(place, 0, [torch.empty(tuple(shape))] * (model + 1)).uniform(model)


def elected(entries: Sequence[float], weights: Sequence[float], normalize: bool) -> float:
    """TIES' rule for one entry of every parent's (trimmed) change."""
    weighted = [weight * entry for weight, entry in zip(weights, entries, strict=True)]
    sign = 1 if sum(weighted) >= 0 else -1
    agree = [i for i, one in enumerate(weighted) if one * sign > 0]
    divisor = sum(weights[i] for i in agree) if normalize else 1
    return sum(weighted[i] for i in agree) / (divisor or 1)


def elect_all(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """`elected`, entry by entry."""
    rows = zip(*(delta.flatten().tolist() for delta in deltas), strict=True)
    return torch.tensor([elected(row, weights, normalize) for row in rows]).view(deltas[0].shape)


ROWS, COLUMNS, NOISE = 24, 36, 0.3


def planted(seed: int, outliers: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """(what each of three fine-tunes changed, what it learned): [24, 36] each. See the module.

    outliers: of this share of its entries, all on other tasks' columns, a change is 30 times the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    third = COLUMNS // 3
    found, learned = [], []
    for task in range(3):
        own = torch.zeros(ROWS, COLUMNS)
        own[:, task * third : (task + 1) * third] = torch.randn(ROWS, third, generator=generator)
        noise = NOISE * torch.randn(ROWS, COLUMNS, generator=generator)
        wild = (torch.rand(ROWS, COLUMNS, generator=generator) < outliers * 1.5) & (own == 0)
        found.append(own + noise * torch.where(wild, 30.0, 1.0))
        learned.append(own)
    return found, learned


def skill(merged: Tensor, learned: Sequence[Tensor]) -> float:
    """The mean over tasks of 1 - loss(merged) / loss(base)."""
    return mean(1 - float(((merged - own)[:, own.any(0)] ** 2).sum() / (own**2).sum()) for own in learned)


def lower_bound(differences: Sequence[float]) -> float:
    """The lower end of the 95 % interval of the mean of 20 paired differences (t with 19 degrees of freedom)."""
    assert len(differences) == 20
    return mean(differences) - 2.093 * stdev(differences) / math.sqrt(20)


def gain(
    ours: Callable[[list[Tensor], int], Tensor], baseline: Callable[[list[Tensor], int], Tensor], **options: Any
) -> float:
    """The `lower_bound` of how much more skill `ours` has than `baseline` on 20 planted problems."""
    differences = []
    for seed in range(20):
        found, learned = planted(seed, **options)
        differences.append(skill(ours(found, seed), learned) - skill(baseline(found, seed), learned))
    return lower_bound(differences)


def disputed(seed: int, share: float = 0.1) -> tuple[list[Tensor], Tensor]:
    """(changes of three fine-tunes, what they agree on): each has the other sign at a random `share` of the entries."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(ROWS, COLUMNS, generator=generator)
    return [
        truth * torch.where(torch.rand(ROWS, COLUMNS, generator=generator) < share, -1.0, 1.0) for _ in range(3)
    ], truth


def cosine(one: Tensor, two: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0))
