"""A comparison's own measures: the panel by default, diagnostics on demand, kept, resumed, refused where they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_lm
from trimtab.cli import main
from trimtab.compare import compare, run_compare
from trimtab.decode.best_of_n import BestOfN
from trimtab.errors import UsageError
from trimtab.lm import LM
from trimtab.measure.stats import win_rate
from trimtab.measures import Wanted, panels
from trimtab.policies import Built
from trimtab.prompt.tuning import save
from trimtab.report import write_report
from trimtab.table import Measured

PROMPTS = ["ba da fa la", "ma na", "pe", "ra sa ta be", "de fe"]
REWARD = "keyword:words=ba|da|fa"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save(tiny_lm(), path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "harmful.txt"
    path.write_text("ba da\nma na\n")
    return path


def run(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    settings = {"policies": ["best-of-n:n=2"], "max_new_tokens": 5, "coherence": False, **more}
    return run_compare(str(model), REWARD, PROMPTS, out=out, **settings)


def test_three_wins_among_ties_are_no_verdict_of_the_panel() -> None:
    """The interval of 3 wins in 75 excludes one half; exchanged at random, one outcome in four is as one-sided."""
    sides = []
    for family, rewarded in (("base", 0), ("steered", 3)):
        side = Measured(Built(family, family, policy=None))  # type: ignore[arg-type]
        for i in range(75):
            row = {"prompt_index": i, "reward": float(i < rewarded), "gold": None, "length": 4, "finish": "eos"}
            row |= {"unrepeated": 1.0, "refuses": False, "kl": None, "nll_base": None, "entropy": None, "tokens": [i]}
            side.rows.append(row)
        sides.append(side)
    record = {"win_rate": win_rate(sides[1].column("reward"), sides[0].column("reward")).rate.to_dict(), "gold": None}
    changes = panels(sides, [{}, record])["comparisons"][0]["changes"]
    assert changes[0]["label"] == "win rate" and changes[0]["low"] > 0
    assert {change["verdict"] for change in changes if change["label"] in ("win rate", "reward")} == {"undecided"}


def test_the_panel_equals_the_table_and_the_samples() -> None:
    lm = tiny_lm()
    result = compare([lm, BestOfN(lm, lambda p, t: [len(x) for x in t], 3)], PROMPTS, REWARD)
    effects = result["side_effects"]
    rows = {row["label"]: row for row in effects["measurements"][1]["table"]}
    assert rows["reward"]["value"] == pytest.approx(result["policies"][1]["reward"]["mean"])
    assert rows["length in tokens"]["value"] == pytest.approx(result["policies"][1]["length_tokens"])
    changes = {change["label"]: change for change in effects["comparisons"][0]["changes"]}
    assert changes["win rate"]["first"] == result["policies"][1]["win_rate"]["mean"]
    ratio = (
        result["policies"][1]["cost"]["tokens_forwarded_per_answer"]
        / result["policies"][0]["cost"]["tokens_forwarded_per_answer"]
    )
    assert changes["tokens per answer"]["note"] == f"{ratio:.2f} times"
    assert "entropy per token" not in rows and "gold" not in rows  # best-of-n has none; there was no gold


def test_a_diagnostic_of_every_policy(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    result = run(model, out, measures=[f"refusal:texts={texts},samples=2"])
    (found,) = result["measures"]
    assert found["name"] == "refusal" and [one["subject"] for one in found["measurements"]] == ["base", "best-of-n:n=2"]
    assert found["comparisons"][0]["changes"][0]["label"] == "refusal" and found["refused"] == {}
    html = (out / "report.html").read_text()
    assert 'id="side-effects"' in html and 'id="measure-1"' in html and "Against the base, line by line" in html
    # resumed without its table it asks nothing again
    before = (out / "compare.json").read_bytes()
    (out / "compare.json").unlink()
    monkeypatch.setattr(LM, "generate", lambda *_, **__: pytest.fail("an answer was drawn"))
    run(model, out, measures=[f"refusal:texts={texts},samples=2"])
    assert (out / "compare.json").read_bytes() == before
    # other texts are another run
    texts.write_text("pe\n")
    with pytest.raises(UsageError):
        run(model, out, measures=[f"refusal:texts={texts},samples=2"])


def test_what_a_policy_cannot_be_asked_is_said(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "run", measures=["branching-factor:samples=4"], max_new_tokens=6)
    (found,) = result["measures"]
    assert [one["subject"] for one in found["measurements"]] == ["base"]
    assert "best-of-n:n=2" in found["refused"]
    assert "was not measured" in (tmp_path / "run" / "report.html").read_text()


def test_a_judge_sets_each_policy_against_the_base_and_an_arena_all(model: Path, tmp_path: Path) -> None:
    policies = ["best-of-n:n=2", "best-of-n:n=3"]
    result = run(model, tmp_path / "run", measures=["judge", "varco-arena:ties=half"], judge=REWARD, policies=policies)
    judged, arena = result["measures"]
    assert [one["subject"] for one in judged["measurements"]] == policies
    assert all("win rate against" in one["table"][0]["label"] for one in judged["measurements"])
    assert len(arena["measurements"]) == 1 and not arena["comparisons"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("refusl", "did you mean 'refusal'"),
        ("refusal:texts=absent.txt", "there is no file absent.txt"),
        ("refusal:smaples=2", "did you mean 'samples'"),
        ("best-of-n:n=2", "is a method, not a diagnostic"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Wanted.parse(spec)


def test_refused_before_anything_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS))
    words = ["compare", str(model), "--reward", REWARD, "--prompts", str(prompts), "--policy", "best-of-n:n=2"]
    assert main([*words, "--out", str(out), "--measure", "refusal:texts=absent.txt"]) == 2
    assert "there is no file absent.txt" in capsys.readouterr().err and not out.exists()


def test_a_run_of_an_older_version_still_has_a_report(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(model, out)
    result = json.loads((out / "compare.json").read_text())
    del result["side_effects"]
    (out / "compare.json").write_text(json.dumps(result))
    assert 'id="side-effects"' not in write_report(out).read_text()
