"""`compare` and its table, with a stand-in for the comparison itself."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.cli.compare import default_out
from trimtab.cli.table import cells, print_table


def policy(name: str, mean: float, **changes: Any) -> dict[str, Any]:
    cost = {
        "tokens_forwarded_per_answer": 20.0,
        "reward_calls_per_answer": 0.0,
        "seconds_per_answer": 0.0125,
        "fit_seconds": 0.0,
        "fit_tokens": 0,
    }
    row: dict[str, Any] = {
        "name": name,
        "reward": {"mean": mean, "low": mean - 0.02, "high": mean + 0.02},
        "gold": None,
        "win_rate": None,
        "verdict": "base",
        "kl_per_token": {"mean": 0.0, "low": 0.0, "high": 0.0},
        "kl_bound": None,
        "nll_base_per_token": 1.42,
        "diversity": 0.042,
        "length_tokens": 19.0,
        "cost": cost,
        "settings": {},
    }
    return {**row, **changes}


RESULT: dict[str, Any] = {
    "schema": 1,
    "model": "pocket/base",
    "reward": "pocket/reward",
    "gold": None,
    "prompts": 2,
    "samples": 1,
    "seed": 0,
    "policies": [
        policy("base", 0.41),
        policy(
            "best-of-n:n=8",
            0.83,
            win_rate={"mean": 0.79, "low": 0.7, "high": 0.88},
            verdict="better",
            kl_per_token=None,
            kl_bound=1.2044,
            cost={**policy("x", 0)["cost"], "tokens_forwarded_per_answer": 160.0, "fit_tokens": 12345},
        ),
    ],
    "environment": {},
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the comparison was called with; it returns RESULT."""
    seen: list[dict[str, Any]] = []
    module = types.ModuleType("trimtab.compare")

    def run_compare(**settings: Any) -> dict[str, Any]:
        settings["progress"]("measuring")
        seen.append(settings)
        return RESULT

    module.run_compare = run_compare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trimtab.compare", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("One\nTwo\n")
    return seen


COMMAND = "compare pocket/base --reward sentiment --prompts p.txt --policy best-of-n:n=8 --policy re-control".split()


def test_every_option_reaches_the_comparison(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    more = "--gold pocket/judge --max-new-tokens 7 --temperature 0.5 --seed 3 --samples 2 --out o --sweep".split()
    assert cli.main([*COMMAND, *more]) == 0
    (seen,) = calls
    seen.pop("progress")
    assert seen == {
        "model": "pocket/base",
        "reward": "sentiment",
        "gold": "pocket/judge",
        "prompts": ["One", "Two"],
        "policies": ["best-of-n:n=8", "re-control"],
        "fit_prompts": None,
        "sweep": True,
        "coherence": True,
        "max_new_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "samples": 2,
        "out": Path("o"),
    }


def test_the_same_command_has_the_same_folder_and_another_has_another(calls: list[dict[str, Any]]) -> None:
    for words in (COMMAND, COMMAND, [*COMMAND, "--seed", "1"]):
        assert cli.main(words) == 0
    first, second, third = (call["out"] for call in calls)
    assert first == second != third
    assert first.parent == Path("runs") and first.name.startswith("compare-pocket-base-")
    assert default_out({"model": "/a b/é/../"}).name.startswith("compare-a-b-")


def test_json_on_stdout_stands_alone(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == RESULT
    assert "best-of-n:n=8" in err and "measuring" in err and "report.html" in err


def test_json_in_a_file(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main([*COMMAND, "--json", "x.json"]) == 0
    assert json.loads((tmp_path / "x.json").read_text()) == RESULT
    assert "best-of-n:n=8" in capsys.readouterr().out


def test_the_table_shows_intervals_bounds_and_costs() -> None:
    base, best = RESULT["policies"]
    assert cells(base, base)["tokens fwd"] == "1.0x"
    assert cells(best, base) == {
        "policy": "best-of-n:n=8",
        "reward": "0.83 ±0.02",
        "gold": "-",
        "wins vs base": "79% ±9%",
        "verdict": "better",
        "KL/token": "≤1.20",
        "NLL(base)": "1.42",
        "diversity": "0.042",
        "coherence": "-",
        "length": "19.0",
        "tokens fwd": "8.0x",
        "reward calls": "0",
        "s/answer": "0.013",
        "peak MB": "-",
        "fit s": "0.0",
        "fit tokens": "12,345",
    }
    out = io.StringIO()
    print_table(RESULT, out)
    # Not a terminal: one table, no line broken, no colour.
    assert [line.split()[0] for line in out.getvalue().splitlines()[1:4]] == ["policy", "base", "best-of-n:n=8"]
    assert "\x1b" not in out.getvalue()


def test_an_undefined_interval_is_shown_as_such() -> None:
    row = policy("base", 0.5, reward={"mean": 0.5, "low": None, "high": None}, nll_base_per_token=None)
    assert cells(row, row)["reward"] == "0.50 ±?" and cells(row, row)["NLL(base)"] == "-"
    row["win_rate"] = {"mean": 0.5, "low": None, "high": None}
    assert cells(row, row)["wins vs base"] == "50% ±?"
