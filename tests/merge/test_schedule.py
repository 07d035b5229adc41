"""Settings that vary with depth, module and model: against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.merge.schedule import at, depth_of, layer_of, parse_words

MLP, ATTENTION = "model.layers.3.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("setting", "depth", "value"),
    [
        (0.5, 0.3, 0.5),
        ([0.2, 0.8], 0.0, 0.2),
        ([0.2, 0.8], 0.25, 0.35),
        ([0.2, 0.8], 1.0, 0.8),
        ([0, 0.5, 0.3, 0.7, 1], 0.625, 0.5),  # halfway between the third and the fourth
        ([1, 0.5], 0.5, 0.75),
        ([True, False], 1.0, 0.0),  # numbers, as in mergekit
        (["a", "b"], 0.4, "a"),
        (["a", "b"], 1.0, "b"),
        ([{"filter": "mlp", "value": 0.3}, {"value": 0.5}], 0.0, 0.3),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], 0.25, 0.25),
        ([{"filter": "attn", "value": 0.3}, {"value": 0.5}], 0.0, 0.5),
        ([{"filter": "attn", "value": 0.3}], 0.0, None),
        ([{"filter": "*", "value": 0.1}, {"filter": "mlp", "value": 0.3}], 0.0, 0.1),
        ({"filter": "mlp", "value": 0.3}, 0.0, 0.3),
        ({"each": [0.5, [0, 1]]}, 0.25, (0.5, 0.25)),
        ([{"filter": "mlp", "value": {"each": [0.5, [0, 1]]}}], 0.25, (0.5, 0.25)),
    ],
)
def test_the_value_for_a_tensor(setting: Any, depth: float, value: Any) -> None:
    found = at(setting, MLP, depth, 2, "density")
    assert found == (pytest.approx(value) if isinstance(value, float) else value)


def test_a_models_own_setting_sees_its_own_name() -> None:
    setting = {"each": [[{"filter": "layers.3.", "value": 1.0}, {"value": 0.0}]] * 2}
    assert at(setting, "model.layers.9.x", 0.0, 2, "w", ["model.layers.3.x", "model.layers.4.x"]) == (1.0, 0.0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_neighbours(values: list[float], depth: float) -> None:
    found = at(values, MLP, depth, 1, "w")
    place = depth * (len(values) - 1)
    near = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    assert min(near) - 1e-9 <= found <= max(near) + 1e-9


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("model.embed_tokens.weight", 0.0, 0.0),
        ("model.layers.0.mlp.up_proj.weight", 0.0, 0.0),
        ("model.layers.2.mlp.up_proj.weight", 0.5, 0.5),
        ("model.layers.4.block.experts.7.w1.weight", 1.0, 1.0),
        ("model.norm.weight", 1.0, 0.0),
        ("lm_head.weight", 1.0, 0.0),
        ("transformer.wte.weight", 0.0, 0.0),
    ],
)
def test_depth(name: str, ours: float, theirs: float) -> None:
    assert (depth_of(name, 5), depth_of(name, 5, "mergekit")) == (ours, theirs)


def test_a_layer_that_is_alone() -> None:
    assert (depth_of("h.0.mlp.w", 1), depth_of("h.0.mlp.w", 1, "mergekit")) == (0.0, 1.0)
    assert layer_of("h.0.mlp.w") == 0 and layer_of("lm_head.weight") is None


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["0.5"], 0.5),
        (["0.2..0.5..0.8"], [0.2, 0.5, 0.8]),
        (["0.5", "0.4"], {"each": [0.5, 0.4]}),
        (["mlp=0.3", "0.5"], [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]),
        (["mlp=0.3,0.4", "0.5"], [{"filter": "mlp", "value": {"each": [0.3, 0.4]}}, {"value": 0.5}]),
        (["0.1..0.2,0.4"], {"each": [[0.1, 0.2], 0.4]}),
        (["true"], "true"),
        (["-1"], -1),
    ],
)
def test_words(words: list[str], setting: Any) -> None:
    assert parse_words(words, "--density") == setting


@pytest.mark.parametrize(
    ("words", "said"),
    [(["=0.3"], "no filter before"), (["0.1..x"], "is no gradient"), (["0.1,0.2", "0.3"], "twice over")],
)
def test_words_that_are_none(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_words(words, "--density")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ([], "no value, no gradient"),
        ([0.5, {"value": 1}], "mixes"),
        ([{"filter": "mlp"}], "keys 'filter' and 'value'"),
        ([{"value": 1, "fliter": "x"}], "keys 'filter' and 'value'"),
        ({"each": [1, 2, 3]}, "3 values for 2 models"),
        (object(), "no value"),
    ],
)
def test_settings_that_are_none(setting: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        at(setting, ATTENTION, 0.5, 2, "density")
