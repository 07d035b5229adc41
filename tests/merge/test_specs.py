"""Specs of language models and torch modules: randomly permuted, each computes what it did; wrong specs do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import ARCHITECTURES, tiny_model
from trimtab.errors import UsageError
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.permutation import Group, Place, Spec, apply, verify
from trimtab.merge.align.specs import model_spec

# Weights and sums are float64, but the norms and rotary positions of these models work in float32.
ROUNDING = 1e-5
IDS = torch.randint(4, 59, (3, 17), generator=torch.Generator().manual_seed(0))


def parts(arch: str, **config: Any) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """(config, tensors, tensors -> logits)."""
    model = tiny_model(arch, **config).double()
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    return model.config.to_dict(), tensors, lambda moved: torch.func.functional_call(model, moved, (IDS,)).logits


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_permuted_language_model_computes_what_it_did(arch: str, residual: bool) -> None:
    config, tensors, logits = parts(arch)
    spec = model_spec(config, shapes(tensors), residual)
    assert verify(spec, tensors, logits) < ROUNDING
    moved = apply(spec, spec.random(torch.Generator().manual_seed(0)), tensors)
    touched = {name for name in tensors if not torch.equal(moved[name], tensors[name])}
    assert "layers.1.ffn" in {group.name for group in spec.groups}
    if residual:  # all but norms within heads, biases a token, and OPT's narrower embedding
        words = ("q_norm", "k_norm", "lm_head.bias", "embed_tokens", "_proj.bias")
        assert all(any(word in name for word in words) for name in tensors if name not in touched)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tied: bool, residual: bool) -> None:
    config, tensors, logits = parts("llama", tied=tied)
    assert ("lm_head.weight" in tensors) is not tied
    assert verify(model_spec(config, shapes(tensors), residual), tensors, logits) < ROUNDING


def test_grouped_queries_have_groups_within_their_block() -> None:
    config, tensors, _ = parts("llama")
    spec = model_spec(config, shapes(tensors))
    heads = next(group for group in spec.groups if group.name == "layers.0.heads")
    assert heads.size == 2 and [one.name for one in spec.within(heads)] == [
        "layers.0.heads.0.q", "layers.0.heads.0.v", "layers.0.heads.1.q", "layers.0.heads.1.v",
    ]  # fmt: skip
    assert Place("model.layers.0.self_attn.q_proj.weight", 0, 0, 16) in heads.places  # 2 query heads of 8
    assert Place("model.layers.0.self_attn.k_proj.weight", 0, 0, 8) in heads.places


def test_the_head_of_a_value_is_seen_by_all_its_query_heads() -> None:
    config, tensors, logits = parts("llama")
    spec = model_spec(config, shapes(tensors))
    whole = next(group for group in spec.groups if group.name == "layers.0.heads.1.v")
    assert verify(Spec((whole,)), tensors, logits) < ROUNDING
    half = Group("half", whole.size, whole.places[:-1], "")
    assert verify(Spec((half,)), tensors, logits) > 1e-3


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_spec_that_permutes_rotated_dimensions_fails(arch: str) -> None:
    config, tensors, logits = parts(arch)
    dim = config["head_dim"] if arch == "qwen3" else 8
    at = "model.layers.0.self_attn"
    places = [Place(f"{at}.q_proj.weight", 0, head * dim) for head in range(2)] + [Place(f"{at}.k_proj.weight", 0)]
    wrong = Spec((Group("layers.0.heads.0.qk", dim, tuple(places)),))
    assert verify(wrong, tensors, logits) > 1e-3
    with pytest.raises(UsageError, match=r"\(RoPE\).*cannot be permuted"):
        model_spec(config, shapes(tensors), query_key=True)


def test_without_rotary_positions_queries_and_keys_move_together() -> None:
    config, tensors, logits = parts("gpt2")
    spec = model_spec(config, shapes(tensors))
    group = next(one for one in spec.groups if one.name == "layers.1.heads.2.qk")
    assert verify(Spec((group,)), tensors, logits) < ROUNDING
    assert verify(Spec((Group("q alone", group.size, group.places[:2]),)), tensors, logits) > 1e-3
    assert not any(one.name.endswith(".qk") for one in model_spec(config, shapes(tensors), query_key=False).groups)


def test_the_older_names_of_a_gpt2_checkpoint_are_known() -> None:
    config, tensors, _ = parts("gpt2")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    spec = model_spec(config, {**shapes(bare), "h.0.attn.bias": (1, 1, 64, 64)}, residual=True)
    assert spec.groups[0].places[0].tensor == "h.0.mlp.c_fc.weight"


def test_what_is_not_known_is_refused_by_name() -> None:
    config, tensors, _ = parts("llama")
    known = shapes(tensors)
    with pytest.raises(UsageError, match="'mamba' model may be permuted .known: gemma, .*--spec FILE.json"):
        model_spec({**config, "model_type": "mamba"}, known)
    with pytest.raises(UsageError, match=r"'model.layers.0.mlp.experts.0.up_proj.weight'.*--spec"):
        model_spec(config, {**known, "model.layers.0.mlp.experts.0.up_proj.weight": (4, 4)})
    with pytest.raises(
        UsageError, match=r"what 'model.value_head.weight' does to it is not known; leave --residual out"
    ):
        model_spec(config, {**known, "model.value_head.weight": (1, 32)}, residual=True)
    model_spec(config, {**known, "model.value_head.weight": (1, 32)})  # the stream stays, and so does its reader
    with pytest.raises(UsageError, match="lacks hidden_size"):
        model_spec({"model_type": "llama"}, known)


# Torch modules


def mlp(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), norm(16), nn.ReLU(), nn.Linear(16, 12), norm(12), nn.Tanh(), nn.Linear(12, 3)
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 + (inputs != outputs), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 10), Block(10, 10))
        self.head = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.bn(self.stem(x)))).flatten(1))


def example(kind: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"batch norm": lambda: mlp(nn.BatchNorm1d), "layer norm": lambda: mlp(nn.LayerNorm), "resnet": ResNet}
        model = models[kind]()
        for value in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            value.data += 0.3 * torch.rand_like(value)
        return model.eval(), torch.randn((6, 3, 8, 8) if kind == "resnet" else (6, 8))


@pytest.mark.parametrize("kind", ["batch norm", "layer norm", "resnet"])
def test_the_spec_of_a_module_is_found_and_right(kind: str) -> None:
    model, inputs = example(kind)
    spec = module_spec(model, inputs)
    tensors = dict(model.state_dict())
    assert verify(spec, tensors, lambda moved: torch.func.functional_call(model, moved, (inputs,)), seed=5) < ROUNDING
    if kind == "resnet":
        assert sorted(group.size for group in spec.groups) == [6, 6, 10, 10, 10]
        last = next(group for group in spec.groups if Place("head.weight", 1, 0, 16) in group.places)
        assert {place.tensor for place in last.places} >= {
            "blocks.1.shortcut.0.weight",
            "blocks.1.bn2.running_var",
            "blocks.2.conv1.weight",
        }
    else:
        assert [group.size for group in spec.groups] == [16, 12]
        assert Place("1.weight", 0) in spec.groups[0].places and Place("6.weight", 1) in spec.groups[1].places


def test_a_layer_that_is_used_twice_keeps_one_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.last(torch.relu(self.again(torch.relu(self.again(hidden)))))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        (group,) = module_spec(Twice(), torch.randn(3, 4)).groups
    assert {(place.tensor, place.axis) for place in group.places} >= {
        ("again.weight", 0),
        ("again.weight", 1),
        ("last.weight", 1),
    }


def test_what_is_not_known_keeps_its_order() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.cumsum(self.a(x), 1))))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert [group.name for group in module_spec(Softmax(), torch.randn(3, 4)).groups] == ["b"]


def test_a_module_that_cannot_be_traced_says_so() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="the Branches cannot be traced .*write its permutation spec by hand"):
        module_spec(Branches(), torch.ones(2, 2))
