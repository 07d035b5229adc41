"""The files around a merged model's weights: the card says what was done, and doing it again gives the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from merge.stacked import stack
from trimtab import __version__
from trimtab.merge.card import model_card
from trimtab.merge.engine import run
from trimtab.merge.plan import make_plan
from trimtab.merge.recipe import Recipe, read_yaml
from trimtab.merge.source import Folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models a, b and base."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "base")):
        stack(tmp_path / name, 2, seed=seed)
    return tmp_path


TIES = Recipe(
    "ties", ("a", "b"), "base", [0.7, [0.1, 0.9]], {"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.6}]}
)


def front(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_says_what_was_merged(here: Path) -> None:
    run(TIES, "out", command="trimtab merge ties --models a b ...")
    card = (here / "out" / "README.md").read_text()
    assert front(card) == {
        "base_model": ["a", "b", "base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "trimtab", "ties"],
    }
    assert "trimtab merge ties --models a b ..." in card and f"trimtab {__version__}" in card
    for name in ("a", "b", "base"):
        assert f"| `{name}` |" in card and Folder(name).fingerprint in card
    written = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert written and Recipe.from_dict(yaml.safe_load(written.group(1))) == TIES
    assert str(here) not in card  # no path but those that the user gave


def test_the_recipe_makes_the_same_bytes_again(here: Path) -> None:
    run(TIES, "out", command="first")
    run(Recipe.from_dict(read_yaml("out/merge.yaml")), "again", command="first")
    for name in ("model.safetensors", "config.json", "merge.yaml", "README.md"):
        assert (here / "out" / name).read_bytes() == (here / "again" / name).read_bytes(), name


def test_the_config_is_written_last(here: Path) -> None:
    run(TIES, "out")
    rows = [json.loads(line) for line in (here / "out" / "events.jsonl").read_text().splitlines()]
    saved = [row["key"] for row in rows if row["event"] == "saved"]
    assert saved[-1] == "config.json" and {"README.md", "merge.yaml"} < set(saved)


def test_warnings_odd_names_and_no_command(here: Path) -> None:
    odd = here / "ein | Ordner `x`"
    (here / "a").rename(odd)
    plan = make_plan(Recipe("linear", (odd.name, str(here / "b"))))
    plan.warnings.append("something\nto know")
    card = model_card(plan, "")
    assert "## Warnings" in card and "- something to know\n" in card
    assert "`ein \\| Ordner 'x'`" in card  # a table's cell, a code span
    assert front(card)["base_model"] == [odd.name, "b"]  # an absolute path is of no use to others
    assert "The command" not in card and "```bash\ntrimtab merge run DIR/merge.yaml" in card
    del plan.warnings[:]
    assert "## Warnings" not in model_card(plan, "")
