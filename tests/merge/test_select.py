"""The selection of the largest entries against a stable sort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from trimtab.merge import select
from trimtab.merge.select import NONE, Cut, largest, magnitude_bits


def kinds(count: int, seed: int) -> dict[str, Tensor]:
    """Tensors of every sort of ties: none, a few levels, differences of coarse numbers, constant, mostly zero."""
    chance = torch.Generator().manual_seed(seed)
    normal, other = (torch.randn(count, generator=chance) for _ in range(2))
    return {
        "normal": normal,
        "levels": torch.randint(-3, 4, (count,), generator=chance).float(),
        "bfloat16": normal.bfloat16().float() - (normal + 0.01 * other).bfloat16().float(),
        "constant": torch.full((count,), -0.5),
        "sparse": normal * (torch.rand(count, generator=chance) < 0.1),
        "rows": normal * torch.logspace(-6, 3, count),
        "steps": torch.arange(count) % 97 - 48.0,
        "tiny": normal * 1e-42,
    }


def sorted_choice(tensor: Tensor, k: int) -> Tensor:
    """The first k of a stable sort by magnitude, downwards."""
    found = torch.zeros(tensor.numel(), dtype=torch.bool)
    found[torch.argsort(tensor.abs().flatten(), descending=True, stable=True)[:k]] = True
    return found.view(tensor.shape)


def in_parts(tensors: Sequence[Tensor], step: int) -> Iterator[tuple[int, list[Tensor]]]:
    for start in range(0, len(tensors[0]), step):
        yield start, [tensor[start : start + step].clone() for tensor in tensors]


@pytest.mark.parametrize("sample", [16, 500, 1 << 15])
@pytest.mark.parametrize("count", [1, 2, 17, 5000])
def test_the_first_k_of_a_stable_sort_however_the_tensor_is_cut(
    monkeypatch: pytest.MonkeyPatch, sample: int, count: int
) -> None:
    """Exact. The small samples make bounds that miss, so that the search has to widen them."""
    monkeypatch.setattr(select, "SAMPLE", sample)
    tensors = [*kinds(count, seed=0).values()]
    for share in (0.0, 0.01, 0.3, 0.5, 0.97, 1.0):
        ks = [int(share * count) + (t % 3 == 0 and share < 1) for t in range(len(tensors))]
        wanted = [sorted_choice(tensor, k) for tensor, k in zip(tensors, ks, strict=True)]
        for step in (count, count // 3 + 1, 701):
            cuts = largest(lambda step=step: in_parts(tensors, step), ks, count)  # type: ignore[misc]
            for tensor, cut, expected in zip(tensors, cuts, wanted, strict=True):
                parts = [*in_parts([tensor], step)]
                assert torch.equal(torch.cat([cut(part, start) for start, [part] in parts]), expected)
                trimmed = torch.cat([cut.trim(part, start) for start, [part] in parts])
                assert torch.equal(trimmed, tensor * expected)


def test_float64_is_ordered_in_float64() -> None:
    """Magnitudes that are one number in float32."""
    tensor = 1 + torch.arange(100, dtype=torch.float64).flip(0) * 1e-12
    (cut,) = largest(lambda: in_parts([tensor], 33), [40], 100)
    assert torch.equal(cut(tensor), torch.arange(100) < 40)
    assert torch.equal(cut.trim(tensor) != 0, torch.arange(100) < 40)


def test_passes_are_few() -> None:
    """A sample, a count, and one as far as the last tie: what the speed of TIES rests on."""
    count = 1 << 19
    tensors = [kinds(count, seed=1)[name] for name in ("normal", "bfloat16", "rows")]
    begun = []

    def parts() -> Iterator[tuple[int, list[Tensor]]]:
        begun.append(True)
        return in_parts(tensors, 1 << 16)

    cuts = largest(parts, [count // 3] * 3, count)
    assert len(begun) <= 3
    assert [int(cut(tensor).sum()) for cut, tensor in zip(cuts, tensors, strict=True)] == [count // 3] * 3


def test_rows_in_step_with_the_sample_do_not_mislead_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 64th entry is large, and one in 64 is drawn."""
    monkeypatch.setattr(select, "SAMPLE", 1024)
    tensor = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    tensor[::64] *= 1000
    begun = []

    def parts() -> Iterator[tuple[int, list[Tensor]]]:
        begun.append(True)
        return in_parts([tensor], 1 << 12)

    (cut,) = largest(parts, [3000], 1 << 16)
    assert torch.equal(cut(tensor), sorted_choice(tensor, 3000)) and len(begun) == 2


def test_shapes_are_kept_and_nothing_or_all_may_pass() -> None:
    tensor = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert torch.equal(Cut(2.0)(tensor), torch.tensor([[False, False], [True, True]]))
    assert torch.equal(Cut(2.0, 2).trim(tensor), torch.tensor([[0.0, -2.0], [3.0, -4.0]]))
    assert Cut(-1.0).all and torch.equal(Cut(-1.0).trim(tensor), tensor)
    assert torch.equal(Cut(NONE).trim(tensor), torch.zeros(2, 2)) and not Cut(NONE)(tensor).any()
    # Level 0 with ties: zeros below the index are in; as values they are 0 either way.
    assert torch.equal(Cut(0.0, 1)(torch.zeros(3)), torch.tensor([True, False, False]))


def test_magnitude_bits_are_in_the_order_of_magnitudes() -> None:
    tensor = torch.tensor([0.0, -1e-45, 1e-30, -1.0, 1.5, -float("inf"), float("nan")])
    bits = magnitude_bits(tensor)
    assert torch.equal(bits, bits.sort().values) and bits[0] == 0
