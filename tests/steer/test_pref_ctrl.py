"""Pref-CTRL: gradients by hand, RE-Control where the weights are 0, pairs read at the right position or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles.toy import Toy
from tiny import CHAT, tiny_lm, tiny_tokenizer
from trimtab import LM, Sampling
from trimtab.errors import UsageError
from trimtab.steer import PrefCtrl, ReControl
from trimtab.steer.pairs import PairStates, answer_tokens, pairs_drawn, pairs_given, read_pairs
from trimtab.steer.pref_ctrl import PairTerms, anchor_loss, margin_loss

PROMPTS = ["ba da fa la", "ma na", "pa ra sa ta be", "pe"]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


class Scalar(nn.Module):
    """V(s) = v * s on states of one number."""

    def __init__(self, v: float = 1.0):
        super().__init__()
        self.v = nn.Parameter(torch.tensor(v))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.v * hidden[..., 0]


# losses


def gradients(preferred: float, rejected: float, own: float) -> tuple[torch.Tensor, torch.Tensor]:
    """d margin / d (V(p), V(q)) and d anchor / d (V(own), V(p)) by autograd."""
    p, q, o = (torch.tensor([value], requires_grad=True) for value in (preferred, rejected, own))
    margin = torch.autograd.grad(margin_loss(p, q), [p, q])
    anchor = torch.autograd.grad(anchor_loss(o, p), [o, p])
    return torch.cat(margin), torch.cat(anchor)


@pytest.mark.parametrize(("p", "q", "own"), [(0.3, -0.4, 1.1), (-2.0, 1.0, 0.0), (0.5, 0.5, 0.5)])
def test_gradients_are_the_hand_formulas(p: float, q: float, own: float) -> None:
    margin, anchor = gradients(p, q, own)
    push = 1 - float(torch.sigmoid(torch.tensor(p - q)))
    assert margin.tolist() == pytest.approx([-push, push], abs=1e-6)
    assert anchor.tolist() == pytest.approx([2 * (own - p), -2 * (own - p)], abs=1e-6)


def test_swapping_the_pair_flips_the_sign_of_the_margin_gradient() -> None:
    """On V(s) = v s at v = 0, where both orders push with the same force."""
    slopes = []
    for p, q in ((1.0, -2.0), (-2.0, 1.0)):
        value = Scalar(0.0)
        loss = margin_loss(value(torch.tensor([[p]])), value(torch.tensor([[q]])))
        slopes.append(torch.autograd.grad(loss, [value.v])[0].item())
    assert slopes[0] == pytest.approx(-slopes[1]) and slopes[0] == pytest.approx(-1.5)


@pytest.mark.parametrize("detach", ["none", "preferred"])
def test_terms_use_each_rows_own_pair(detach: str) -> None:
    pairs = PairStates(torch.tensor([[1.0], [5.0]]), torch.tensor([[0.0], [3.0]]), [[1], [], [0]])
    value = Scalar(0.7)
    own = torch.tensor([0.2, 9.0, -0.4])
    loss = PairTerms(pairs, 2.0, 3.0, detach)(value, torch.tensor([2, 0, 1]), own)
    p, q, o = torch.tensor([0.7, 3.5]), torch.tensor([0.0, 2.1]), torch.tensor([0.2, 9.0])
    assert loss.item() == pytest.approx(float(2 * margin_loss(p, q) + 3 * anchor_loss(o, p)), rel=1e-6)
    (slope,) = torch.autograd.grad(loss, [value.v])
    v = torch.tensor(0.7, requires_grad=True)
    states = torch.tensor([1.0, 5.0])
    anchored = (v.detach() if detach == "preferred" else v) * states
    by_hand = 2 * margin_loss(v * states, v * torch.tensor([0.0, 3.0])) + 3 * anchor_loss(o, anchored)
    assert slope.item() == pytest.approx(torch.autograd.grad(by_hand, [v])[0].item(), rel=1e-5)


def test_several_pairs_are_shown_in_turn_and_none_costs_nothing() -> None:
    pairs = PairStates(torch.tensor([[1.0], [5.0]]), torch.zeros(2, 1), [[0, 1], []])
    terms, value, row = PairTerms(pairs, 1.0, 0.0, "none"), Scalar(1.0), torch.tensor([0])
    first, second, third = (terms(value, row, torch.zeros(1)).item() for _ in range(3))
    assert first == third != second
    assert terms(value, torch.tensor([1]), torch.zeros(1)).item() == 0


# the fit


def fit(toy: Toy, cls: type[Any], **options: Any) -> Any:
    rollouts = toy.rollouts(512)
    config = cls.Config(step_size=0.1, width=16, epochs=2, **options)
    return cls.learn(toy.lm, [toy.prompt] * 4, toy.reward, toy.sampling, config, rollouts)


def test_both_weights_zero_is_re_control_bit_for_bit(toy: Toy) -> None:
    plain, zero = fit(toy, ReControl), fit(toy, PrefCtrl, w_margin=0.0, w_anchor=0.0)
    for key, tensor in plain.tensors().items():
        assert torch.equal(tensor, zero.tensors()[key])
    assert not torch.equal(fit(toy, PrefCtrl).value(toy.states), plain.value(toy.states))


def test_the_margin_ranks_pairs_and_the_origin_tells(toy: Toy) -> None:
    plain, margin = fit(toy, PrefCtrl, w_margin=1e-9, w_anchor=0.0), fit(toy, PrefCtrl, w_margin=5.0, w_anchor=0.0)
    key = "pairs_ranked_right_in_sample"
    assert margin.origin.metrics[key] > plain.origin.metrics[key] > 0.5
    found = margin.origin.metrics
    assert found["pairs"] + found["pairs_dropped"] == 256 and found["pairs"] > 100
    assert any("pairs were left out" in warning for warning in margin.origin.warnings)
    assert fit(toy, ReControl).origin.warnings == [w for w in margin.origin.warnings if "pairs" not in w]


# pairs from rollouts


def test_pairs_are_the_best_and_the_worst_of_each_group(toy: Toy) -> None:
    rollouts = toy.rollouts(43)
    rollouts.prompt_index = torch.arange(43) % 2
    pairs = pairs_drawn(rollouts, 4)
    last = rollouts.states[rollouts.offsets + rollouts.lengths - 1]
    for prompt in (0, 1):
        rows = (rollouts.prompt_index == prompt).nonzero()[:, 0].tolist()
        groups = [rows[at : at + 4] for at in range(0, 16, 4)] + [rows[16:]]
        for group in groups:
            chosen = {tuple(pairs.choices[row]) for row in group}
            assert len(chosen) == 1
            (numbers,) = chosen
            if not numbers:
                continue
            rewards = rollouts.rewards[group]
            best, worst = last[group[int(rewards.argmax())]], last[group[int(rewards.argmin())]]
            shown = rollouts.rewards[[row for row in group if torch.equal(last[row], pairs.preferred[numbers[0]])]]
            assert bool((shown == rewards.max()).any()) and best.shape == worst.shape
            shown = rollouts.rewards[[row for row in group if torch.equal(last[row], pairs.rejected[numbers[0]])]]
            assert bool((shown == rewards.min()).any())
    assert len(pairs) + sum(pairs.dropped.values()) == 10


def test_pairs_without_a_difference_are_dropped_with_a_count(toy: Toy) -> None:
    rollouts = toy.rollouts(64)
    rollouts.rewards = torch.zeros(64)
    pairs = pairs_drawn(rollouts, 2)
    assert len(pairs) == 0 and pairs.dropped == {"equal rewards": 32}
    with pytest.raises(
        UsageError, match=r"no pairs to learn from \(32 equal rewards\): give pairs, or set both weights to 0"
    ):
        pairs.required()
    rollouts.prompt_index = torch.arange(64)
    assert pairs_drawn(rollouts, 2).dropped == {"with one answer to the prompt": 64}
    rollouts = toy.rollouts_of(torch.tensor([0, 3, 3, 3]))
    rollouts.rewards = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert pairs_drawn(rollouts, 2).dropped == {"an empty answer": 1, "identical answers": 1}


# pairs from a file


def write(folder: Path, rows: list[Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def last_state(lm: LM, prompt: str, answer: str) -> torch.Tensor:
    """The state the end token is drawn from, by the model's own forward on one row without pads."""
    ids = lm.encode([prompt])[0] + lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    seen: list[torch.Tensor] = []
    hook = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
    lm.model(torch.tensor([ids]))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ended", ["", " </s>"], ids=["bare", "ended"])
def test_pair_states_are_read_where_the_end_token_is_drawn(side: str, ended: str, tmp_path: Path) -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer(side=side))
    rows = [
        {"prompt": PROMPTS[0], "chosen": f" na pa{ended}", "rejected": f" ra{ended}"},
        {"prompt": PROMPTS[1], "chosen": f" be{ended}", "rejected": f" le me ne pe re se{ended}"},
    ]
    rollouts = pair_rollouts(lm)
    pairs = pairs_given(lm, PROMPTS, read_pairs(write(tmp_path, rows)), rollouts)
    for number, row in enumerate(rows):
        for found, answer in ((pairs.preferred, row["chosen"]), (pairs.rejected, row["rejected"])):
            expected = last_state(lm, row["prompt"], answer.removesuffix(ended))
            assert (found[number] - expected).abs().max() < 1e-5
    assert [pairs.choices[row] for row in range(4)] == [[0], [1], [], []]
    forwarded = sum(len(lm.encode([r["prompt"]])[0]) * 2 for r in rows) + 2 + 1 + 1 + 6
    assert pairs.cost.tokens_forwarded == forwarded


def pair_rollouts(lm: LM) -> Any:
    from trimtab.rewards import Function
    from trimtab.steer import collect

    reward = Function(lambda _, texts: [float(len(text)) for text in texts], name="length")
    return collect(lm, PROMPTS, reward, Sampling(max_new_tokens=5), 8)


def test_unusable_pairs_are_dropped_with_a_count(tmp_path: Path) -> None:
    lm = tiny_lm()
    rows = [
        {"prompt": PROMPTS[0], "chosen": " na", "rejected": " pa"},
        {"prompt": PROMPTS[0], "chosen": " na", "rejected": " na"},
        {"prompt": PROMPTS[1], "chosen": "", "rejected": " na"},
        {"prompt": "te", "chosen": " na", "rejected": " pa"},
        {"prompt": PROMPTS[1], "chosen": " na" * 80, "rejected": " pa"},
    ]
    rollouts = pair_rollouts(lm)
    pairs = pairs_given(lm, PROMPTS, read_pairs(write(tmp_path, rows)), rollouts)
    assert len(pairs) == 1 and pairs.dropped == {
        "identical answers": 1,
        "an empty answer": 1,
        "their prompt is not among those fitted on": 1,
        "longer than the context": 1,
    }
    none = pairs_given(lm, PROMPTS, read_pairs(write(tmp_path, rows[1:])), rollouts)
    with pytest.raises(UsageError, match="no pairs to learn from .*1 identical answers"):
        none.required()


def test_a_file_of_pairs_changes_the_fit(toy: Toy, tmp_path: Path) -> None:
    rows = [
        {"prompt": toy.prompt, "chosen": " 3 3 3", "rejected": " 4 4"},
        {"prompt": [{"role": "user", "content": toy.prompt}], "chosen": " 3", "rejected": " 4"},
        {"prompt": toy.prompt, "chosen": [{"role": "assistant", "content": " 1 5"}], "rejected": " 4 4 4"},
    ]
    fitted = fit(toy, PrefCtrl, pairs=write(tmp_path, rows), w_margin=3.0)
    assert fitted.origin.metrics["pairs"] == 2 and fitted.origin.metrics["pairs_dropped"] == 1
    plain = fit(toy, ReControl)
    where = [toy.prefixes.index((3, 3, 3)), toy.prefixes.index((4, 4))]
    good, bad = fitted.value(toy.states[where])
    plain_good, plain_bad = plain.value(toy.states[where])
    assert good - bad > plain_good - plain_bad


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"pairs.jsonl:2: Expecting"),
        ({"prompt": "ba", "chosen": "na"}, r"pairs.jsonl:2: an object with prompt, chosen and rejected is needed"),
        ({"prompt": "", "chosen": "na", "rejected": "pa"}, r"pairs.jsonl:2: the prompt is empty"),
        ({"prompt": "ba", "chosen": 3, "rejected": "pa"}, r"pairs.jsonl:2: chosen and rejected must each be a string"),
    ],
)
def test_a_broken_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "ba", "chosen": "na", "rejected": "pa"}, row])
    with pytest.raises(UsageError, match=message):
        read_pairs(path)
    with pytest.raises(UsageError, match="cannot read the pairs file"):
        read_pairs(tmp_path / "absent.jsonl")


def test_answers_are_tokenised_as_the_model_would_continue() -> None:
    plain = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    whole = plain.tokenizer("ba mo")["input_ids"]
    head = plain.encode(["ba"])[0]
    assert answer_tokens(plain, "ba", head, " mo") == [*whole[len(head) :], 2]
    # a merge across the boundary would change the prompt: the answer is then tokenised alone
    split = plain.encode(["t"])[0]
    assert answer_tokens(plain, "t", split, "u") == [*plain.tokenizer("u")["input_ids"], 2]
    chat = tiny_lm(tokenizer=tiny_tokenizer(chat=CHAT))
    assert answer_tokens(chat, "ba", chat.encode(["ba"])[0], "na pa </s>")[-1] == 2


def test_weights_and_groups_out_of_range_are_refused() -> None:
    for bad in ({"w_margin": -1.0}, {"w_anchor": float("inf")}, {"group": 1}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            PrefCtrl.Config(**bad)
