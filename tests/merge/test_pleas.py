"""Merged modules: both parents where everything is apart, Git Re-Basin where nothing is, and everything between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import UsageError
from trimtab.merge.align.matching import match
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.permutation import Spec, apply
from trimtab.merge.pleas.layers import Batch
from trimtab.merge.pleas.pair import Pair
from trimtab.merge.pleas.pleas import PleasConfig, merge_modules


class Residual(nn.Module):
    """Stem, a block whose shortcut is the identity, one whose shortcut is a convolution, a depthwise one, a flat head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.one, self.one_norm, self.two = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.wide, self.wide_norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8 * 9, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = functional.relu(x + self.two(functional.relu(self.one_norm(self.one(x)))))
        x = functional.relu(self.depthwise(x))
        x = functional.relu(self.wide_norm(self.wide(x)) + self.shortcut(x))
        return self.head(self.drop(torch.flatten(x, 1)))


def mlp(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(12, 9),
        nn.GELU(),
        nn.Linear(9, classes),
    )


def make(kind: str, seed: int, classes: int = 5) -> nn.Module:
    """A random network; all biases, norm weights and batch statistics are random too."""
    torch.manual_seed(seed)
    model = mlp(classes) if kind == "mlp" else Residual(classes)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if "var" in name else tensor.uniform_(-1, 1)
    return model.eval()


def data(kind: str, rows: int = 400, seed: int = 9) -> Tensor:
    shape = (7,) if kind == "mlp" else (2, 5, 5)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def moved_copy(model: nn.Module, spec: Spec, seed: int = 3) -> nn.Module:
    """The same function with its units in another order."""
    other = copy.deepcopy(model)
    other.load_state_dict(apply(spec, spec.random(torch.Generator().manual_seed(seed)), model.state_dict()))
    return other


KINDS = ["mlp", "residual"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refit", [False, True])
def test_all_apart_computes_both_networks(kind: str, refit: bool) -> None:
    """Acceptance (1): A's features under A's head, B's under B's, for any weights; a shared head gives the mean (float32)."""
    a, b, x = make(kind, 0), make(kind, 1, classes=4), data(kind)
    pair = Pair(a, b, module_spec(a, x[:4]), x, PleasConfig(heads="separate"))
    assert pair.wide and not pair.held
    merged = pair.build(pair.budget.sizes, refit)
    torch.testing.assert_close(merged.task("a")(x), a(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.task("b")(x), b(x), rtol=1e-5, atol=1e-5)
    c = make(kind, 1)
    both = Pair(a, c, module_spec(a, x[:4]), x, PleasConfig()).build(pair.budget.sizes, refit)
    torch.testing.assert_close(both.model(x), (a(x) + c(x)) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["wm", "am"])
def test_a_permuted_copy_merges_into_the_original(kind: str, how: str) -> None:
    """Acceptance (2)."""
    a, x = make(kind, 0), data(kind)
    spec = module_spec(a, x[:4])
    b = moved_copy(a, spec)
    assert not torch.equal(next(a.parameters()), next(b.parameters()))
    merged = Pair(a, b, spec, x, PleasConfig(match=how, statistics=0)).build({})
    torch.testing.assert_close(merged.model(x), a(x), rtol=1e-4, atol=1e-4)
    assert max(one.fitted for one in merged.layers.values()) < 1e-8
    identity = Pair(a, b, spec, x, PleasConfig(statistics=0), permutations={}).build({})
    assert float((identity.model(x) - a(x)).detach().abs().max()) > 0.1  # without the permutation it is another network


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_apart_and_no_fit_is_git_re_basin_bit_for_bit(kind: str) -> None:
    """Acceptance (3)."""
    a, b, x = make(kind, 0), make(kind, 1), data(kind)
    spec = module_spec(a, x[:4])
    found = match(spec, a.state_dict(), b.state_dict(), seed=0).permutations
    moved = apply(spec, found, b.state_dict())
    merged = Pair(a, b, spec, x, PleasConfig(statistics=0)).build({}, refit=False).model.state_dict()
    for name, tensor in a.state_dict().items():
        expected = (tensor + moved[name]) / 2 if tensor.is_floating_point() else tensor
        assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["average", "separate"])
def test_between_the_extremes(kind: str, targets: str) -> None:
    """Zero blocks are zeros, every layer's training error falls, the multiply-adds are those of the entries that are not."""
    a, b, x = make(kind, 0), make(kind, 1), data(kind)
    pair = Pair(a, b, module_spec(a, x[:4]), x, PleasConfig(targets=targets))
    for budget in (1.0, 1.3, 1.6):
        merged = pair.merge(budget, "uniform")
        assert merged.ratio <= budget and merged.ratio > budget - 0.1
        assert all(one.fitted <= one.start * (1 + 1e-9) for one in merged.layers.values())
        assert sum(one.fitted < 0.9 * one.start for one in merged.layers.values()) >= 2
        assert merged.model(x).shape == (400, 5) and bool(merged.model(x).isfinite().all())
    if kind == "mlp":
        start = pair.build(merged.separate, refit=False).model
        counted = sum(int(layer.weight.count_nonzero()) for layer in merged.model if isinstance(layer, nn.Linear))
        biases = sum(layer.bias.numel() for layer in merged.model if isinstance(layer, nn.Linear))
        assert counted + biases == pair.budget.count(merged.separate)
        assert counted == sum(int(layer.weight.count_nonzero()) for layer in start if isinstance(layer, nn.Linear))


def test_multiply_adds_of_convolutions_are_those_counted_position_by_position() -> None:
    a, x = make("residual", 0), data("residual")
    pair = Pair(a, make("residual", 1), module_spec(a, x[:4]), x, PleasConfig())
    # positions 5 x 5, and 3 x 3 after the stride; biases once a position
    expected = 25 * (6 * 2 * 9 + 6 + 5 * 6 * 9 + 5 + 6 * 5 + 6 + 6 * 9 + 6) + 9 * (8 * 6 * 9 + 8 * 6 + 8) + 5 * 72 + 5
    assert pair.budget.base == expected
    assert pair.budget.count(pair.budget.sizes) == 2 * expected - 5


def test_batch_statistics_are_the_merged_models_own() -> None:
    a, b, x = make("residual", 0), make("residual", 1), data("residual", 256)
    spec = module_spec(a, x[:4])
    merged = merge_modules(a, b, spec, x, budget=1.0)
    assert merged.estimated == 1
    seen = []
    handle = merged.model.stem.register_forward_hook(lambda module, args, out: seen.append(out))
    merged.model(x)
    handle.remove()
    torch.testing.assert_close(merged.model.stem_norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    kept = merge_modules(a, b, spec, x, budget=1.0, statistics=0)
    assert kept.estimated == 0 and any("batch norms" in warning for warning in kept.warnings)


def test_dropout_is_off_while_collecting_and_modes_are_restored() -> None:
    a, b, x = make("mlp", 0), make("mlp", 1), data("mlp")
    spec = module_spec(a, x[:4])
    quiet = merge_modules(a, b, spec, x).model.state_dict()
    a.train()
    noisy = merge_modules(a, b, spec, x).model.state_dict()
    assert a.training and a[3].training and not b.training
    assert all(torch.equal(quiet[name], noisy[name]) for name in quiet)


def test_parents_are_left_as_they_are_and_the_same_seed_gives_the_same_bytes() -> None:
    a, b, x = make("residual", 0), make("residual", 1), data("residual")
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (a, b)]
    spec = module_spec(a, x[:4])
    first, second = (merge_modules(a, b, spec, x, budget=1.3, rows=300).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for model, old in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_do_not_fit_in_memory_together_are_done_in_turns() -> None:
    a, b, x = make("residual", 0), make("residual", 1), data("residual")
    spec = module_spec(a, x[:4])
    at_once = merge_modules(a, b, spec, x, budget=1.3, scheme="uniform").model.state_dict()
    in_turns = merge_modules(a, b, spec, x, budget=1.3, scheme="uniform", memory=1).model.state_dict()
    for name, tensor in at_once.items():
        torch.testing.assert_close(in_turns[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_group_under_a_layer_norm_is_held() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    torch.manual_seed(0)
    a, b, x = net(), net(), data("mlp")
    pair = Pair(a, b, module_spec(a, x[:4]), x, PleasConfig(scheme="uniform"))
    assert list(pair.held) == ["0"] and "LayerNorm" in pair.held["0"] and pair.wide == ["3"]
    merged = pair.merge(2.0)
    assert merged.model[0].out_features == 8 and merged.model[3].out_features == 12
    assert any("everything that can be kept apart" in warning for warning in merged.warnings)
    with pytest.raises(UsageError, match="group '0' cannot be widened: .*LayerNorm"):
        pair.build({"0": 3})


def test_gains_are_probed_on_all_domains_and_not_on_padding() -> None:
    a, b = make("mlp", 0), make("mlp", 1)
    one, two = data("mlp", 100).split(20), [part + 3.0 for part in data("mlp", 100, seed=8).split(20)]
    spec = module_spec(a, one[0])
    near = [
        pair.nearness(pair.build({}, refit=False))
        for inputs in ({"one": one, "two": two}, {"two": two, "one": one})
        for pair in [Pair(a, b, spec, inputs, PleasConfig(statistics=0))]
    ]
    assert near[0] == pytest.approx(near[1], rel=1e-9), "the first domain alone was looked at"
    batch = torch.cat([one[0], 100 * one[1]])
    keep = torch.arange(40) < 20
    padded = Pair(a, b, spec, [Batch((batch,), keep=keep)], PleasConfig(statistics=0))
    plain = Pair(a, b, spec, [one[0]], PleasConfig(statistics=0))
    found = [pair.nearness(pair.build({}, refit=False)) for pair in (padded, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_probed_gains_find_the_group_that_matters() -> None:
    """B's second layer is A's, permuted; its first is another: only keeping the first apart gains anything."""
    torch.manual_seed(0)
    a = nn.Sequential(
        nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)
    )
    x = data("mlp")
    spec = module_spec(a, x[:4])
    b = moved_copy(a, spec)
    nn.init.normal_(b[0].weight, std=1.0)
    pair = Pair(a, b, spec, x, PleasConfig(budget=1.3))
    gains = pair.gains()
    assert gains["0"] == max(gains.values()) and gains["0"] > 3 * gains["4"]
    found = pair.ratios(1.3)
    assert found["0"] == max(found.values())


def test_bad_input() -> None:
    a, x = make("mlp", 0), data("mlp")
    spec = module_spec(a, x[:4])
    with pytest.raises(UsageError, match="no inputs"):
        merge_modules(a, make("mlp", 1), spec, x[:0])
    with pytest.raises(UsageError, match="between 1 .* and 2"):
        merge_modules(a, make("mlp", 1), spec, x, budget=2.5)
    with pytest.raises(UsageError, match='other classes apart: heads="separate"'):
        merge_modules(a, make("mlp", 1, classes=4), spec, x)
    with pytest.raises(UsageError, match="'0.weight' has the shape"):
        merge_modules(a, nn.Sequential(nn.Linear(6, 12), *mlp()[1:]), spec, x)
    with pytest.raises(UsageError, match="only one of them has"):
        merge_modules(a, mlp()[:-1], spec, x)
    with pytest.raises(UsageError, match="8 rows cannot determine .* ridge above 0"):
        merge_modules(a, make("mlp", 1), spec, x[:8], ridge=0.0)
    few = merge_modules(a, make("mlp", 1), spec, x[:8])
    assert any("8 inputs for layers that read up to 12 values" in warning for warning in few.warnings)
    with pytest.raises(UsageError, match="ridge must be 0 or more"):
        PleasConfig(ridge=-1.0)
    broken = make("mlp", 1)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="B has weights that are not finite"):
        merge_modules(a, broken, spec, x)
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(UsageError, match="convolution in 2 groups"):
        merge_modules(grouped, copy.deepcopy(grouped), Spec(()), data("residual"))


def test_the_share_of_each_domain_is_said() -> None:
    a, b, x = make("mlp", 0), make("mlp", 1), data("mlp")
    spec = module_spec(a, x[:4])
    merged = merge_modules(a, b, spec, {"digits": x[:300], "letters": x[300:]})
    assert merged.shares == {"digits": 0.75, "letters": 0.25} and not merged.warnings
    lopsided = merge_modules(a, b, spec, {"digits": x[:380], "letters": x[380:]})
    assert any("nearly all of one domain (digits 95%, letters 5%)" in warning for warning in lopsided.warnings)
    single = merge_modules(a, b, spec, {"digits": x})
    assert any("all inputs are of one domain (digits)" in warning for warning in single.warnings)
