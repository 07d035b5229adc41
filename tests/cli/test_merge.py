"""`trimtab merge`: the methods' verb, `run` and `inspect`; what is said, what is refused, what is written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from merge.stacked import read, shapes, stack, write
from trimtab.cli import main
from trimtab.merge import METHODS, engine


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models a (1), b (3) and base (0) of three layers."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1), ("b", 3), ("base", 0)):
        stack(tmp_path / name, 3, lambda _, value=value: value)
    return tmp_path


def random(here: Path) -> None:
    for seed, name in enumerate(("ra", "rb", "rbase")):
        stack(here / name, 3, seed=seed)


def merge(*words: str) -> int:
    return main(["merge", *words])


def value(folder: Path, name: str) -> float:
    tensor = read(folder)[name]
    assert tensor.unique().numel() == 1
    return float(tensor.flatten()[0])


UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("words", "up", "query"),
    [
        (["linear", "--models", "a", "b"], 2.0, 2.0),
        (["linear", "--models", "a", "b", "--weights", "3", "1"], 1.5, 1.5),
        (["linear", "--models", "a", "b", "--weights", "0..1", "1..0"], 2.0, 2.0),
        (["linear", "--models", "a", "b", "--weights", "-1..3", "-5e-1", "--normalize", "false"], -0.5, -0.5),
        (["linear", "--models", "a", "b", "--normalize", "false"], 4.0, 4.0),
        (["linear", "--models", "a", "b", "--normalize", "mlp=false", "true"], 4.0, 2.0),
        (["task-arithmetic", "--models", "a", "b", "--base", "base", "--weights", "0.5"], 2.0, 2.0),
        (["task-arithmetic", "--models", "a", "--base", "base", "--weights", "-1"], -1.0, -1.0),
        (["task-arithmetic", "--models", "a", "b", "--base", "base", "--lambda", "mlp=0.5", "2"], 2.0, 8.0),
        (["ties", "--models", "a", "b", "--base", "base", "--density=0.5", "--scale=2"], None, None),
    ],
)
def test_the_options_reach_the_method(words: list[str], up: float | None, query: float | None, here: Path) -> None:
    assert merge(*words, "--out", "out") == 0
    if up is not None:
        assert (value(here / "out", UP), value(here / "out", QUERY)) == (up, query)
    else:  # half of the entries: those of 2 x the mean of 1 and 3
        assert sorted(read(here / "out")[UP].unique().tolist()) == [0.0, 4.0]


def test_what_it_says_and_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linear", "--models", "a", "b", "--out", "out", "--max-shard-size", "200", "--dtype", "bfloat16"]
    assert merge(*words, "--json", "-") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (
        found["path"] == "out"
        and found["tensors"] == len(shapes(3))
        and found["warnings"]
        == [text.removeprefix("trimtab: warning: ") for text in said.err.splitlines() if "warning: " in text]
    )
    assert "merged: out" in said.err and "trimtab generate out PROMPT" in said.err
    assert len(list((here / "out").glob("model-*.safetensors"))) > 1
    assert all(tensor.dtype == torch.bfloat16 for tensor in read(here / "out").values())
    assert not list((here / "out").glob("*.partial"))


def test_the_same_command_continues(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after some tensors: exit code 130, nothing that loads; then the same bytes as without."""
    random(here)
    words = ["linear", "--models", "ra", "rb", "--threads", "1"]
    assert merge(*words, "--out", "whole") == 0
    capsys.readouterr()
    real, count = engine.merge_tensor, iter(range(100))

    def interrupted(*given: object, **more: object) -> object:
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "merge_tensor", interrupted)
    monkeypatch.setattr(engine, "SYNC_SECONDS", 0.0)
    assert merge(*words, "--out", "out") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not (here / "out" / "config.json").exists() and not list((here / "out").glob("*.safetensors"))
    monkeypatch.setattr(engine, "merge_tensor", real)
    assert merge(*words, "--out", "out") == 0
    assert re.search(r"of (them|it) earlier", capsys.readouterr().out)
    for name in ("model.safetensors", "config.json", "merge.yaml"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes(), name


ABO = ["--models", "a", "b", "--base", "base", "--out", "out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a method (linear, slerp,"),
        (["tiess", *ABO], "did you mean 'ties'"),
        (["inspct", "a", "--models", "a", "--out", "o"], "did you mean 'inspect'"),
        (["ties", *ABO, "--densty", "0.3"], "did you mean '--density'"),
        (["ties", *ABO, "--wieghts", "1"], "did you mean '--weights'"),
        (["ties", *ABO, "--density"], "--density needs a value"),
        (["ties", *ABO, "--density", "0.3", "--density", "0.4"], "given twice"),
        (["ties", *ABO, "--scale", "1", "--lambda", "1"], "given twice"),
        (["ties", *ABO, "--density", "much"], "density"),
        (["ties", *ABO, "--density", "1.5"], "between 0 and 1"),
        (["ties", *ABO, "--density", "0.1", "0.2", "0.3"], "3 values for 2 models"),
        (["ties", *ABO, "--density", "0.1..x"], "no gradient"),
        (["ties", *ABO, "--weights", "1", "1", "1"], "3 weights for 2 models"),
        (["ties", *ABO, "--weights", "1", "1", "1"], "give one a model"),
        (["ties", *ABO, "--weights", "0.5,0.5"], "by spaces"),
        (["ties", *ABO, "--weights", "x", "1"], "no number"),
        (["ties", *ABO, "--weights", "1e30", "--scale", "1e30"], "smaller --weights or --scale"),
        (["ties", *ABO[:-1], "a"], "--out a is the folder of the model 'a'"),
        (["ties", *ABO[:-1], "base/new"], "--out base/new lies in the folder of the model 'base'"),
        (["linear", "--models", "a", "bb", "--out", "out"], "no model folder 'bb'"),
        (["linear", "--models", "a", "", "--out", "out"], "the name of a model is empty"),
        (["ties", "--models", "a", "b", "--base", "", "--out", "out"], "the name of a model is empty"),
        (["linear", "--models", "pocket/bas", "nowhere", "--out", "out"], "2 problems: (1) unknown pocket model 'bas'"),
        (["ties", "--models", "a", "b", "--base", "bass", "--out", "out"], "did you mean 'base'"),
        (["linear", "--models", "a", "org/name", "--out", "out"], "hf download org/name"),
        (["ties", *ABO, "--dtype", "bf16"], "unknown dtype"),
        (["ties", *ABO, "--max-shard-size", "big"], "no size"),
        (["ties", *ABO, "--threads", "0"], "whole number of 1 or more"),
        (["ties", "--models", "a", "b", "--out", "out"], "give --base"),
        (["ties", "--models", "a", "--base", "base"], "--out"),
        (["ties", "--out", "out", "--base", "base"], "--models"),
        (["linear", "--models", "a", "nowhere", "--out", "out"], "nowhere"),
        (["linear", "--models", "a", "b", "--weights", "1", "-1", "--out", "out"], "sum to 0"),
        (["ties", *ABO, "--json", "no/such/x.json"], "there is no folder"),
        (["run"], "required"),
        (["run", "nothing.yaml", "--out", "out"], "cannot read nothing.yaml"),
        (["run", "x.yaml", "--out", "out", "--densty", "1"], "unknown option"),
        (["run", "x.yaml", "--out", "out", "--density", "1"], "--density stands in the file"),
        (["run", "x.yaml", "--out", "out", "--models", "a"], "--models stands in the file"),
        (["inspect"], "MODEL"),
        (["inspect", "a", "--bsae", "base"], "did you mean '--base'"),
        (["inspect", "a", "nowhere"], "nowhere"),
        (["inspect", "a", "--base", "nowhere"], "nowhere"),
        (["inspect", "a", "--out", "base"], "holds something else"),
        (["inspect", "a", "--out", "a/seen"], "lies in the folder of the model 'a'"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(
    words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    assert merge(*words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("trimtab: ")
    assert sorted(here.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["merge", "--help"], ["trimtab merge ties", "trimtab merge inspect", *METHODS]),
        (["merge", "run", "--help"], ["trimtab merge run merge.yaml", "mergekit"]),
        (["merge", "inspect", "--help"], ["trimtab merge inspect A B --base BASE"]),
    ],
)
def test_help_has_examples_and_needs_no_torch(words: list[str], wanted: list[str]) -> None:
    code = f"import sys; from trimtab.cli import main\ntry: main({words!r})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    assert "examples:" in done.stdout
    for text in wanted:
        assert text in done.stdout, text


def test_a_methods_help_has_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        merge("sce", "--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--select-topk VALUE  " in said and "examples:" in said and "--models" in said


# trimtab merge run

MERGEKIT = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {weight: [0, 1]}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {int8_mask: true}
dtype: float16
"""


def test_mergekits_form(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "theirs.yml").write_text(MERGEKIT)
    assert merge("run", "theirs.yml", "--out", "out", "--json", "-") == 0
    said = capsys.readouterr()
    json.loads(said.out)
    assert "note: int8_mask" in said.err and "note: dtype float16" in said.err
    assert value(here / "out", UP) == 0.5 * 1 + 0.5 * 3 and value(here / "out", "lm_head.weight") == 0.5 * 3
    assert read(here / "out")[UP].dtype == torch.float16
    assert yaml.safe_load((here / "out" / "merge.yaml").read_text())["depth"] == "mergekit"


def test_our_form_and_the_options_that_stand_for_its_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths in a file are relative to the working directory, wherever the file lies."""
    (here / "recipes").mkdir()
    text = "method: linear\nmodels: [a, b]\nweights: [3, 1]\ndtype: bfloat16\n"
    (here / "recipes" / "merge.yaml").write_text(text)
    assert merge("run", "recipes/merge.yaml", "--out", "out") == 0
    assert value(here / "out", UP) == 1.5 and read(here / "out")[UP].dtype == torch.bfloat16
    assert merge("run", "recipes/merge.yaml", "--out", "wide", "--dtype", "float32", "--seed", "3") == 0
    assert read(here / "wide")[UP].dtype == torch.float32
    assert yaml.safe_load((here / "wide" / "merge.yaml").read_text())["seed"] == 3


def test_a_merged_folders_recipe_makes_it_again(here: Path) -> None:
    random(here)
    words = ["ties", "--models", "ra", "rb", "--base", "rbase", "--density", "mlp=0.2,0.4", "0.2..0.9", "--out", "out"]
    assert merge(*words) == 0 and merge("run", "out/merge.yaml", "--out", "again") == 0
    for name in ("model.safetensors", "config.json", "merge.yaml"):
        assert (here / "out" / name).read_bytes() == (here / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: ties\nmodel: [a]\n", "did you mean 'models'"),
        ("methods: ties\nmodels: [a]\n", "did you mean 'method'"),
        ("method: tiess\nmodels: [a]\n", "did you mean 'ties'"),
        ("method: ties\nmodels: [a]\nbase: base\noptions: {densty: 1}\n", "did you mean 'density'"),
        ("merge_method: ties\nmodels: [{model: a}]\n", "x.yaml: merge_method ties needs base_model"),
        ("- 1\n", "no KEY: VALUE"),
    ],
)
def test_a_file_that_cannot_work(text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x.yaml").write_text(text)
    assert merge("run", "x.yaml", "--out", "out") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (here / "out").exists()


# trimtab merge inspect, and --report


class _Page(HTMLParser):
    """The text of a page's table cells, its pictures, and whether all its tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "path", "rect", "circle"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_inspect_writes_nothing_and_says_what_it_sees(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(here)
    before = sorted(here.rglob("*"))
    assert merge("inspect", "ra", "rb", "--base", "rbase", "--json", "-") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert sorted(here.rglob("*")) == before
    assert found["mergeable"] and found["problems"] == [] and found["models"] == ["ra", "rb"]
    assert "can be merged" in said.err and "mlp.up_proj" in said.err and "sign conflict" in said.err
    assert found["advice"] and all(one["text"] in " ".join(said.err.split()) for one in found["advice"])
    assert len(found["tensors"]) == len(shapes(3)) and "ra is no fine-tune of this base" in said.err
    assert f"{found['total']['sign_conflict']:.1%}" in said.err


def test_the_page_has_the_jsons_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(here)
    words = ["inspect", "ra", "rb", "--base", "rbase", "--out", "seen"]
    assert merge(*words) == 0 and "report: seen/report.html" in capsys.readouterr().out
    found = json.loads((here / "seen" / "merge-report.json").read_text())
    html = (here / "seen" / "report.html").read_text()
    cells = _Page(html).cells
    for one in [*found["modules"].values(), *found["layers"].values()]:
        assert f"{100 * one['sign_conflict']:.1f}\u202f%" in cells and f"{one['entries']:,}" in cells
    assert html.count("<svg") == 4 and "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "trimtab merge inspect ra rb" in html
    assert merge(*words) == 0 and (here / "seen" / "report.html").read_text() == html  # over its own, the same bytes


def test_inspect_of_models_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, since that is what was asked: every problem, and the geometry of what they have in common."""
    wide = {name: torch.ones(*shape[:-1], 5) for name, shape in shapes(2).items()}
    wide["model.norm.weight"] = torch.ones(4)
    write(here / "other", wide, 2)
    assert merge("inspect", "a", "other", "--json", "x.json") == 0
    found = json.loads((here / "x.json").read_text())
    assert not found["mergeable"] and len(found["problems"]) >= 2
    out = capsys.readouterr().out
    assert "cannot be merged as they are" in out and all(problem in out for problem in found["problems"])
    assert [one["name"] for one in found["tensors"]] == ["model.norm.weight"]
    assert merge("linear", "--models", "a", "other", "--out", "out") == 2  # and that is so
    assert not (here / "out").exists()


def test_inspect_without_a_base_and_of_one_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(here)
    assert merge("inspect", "ra", "rb") == 0
    assert "no common base" in capsys.readouterr().out
    assert merge("inspect", "ra", "--base", "ra") == 0
    assert "ra is the same as the base" in capsys.readouterr().out


def test_inspect_of_weights_that_are_not_finite(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = read(here / "a")
    tensors["lm_head.weight"][0, 0] = float("inf")
    write(here / "infinite", tensors, 3)
    assert merge("inspect", "infinite", "b", "--json", "-") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["not_finite"] == ["lm_head.weight"] and "lm_head.weight: not finite" in said.err
    assert not found["mergeable"] and "cannot be merged" in said.err and "can be merged." not in said.err


def test_inspect_takes_the_option_that_it_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "half", {name: tensor.half() for name, tensor in read(here / "b").items()}, 3)
    assert merge("inspect", "a", "half", "b") == 0
    assert "give --dtype float32 or float16" in capsys.readouterr().out
    assert merge("inspect", "a", "half", "b", "--dtype", "float32") == 0
    assert "These can be merged." in capsys.readouterr().out


def test_what_to_do_next_can_be_pasted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("linear", "--models", "a", "b", "--out", "an ö ut") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("use it: "))
    assert shlex.split(line)[2:] == ["trimtab", "generate", "an ö ut", "PROMPT"]


def test_a_report_on_a_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(here)
    words = ["slerp", "--models", "ra", "rb", "--t", "0.25", "--out", "out", "--report"]
    assert merge(*words) == 0
    assert "report: out/report/report.html" in capsys.readouterr().out
    found = json.loads((here / "out" / "report" / "merge-report.json").read_text())
    assert found["recipe"]["options"] == {"t": 0.25} and found["total"]["merged"]["kept_density"] == 1.0
    by_name = {one["name"]: one for one in found["tensors"]}
    assert by_name[UP]["settings"] == {"weights": [1.0, 1.0], "t": 0.25}
    branch = by_name[UP]["method"]["branch"]  # what slerp says of each tensor
    count = sum(tensor["method"]["branch"] == branch for tensor in found["tensors"])
    assert any(f"{branch} in {count} tensors" in text for text in found["method"])
    one, two, merged = (read(here / name)[UP].double().flatten() for name in ("ra", "rb", "out"))
    assert by_name[UP]["merged"]["kept_of"] == pytest.approx(
        [float(merged @ one / (one @ one)), float(merged @ two / (two @ two))], rel=1e-9
    )
    names = {path.name for path in (here / "out").iterdir()}
    assert not {"merge-report.json", "report.html"} & names  # the model's own folder stays clean
    _Page((here / "out" / "report" / "report.html").read_text())


def test_a_report_on_slices_says_that_there_is_none(here: Path) -> None:
    text = "method: linear\nmodels: [a, b]\nslices:\n" + "".join(
        f"- sources: [{{model: {name}, layers: {layers}}}]\n" for name, layers in (("a", "[0, 2]"), ("b", "[1, 3]"))
    )
    (here / "x.yaml").write_text(text)
    assert merge("run", "x.yaml", "--out", "out", "--report") == 0
    found = json.loads((here / "out" / "report" / "merge-report.json").read_text())
    assert found["total"] is None and any("slices" in warning for warning in found["warnings"])
    assert value(here / "out", "model.layers.3.mlp.up_proj.weight") == 3


def test_the_page_calls_models_by_the_ends_of_their_paths(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(here)
    assert merge("inspect", str(here / "ra"), str(here / "rb"), "--base", "rbase", "--out", "seen") == 0
    html = (here / "seen" / "report.html").read_text()
    assert "<strong>ra, rb</strong>" in html and "moved: ra" in html
    (here / "deep").mkdir()
    (here / "rb").rename(here / "deep" / "ra")
    assert merge("inspect", "ra", "deep/ra", "--base", "rbase", "--out", "both") == 0
    assert "<strong>ra, deep/ra</strong>" in (here / "both" / "report.html").read_text()
