"""Chains: their record, its file, and the diagnostics against closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trimtab import Cost, Sampling
from trimtab.decode.chains import Chain, Chains, State, acceptance, diagnose, effective_size, split_r_hat
from trimtab.errors import UsageError


def autoregressive(rho: float, chains: int, draws: int, seed: int) -> np.ndarray:
    """x_t = rho x_{t-1} + noise, begun in its stationary law: autocorrelation rho^t, variance 1."""
    generator = np.random.default_rng(seed)
    out = generator.standard_normal((chains, draws))
    for t in range(1, draws):
        out[:, t] = rho * out[:, t - 1] + (1 - rho**2) ** 0.5 * out[:, t]
    return out


def state(token: int, reward: float | None = 0.0) -> State:
    return State([token, 0], [-1.0, -0.5], True, str(token), reward)


def walked(*moves: bool, fresh: int = 0) -> Chain:
    """A chain that begins at answer 1 and comes to answers 2, 3, ... where a move is accepted."""
    chain = Chain(0, 0, fresh=fresh)
    chain.stand(state(1, 1.0), True)
    for number, accepted in enumerate(moves, start=2):
        chain.stand(state(number, float(number)), accepted)
    return chain


def run_of(*chains: Chain) -> Chains:
    sampling = Sampling(max_new_tokens=7, temperature=0.9, stop=("Q:",), seed=11)
    cost = Cost({"toy": 12}, 3, 0.5)
    return Chains(
        "toy", "length", ["a", [{"role": "user", "content": "b"}]], sampling, 0.7, "quest", 1, [*chains], cost
    )


# the record


def test_a_rejected_step_repeats_the_state() -> None:
    chain = walked(True, False, False, True, fresh=3)
    assert [one.tokens[0] for one in chain.draws] == [1, 2, 2, 2, 5]
    assert chain.path == [0, 1, 1, 1, 2] and chain.accepted == [True, False, False, True]
    assert chain.steps == 4 and chain.state.tokens == [5, 0]
    assert acceptance([chain]) == 2 / 3  # the fourth proposal did not differ from its state
    assert acceptance([walked(False)]) is None and Chain(0, 0).steps == 0


def test_the_record_of_one_answer() -> None:
    told = diagnose([walked(True, False, True, fresh=3), walked(False, False, False, fresh=3)])
    assert told["rewards"] == [[1, 2, 2, 4], [1, 1, 1, 1]] and told["acceptance"] == 2 / 6
    assert told["unique"] == 3  # both begin at the same answer
    assert told["r_hat"] is not None and told["effective_size"] is not None
    short = diagnose([walked(True)])
    assert short["r_hat"] is None and short["effective_size"] is None
    unjudged = walked(True, True, True)
    unjudged.visited[0].reward = None
    assert diagnose([unjudged])["effective_size"] is None and diagnose([unjudged])["rewards"][0][0] is None


# diagnostics


def test_split_r_hat_by_hand() -> None:
    """Halves [0, 2], [2, 4], [4, 6], [6, 8]: each has variance 2, their means 1, 3, 5, 7 have variance 20 / 3."""
    assert split_r_hat([[0, 2, 2, 4], [4, 6, 6, 8]]) == pytest.approx(((2 / 2 + 20 / 3) / 2) ** 0.5, rel=1e-12)
    assert split_r_hat([[0, 2, 99, 2, 4], [4, 6, 99, 6, 8]]) == split_r_hat([[0, 2, 2, 4], [4, 6, 6, 8]])


def test_split_r_hat_tells_mixed_from_stuck() -> None:
    mixed = autoregressive(0.0, 4, 2000, seed=0)
    assert abs(split_r_hat(mixed) - 1) < 0.01
    assert split_r_hat(mixed + np.arange(4)[:, None]) > 1.3  # chains apart from each other
    assert split_r_hat(mixed[:1] + np.linspace(0, 3, 2000)) > 1.2  # one chain that drifts: seen by splitting


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("chains", [1, 4])
def test_effective_size_of_an_autoregression(rho: float, chains: int) -> None:
    """n (1 - rho) / (1 + rho). 15 %: the spread of the estimate itself over seeds is 2 to 5 % at these lengths."""
    sizes = [effective_size(autoregressive(rho, chains, 8000 // chains, seed)) for seed in range(8)]
    assert np.mean(sizes) == pytest.approx(8000 * (1 - rho) / (1 + rho), rel=0.15)


def test_effective_size_of_draws_that_alternate_is_above_their_number() -> None:
    size = effective_size(autoregressive(-0.6, 2, 4000, seed=1))
    assert 2 * 8000 < size <= 8000 * np.log10(8000)


def test_repeats_count_once() -> None:
    """Every draw held for 5 steps: a fifth as many, up to the 10 % that one estimate of 2,000 draws may be off."""
    held = np.repeat(autoregressive(0.0, 2, 2000, seed=2), 5, axis=1)
    assert effective_size(held) == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize("draws", [[[1.0, 2.0, 3.0]], [[3.0] * 10, [3.0] * 10], np.zeros((2, 0)), [[1.0]]])
def test_undefined_is_none(draws: list[list[float]]) -> None:
    assert split_r_hat(draws) is None and effective_size(draws) is None


# the file


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    second = walked(True, fresh=1)
    second.prompt, second.number, second.visited[0].reward = 1, 4, None
    chains, path = run_of(walked(False, True, fresh=2), second), tmp_path / "chains.json"
    chains.save(path)
    assert Chains.load(path) == chains
    assert (chains.fresh, chains.moves) == (3, 2) and [len(group) for group in chains.groups()] == [1, 1]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    run_of(walked(True)).save(path)
    whole = json.loads(path.read_text())

    def damage(**changes: object) -> None:
        path.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(UsageError, match="does not hold saved chains"):
            Chains.load(path)

    chain = whole["chains"][0]
    damage(schema=99)
    damage(sampling={})
    damage(chains=[{**chain, "prompt": 5}])
    damage(chains=[{**chain, "path": [0, 2]}])
    damage(chains=[{**chain, "path": [0, 0]}])
    damage(chains=[{**chain, "visited": [{**chain["visited"][0], "tokens": [1]}, chain["visited"][1]]}])
    damage(more=1)
    path.write_text(json.dumps(whole)[:-40])
    with pytest.raises(UsageError, match="does not hold saved chains"):
        Chains.load(path)
    with pytest.raises(UsageError, match="does not hold saved chains"):
        Chains.load(tmp_path / "none.json")


def test_nothing_is_lost_when_saving_fails(tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    run_of(walked(True)).save(path)
    broken = run_of(walked(True))
    broken.beta = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(path)
    assert Chains.load(path).beta == 0.7 and list(tmp_path.iterdir()) == [path]
