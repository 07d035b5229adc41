"""The arena: what is shown, asked again, tossed for and counted; the diagnostic around it; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import UsageError
from trimtab.measure.arena import arena, judge_of
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Bracket, Dots, Measurement
from trimtab.measure.varco_arena import VarcoArena, VarcoArenaConfig
from trimtab.policy import Completions, Cost
from trimtab.rewards.base import Reward
from trimtab.rewards.judge import Judgement
from trimtab.rewards.pair_judge import PairJudge
from trimtab.sampling import Sampling

PROMPTS = [f"question {i}" for i in range(60)]
NAMES = ["a", "b", "c", "d", "e"]


class Stub(PairJudge):
    """P(first better) from a function of both answers; every pair shown is kept."""

    name = fingerprint = "stub"

    def __init__(self, rule: Callable[[str, str], float | None]) -> None:
        self.rule = rule
        self.shown: list[tuple[str, str, str]] = []

    def prefer(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], meter: Cost | None
    ) -> list[Judgement]:
        self.shown += list(zip(prompts, first, second, strict=True))
        return [Judgement(self.rule(a, b)) for a, b in zip(first, second, strict=True)]


def longer(a: str, b: str) -> float:
    return 0.9 if len(a) > len(b) else 0.2 if len(a) < len(b) else 0.5


def lengths(n: int, prompts: int = 60) -> list[list[str]]:
    """Outputs of n models of which the later ones usually are longer."""
    rng = np.random.default_rng(0)
    return [["x" * (1 + int(10 * i + rng.integers(0, 30))) for _ in range(prompts)] for i in range(n)]


def test_a_ranking_follows_its_judge_and_counts_its_calls() -> None:
    judge = Stub(longer)
    found = arena(NAMES, PROMPTS, lengths(5), judge, ties="half")
    assert found.ratings.order == [4, 3, 2, 1, 0]
    assert found.wins.sum() == len(found.matches) == 4 * 60
    tied = sum(how in ("tie", "same") for how in found.referee.how)
    assert found.referee.calls == len(judge.shown) == 240 - found.referee.how.count("same")
    assert tied > 0  # equal lengths are equal texts here: never shown
    assert all(first != second for _, first, second in judge.shown)


def test_who_is_shown_first_is_random_and_cancels_a_pull_of_position() -> None:
    """A judge that always takes the first decides by the referee's coin: nobody rises above the others."""
    judge = Stub(lambda a, b: 0.99)
    outputs = [[f"{name} {i}" for i in range(60)] for name in NAMES]
    found = arena(NAMES, PROMPTS, outputs, judge)
    first = np.mean([text.startswith(("a", "b")) for _, text, _ in judge.shown])
    assert 0.25 < first < 0.55  # of five models; 240 matches
    assert all(won for _, won in found.referee.first)
    assert not found.ratings.separable
    both = arena(NAMES, PROMPTS, outputs, judge, order="both")
    assert set(both.referee.how) == {"tie"} and both.referee.calls == 2 * 240
    assert both.ratings.rating == pytest.approx([1000] * 5, abs=1e-6)  # disagreement is half a win for each


def test_a_tie_is_asked_again_in_the_other_order_and_then_tossed_for() -> None:
    """The judge sees a difference only when the longer answer comes first: half of the matches are decided at once."""
    judge = Stub(lambda a, b: 0.9 if len(a) > len(b) else 0.5)
    outputs = [["x" * (i + 1) for _ in range(60)] for i in range(3)]
    found = arena(["a", "b", "c"], PROMPTS, outputs, judge)
    how = found.referee.how
    assert 0.3 < how.count("again") / len(how) < 0.7 and how.count("tie") == 0
    assert found.referee.calls == len(how) + how.count("again")
    assert found.ratings.order == [2, 1, 0]
    for one, two in zip(judge.shown, judge.shown[1:], strict=False):
        assert len({one, two}) == 2


def test_a_judge_that_is_silent_too_often_is_refused_and_one_that_is_at_times_is_warned_about() -> None:
    outputs = [[f"{name} {i}" for i in range(60)] for name in NAMES]
    with pytest.raises(UsageError, match="no verdict .*use another judge"):
        arena(NAMES, PROMPTS, outputs, Stub(lambda a, b: None))
    with pytest.raises(UsageError, match="--ties half"):
        arena(NAMES, PROMPTS, outputs, Stub(lambda a, b: 0.5))
    level = arena(NAMES, PROMPTS, outputs, Stub(lambda a, b: 0.5), ties="half")
    assert level.ratings.rating == pytest.approx([1000] * 5) and level.referee.undecided == 0

    sometimes = Stub(lambda a, b: None if a.endswith("3") or b.endswith("3") else float(a > b))  # prompts 3, 13, ...
    found = arena(NAMES, PROMPTS, outputs, sometimes)
    assert found.referee.undecided == pytest.approx(0.1)
    assert found.referee.how.count("none") == 24 and found.referee.calls == 240 + 24


def test_identical_answers_are_tossed_for_without_a_call() -> None:
    judge = Stub(longer)
    found = arena(["a", "b"], PROMPTS, [["same"] * 60, ["same"] * 60], judge)
    assert (found.referee.calls, found.referee.how) == (0, ["same"] * 60)
    assert 15 < found.wins.sum(0)[0, 1] < 45 and not found.ratings.separable


def test_two_identical_models_are_told_apart_at_most_at_the_nominal_rate() -> None:
    """150 runs of coin flips on 40 prompts: "separable" at most 16 times (binomial 0.05: P(> 16) = 0.001)."""
    outputs = [["same"] * 40] * 2
    fired = sum(
        arena(["a", "b"], PROMPTS[:40], outputs, Stub(longer), seed=run, resamples=200).ratings.separable
        for run in range(150)
    )
    assert fired <= 16


def test_names_do_not_matter_to_the_ratings() -> None:
    """The same tournament (one draw, one judge) with the models in another order: the expected ranking is the same."""
    outputs = lengths(5)
    first = arena(NAMES, PROMPTS, outputs, Stub(longer), design="round-robin", ties="half")
    second = arena(NAMES[::-1], PROMPTS, outputs[::-1], Stub(longer), design="round-robin", ties="half")
    assert second.ratings.rating[::-1] == pytest.approx(first.ratings.rating, abs=1e-6)


@pytest.mark.parametrize(("design", "matches"), [("random-pairs", 4), ("anchored", 4), ("round-robin", 10)])
def test_other_designs_rank_as_well(design: Any, matches: int) -> None:
    found = arena(NAMES, PROMPTS, lengths(5), Stub(longer), design=design, anchor="c", ties="half")
    assert len(found.matches) == matches * 60
    assert found.ratings.order == [4, 3, 2, 1, 0]
    if design == "anchored":
        assert all(2 in pair for pair in zip(found.matches.a, found.matches.b, strict=True))


def test_missing_outputs_are_refused_or_have_a_bye() -> None:
    outputs: list[list[str | None]] = [list(row) for row in lengths(5)]
    outputs[1][7] = outputs[2][7] = outputs[4][30] = None
    with pytest.raises(UsageError, match="3 outputs are missing, the first of b on prompt 7"):
        arena(NAMES, PROMPTS, outputs, Stub(longer))
    judge = Stub(longer)
    found = arena(NAMES, PROMPTS, outputs, judge, allow_missing=True, ties="half")
    assert found.left_out == [(1, 7), (2, 7), (4, 30)]
    a_prompt = np.bincount(found.matches.row, minlength=60)
    assert (a_prompt[7], a_prompt[30], a_prompt[0]) == (2, 3, 4)
    assert not {1, 2} & set(np.concatenate([found.matches.a, found.matches.b])[np.tile(found.matches.row == 7, 2)])
    assert found.ratings.order == [4, 3, 2, 1, 0]
    outputs[0] = [None] * 60
    with pytest.raises(UsageError, match="never met"):
        arena(NAMES, PROMPTS, outputs, judge, allow_missing=True)


def test_a_disconnected_graph_is_refused_with_its_groups() -> None:
    """Random pairs on one prompt: three of ten pairs cannot connect five models, and two groups are named."""
    for seed in range(20):
        outputs = [[f"{name}{seed}"] for name in NAMES]
        try:
            arena(NAMES, PROMPTS[:1], outputs, Stub(lambda a, b: float(a > b)), design="random-pairs", seed=seed)
        except UsageError as error:
            assert "never met" in str(error) and "; " in str(error)
            return
    pytest.fail("four random pairs of five models connected them in 20 draws of 20 (7 of 10 are expected to)")


def test_what_cannot_be_ranked_is_refused() -> None:
    judge = Stub(longer)
    with pytest.raises(UsageError, match="two models or more"):
        arena(["a"], PROMPTS, lengths(1), judge)
    with pytest.raises(UsageError, match="two models are called a"):
        arena(["a", "a"], PROMPTS, lengths(2), judge)
    with pytest.raises(UsageError, match="the anchor 'z' is none of the models"):
        arena(["a", "b"], PROMPTS, lengths(2), judge, anchor="z")
    with pytest.raises(UsageError, match="there are none"):
        arena(["a", "b"], [], [[], []], judge)
    with pytest.raises(UsageError, match="2 models on 60 prompts"):
        arena(["a", "b"], PROMPTS, lengths(2, 59), judge)
    for bad in ({"ridge": 0.0}, {"judge_accuracy": 1.2}, {"resamples": 0}, {"simulate": -1}):
        with pytest.raises(UsageError):
            VarcoArenaConfig(**bad)  # type: ignore[arg-type]


# the diagnostic


class Canned:
    """A policy whose answers are known."""

    def __init__(self, name: str, answer: Callable[[str], str]) -> None:
        self.name, self.answer = name, answer

    def generate(self, prompts: Sequence[Any], sampling: Sampling = Sampling()) -> Completions:
        texts = [self.answer(prompt) for prompt in prompts]
        few: list[Any] = [[] for _ in texts]
        return Completions(list(prompts), texts, few, few, ["stop"] * len(texts), Cost({self.name: len(texts)}))


class Length(Reward):
    slug = "length"
    calls = 0

    def _score(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[float | None]:
        self.calls += len(texts)
        return [None if text == "?" else float(len(text)) for text in texts]


def subjects(tmp_path: Path, reward: Any = None, judge: str | None = None, count: int = 40) -> list[Subject]:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {i:02d}\n" for i in range(count)))
    rng = np.random.default_rng(0)
    table = {i: rng.integers(1, 60, count) + 12 * i for i in range(4)}
    return [
        Subject(
            Canned(f"model {i}", lambda prompt, i=i: "x" * int(table[i][int(prompt[-2:])])),  # type: ignore[misc]
            f"id {i}", texts=[path], reward=reward, judge=judge, cache=Cache(tmp_path / "cache"),
        )
        for i in range(4)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    return VarcoArena(VarcoArenaConfig(ties="half")).measure_together(
        subjects(tmp_path_factory.mktemp("arena"), Length())
    )


def test_the_table_ranks_models_with_intervals_and_says_what_it_cost(measured: Measurement) -> None:
    assert [row.label for row in measured.table[:4]] == ["model 3", "model 2", "model 1", "model 0"]
    for row in measured.table[:4]:
        assert row.value is not None and row.low is not None and row.high is not None
        assert row.low < row.value < row.high and row.n == 40 and row.note.startswith("rank ")
    played = 3 * 40 - measured.details["decided"].get("same", 0)
    assert measured.row("judge calls").value == played and measured.row("judge calls").n == 120
    assert "first shown wins" not in [row.label for row in measured.table]  # a reward sees one answer at a time
    assert measured.row("simulated rho, tournament").n == 50
    assert measured.row("simulated tau-b, tournament").value is not None  # four models: rho is coarse
    assert measured.notes[0].startswith("told apart") and "model 3 above model 0" in measured.notes[0]
    assert measured.cost.reward_calls <= 4 * 40  # each answer once, though winners meet again
    assert measured.cost.tokens == {f"model {i}": 40 for i in range(4)}
    assert Measurement.from_dict(measured.to_dict()).table == measured.table


def test_its_figures_are_the_ranking_and_one_bracket(measured: Measurement) -> None:
    ranking, one = measured.figures
    assert isinstance(ranking, Dots) and [dot[0] for dot in ranking.dots] == [row.label for row in measured.table[:4]]
    assert isinstance(one, Bracket) and [len(matches) for matches in one.rounds] == [2, 1]
    winners = {winner for *_, winner in one.rounds[0]}
    assert {one.rounds[1][0][0], one.rounds[1][0][1]} == winners


def test_samples_hold_the_share_of_matches_won_prompt_by_prompt(measured: Measurement) -> None:
    shares = np.array([measured.samples[f"model {i}: matches won"] for i in range(4)], dtype=float)
    assert shares.shape == (4, 40) and (shares.max(0) >= 0.5).all()


def test_a_bracket_figure_shows_byes(tmp_path: Path) -> None:
    some = subjects(tmp_path, Length())[:3]
    found = VarcoArena(VarcoArenaConfig(ties="half", simulate=0)).measure_together(some)
    figure = found.figures[1]
    assert isinstance(figure, Bracket)
    assert [len(matches) for matches in figure.rounds] == [2, 1]
    (bye,) = [match for match in figure.rounds[0] if match[1] is None]
    assert bye[0] == bye[2] and bye[0] in figure.rounds[1][0][:2]
    assert not [row for row in found.table if row.label.startswith("simulated")]


def test_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    config = VarcoArenaConfig(ties="half", base="model 1")
    first, again = (VarcoArena(config).measure_together(subjects(tmp_path, Length())) for _ in range(2))
    assert first.table == again.table and first.fingerprint == again.fingerprint
    assert first.row("model 1").value == 1000 and first.row("model 1").low is None


def test_few_prompts_are_not_separable_and_say_so(tmp_path: Path) -> None:
    some = subjects(tmp_path, Length(), count=3)
    found = VarcoArena(VarcoArenaConfig(ties="half", simulate=0)).measure_together(some)
    assert found.notes == ["not separable: 3 prompts do not tell these models apart (10 are the fewest that could)"]
    assert any("3 prompts are few" in warning for warning in found.warnings)


def test_a_judge_among_the_contestants_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Contestant(Stub):
        identity: str | None = "id 2"

    judge = Contestant(longer)
    monkeypatch.setattr("trimtab.measure.arena.parse_judge", lambda spec: judge)
    found = VarcoArena(VarcoArenaConfig(ties="half")).measure_together(subjects(tmp_path, judge="stub"))
    assert [warning for warning in found.warnings if "model 2" in warning and "judge" in warning]
    assert found.row("first shown wins").value is not None


def test_a_pull_of_position_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trimtab.measure.arena.parse_judge", lambda spec: Stub(lambda a, b: 0.1 if len(b) > len(a) + 30 else 0.9)
    )
    found = VarcoArena(VarcoArenaConfig(simulate=0)).measure_together(subjects(tmp_path, judge="stub"))
    assert any("shown first wins" in warning and "--order both" in warning for warning in found.warnings)


def test_the_diagnostic_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    some = subjects(tmp_path, Length())
    with pytest.raises(UsageError, match="--against"):
        VarcoArena().measure(some[0])
    with pytest.raises(UsageError, match="--against"):
        VarcoArena().measure_together(some[:1])
    with pytest.raises(UsageError, match="two models are called model 0"):
        VarcoArena().measure_together([some[0], some[0]])
    with pytest.raises(UsageError, match="--judge SPEC, or --reward NAME"):
        VarcoArena().measure_together(subjects(tmp_path))
    with pytest.raises(UsageError, match="no common zero"):
        VarcoArena().compare(None, None)  # type: ignore[arg-type]
    other = tmp_path / "other.txt"
    other.write_text("question 05\n")
    some[1].texts = [other]
    with pytest.raises(UsageError, match="same prompts"):
        VarcoArena().measure_together(some)


def test_a_reward_scores_each_answer_once_and_none_is_no_verdict() -> None:
    reward = Length()
    judge = judge_of(None, reward, Cache(None))
    said = judge.prefer(["p", "p", "q", "q"], ["xx", "x", "?", "x"], ["x", "xx", "x", "x"], None)
    assert [one.value for one in said] == [1.0, 0.0, None, 0.5]
    judge.prefer(["p"], ["xx"], ["xxx"], None)
    assert reward.calls == 5  # p: x, xx, xxx; q: ?, x
