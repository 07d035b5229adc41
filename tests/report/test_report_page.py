"""The report file: its numbers are the run's, hostile text stays text, nothing is requested, the bytes are stable."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from report.synthetic import make, write
from trimtab.errors import UsageError
from trimtab.report import render, write_report

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Page(HTMLParser):
    """Tags with their attributes, the text outside script and style, and the cells of the main table."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[tuple[str, Any]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self._inside: list[tuple[str, dict[str, str | None]]] = []
        self._quad: dict[str, int] = {}
        self._q = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        got = dict(attrs)
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag in ("script", "style"):
            self._inside.append((tag, got))
        if "data-key" in got:
            self.cells.append((str(got["data-key"]), json.loads(str(got["data-value"]))))
        if got.get("class") == "quad":
            self._quad = self.counts.setdefault(str(got["data-method"]), {})
        self._q = str(got["data-q"]) if tag == "button" and "data-q" in got else self._q
        if "data-count" in got:
            self._quad[self._q] = int(str(got["data-count"]))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)
        elif self._inside[-1][0] == "script":
            self.scripts.append((self._inside[-1][1], data))

    @property
    def all_text(self) -> str:
        return "".join(self.text)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(body for attributes, body in self.scripts if attributes.get("id") == "data"))


def draw(parts: dict[str, Any]) -> str:
    return render(parts["compare"], parts["samples"], parts["sweep"], parts["run"])


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return make()


@pytest.fixture(scope="module")
def html(parts: dict[str, Any]) -> str:
    return draw(parts)


def test_every_number_of_compare_json_is_on_the_page(parts: dict[str, Any], html: str) -> None:
    cells = iter(Page(html).cells)
    for policy in parts["compare"]["policies"]:
        kl = "kl_bound" if policy["kl_bound"] is not None else "kl_per_token"
        for key in ("reward", "gold", "win_rate", kl, "nll_base_per_token", "diversity", "coherence", "length_tokens"):
            assert next(cells) == (key, policy[key])
        for key, value in policy["cost"].items():
            assert next(cells) == (f"cost.{key}", value)
    assert next(cells, None) is None


def test_text_shows_the_same_numbers_as_the_data(parts: dict[str, Any], html: str) -> None:
    text = Page(html).all_text
    for policy in parts["compare"]["policies"]:
        reward = policy["reward"]
        assert f"{reward['mean']:.3f}[{reward['low']:.3f}, {reward['high']:.3f}]" in text
    bound = next(p for p in parts["compare"]["policies"] if p["kl_bound"] is not None)
    assert f"≤ {bound['kl_bound']:.3f}" in text


def test_win_and_loss_counts_equal_a_count_of_the_samples(parts: dict[str, Any], html: str) -> None:
    gold = {(r["policy"], r["prompt_index"], r["sample"]): r["gold"] >= 0.5 for r in parts["samples"]}
    names = {(True, True): "both", (True, False): "base", (False, True): "method", (False, False): "neither"}
    for method, counts in Page(html).counts.items():
        keys = [key[1:] for key in gold if key[0] == method]
        expected = Counter(names[gold["base", *key], gold[method, *key]] for key in keys)
        assert counts == {name: expected[name] for name in names.values()}


def test_downloads_hold_the_samples(parts: dict[str, Any], html: str) -> None:
    data = Page(html).data
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    key = ("policy", "prompt_index", "sample")
    wanted = {tuple(row[k] for k in key): row for row in parts["samples"]}
    assert len(rows) == len(wanted)
    for row in rows:
        assert row == {k: wanted[tuple(row[k] for k in key)][k] for k in data["columns"]}


def test_same_input_same_bytes(parts: dict[str, Any], html: str, tmp_path: Path) -> None:
    assert draw(copy.deepcopy(parts)) == html
    folder = write(tmp_path / "run", parts)
    path = write_report(folder)
    first = path.read_bytes()
    assert path == folder / "report.html" and write_report(folder).read_bytes() == first
    assert {p.name for p in folder.iterdir()} == {
        *("compare.json", "samples.jsonl", "sweep.json", "run.json", "report.html")
    }


def test_nothing_is_requested_from_anywhere(html: str) -> None:
    page = Page(html)
    policies = [value for tag, key, value in page.attributes if tag == "meta" and key == "content" and "src" in value]
    assert policies == [CSP]
    for tag, key, value in page.attributes:
        assert key not in ("src", "srcset", "background", "poster", "action", "ping") and not key.startswith("on"), tag
        if key in ("href", "xlink:href"):
            assert value.startswith("#") or value == "data:,"
    assert not page.tags.keys() & {"img", "iframe", "object", "embed", "base", "form", "audio", "video"}
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    script = page.scripts[-1][1]
    assert len(script) < 15_000
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp|import\(", script
    )


HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>alert(2)</script> --><b onclick='x()'>bold</b>",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "x" * 10_000,
    "\U0001f980\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "",
    "\ud800 lone surrogate \x00 nul \x1b[31m",
    "{{ 7 * 7 }} {% raw %} ${x} &lt;already&gt; &amp;",
    "\u2028line separators\u2029",
    '"quotes" and \'apostrophes\' and `ticks` = "=cmd()"',
]


def poisoned() -> dict[str, Any]:
    parts = make(prompts=10, samples=1)
    for row in parts["samples"]:
        text = HOSTILE[row["prompt_index"] % len(HOSTILE)]
        row["text"], row["prompt"], row["family"] = text, text, text
        if row["trace"]:
            row["trace"]["pieces"][0] = text
    return parts


def test_hostile_text_renders_as_text() -> None:
    html = draw(poisoned())
    assert html.encode("utf-8")
    page, plain = Page(html), Page(draw(make(prompts=10, samples=1)))
    # An empty answer loses the span of a shared beginning; nothing may appear that a harmless run does not have.
    assert page.tags.keys() == plain.tags.keys()
    for tag in ("script", "style", "meta", "link", "button", "table", "section", "article"):
        assert page.tags[tag] == plain.tags[tag], tag
    assert not [a for a in page.attributes if a[1].startswith("on")]
    for text in HOSTILE:
        if "\ud800" not in text and len(text) < 4000:
            assert text in page.all_text
    assert "\ufffd lone surrogate \ufffd nul \ufffd[31m" in page.all_text
    assert "(empty answer)" in page.all_text
    assert "x" * 10_000 in page.all_text  # a picked pair shows the whole answer ...
    assert "6,000 more characters" in page.all_text  # ... the table says what it leaves out
    found = {row[page.data["columns"].index("text")] for row in page.data["rows"]}
    assert set(HOSTILE[:3]) <= found


def test_hostile_names_render_as_text() -> None:
    parts = make(prompts=6, samples=1)
    name = 'evil"><script>alert(1)</script>'
    parts["compare"]["policies"][2]["name"] = name
    parts["compare"]["policies"][2]["settings"] = {name: name}
    for key in ("model", "reward", "gold"):
        parts["compare"][key] = name
    for row in parts["samples"]:
        row["policy"] = name if row["policy"] == "static-re" else row["policy"]
    parts["sweep"]["families"][0]["family"] = name
    parts["run"]["arguments"] = {name: name}
    page = Page(draw(parts))
    assert page.tags["script"] == 2 and name in page.all_text


def test_size_stays_below_3_mb() -> None:
    parts = make(prompts=500, samples=1, names=["base", "natural-control"])
    assert len(draw(parts).encode()) < 3_000_000
    for row in parts["samples"]:
        row["text"] = row["text"] * 200  # some 8,000 characters each
    html = draw(parts)
    assert len(html.encode()) < 3_000_000
    assert re.search(r"This page holds the first \d+ of 500 rows", html)


def test_500_samples_by_six_policies_all_fit() -> None:
    html = draw(make(prompts=500, samples=1))
    assert len(html.encode()) < 3_000_000 and "This page holds the first" not in html


def test_without_gold_sweep_or_run() -> None:
    parts = make(gold=False)
    text = Page(render(parts["compare"], parts["samples"], None, None)).all_text
    assert "No gold reward" in text and "above the base's median" in text and "Turning the dial up" not in text
    with_sweep = Page(draw(parts)).all_text
    assert "no gold reward was measured" in with_sweep


def test_one_prompt_one_sample_and_missing_intervals() -> None:
    parts = make(prompts=1, samples=1)
    for policy in parts["compare"]["policies"]:
        for key in ("reward", "gold", "win_rate", "kl_per_token"):
            if policy[key]:
                policy[key] |= {"low": None, "high": None}
        policy["verdict"] = "base" if policy["name"] == "base" else "undecided"
    text = Page(draw(parts)).all_text
    assert "Few prompts" in text and "Undecided" in text and "nan" not in text.lower()


def test_scores_that_could_not_be_judged_are_dashes() -> None:
    parts = make(prompts=8, samples=1)
    for row in parts["samples"]:
        if row["prompt_index"] < 3:
            row["reward"], row["gold"] = None, math.nan
    text = Page(draw(parts)).all_text
    assert "reward –" in text and "could not be judged" in text and "Could not judge" in text


def test_only_the_base_and_only_required_keys() -> None:
    parts = make(prompts=4, samples=1, names=["base"])
    assert "no second policy" in Page(draw({**parts, "sweep": None})).all_text
    bare = {"policies": [{"name": "base", "reward": {"mean": 0.5}}, {"name": "x", "reward": {"mean": 0.7}}]}
    rows = [{"policy": n, "prompt_index": 0, "sample": 0, "prompt": "p", "text": n} for n in ("base", "x")]
    assert "0.700" in Page(render(bare, rows)).all_text


def test_errors_name_the_file_the_line_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory.*trimtab compare"):
        write_report(tmp_path / "none")
    with pytest.raises(UsageError, match="compare.json is missing"):
        write_report(tmp_path)
    folder = write(tmp_path / "run", make(prompts=2, samples=1))
    (folder / "samples.jsonl").write_text('{"policy": "base"}\n')
    with pytest.raises(UsageError, match="line 1: prompt_index, sample, prompt, text missing"):
        write_report(folder)
    (folder / "samples.jsonl").write_text("\n{broken\n")
    with pytest.raises(UsageError, match="line 2: not JSON"):
        write_report(folder)
    (folder / "compare.json").write_text('{"schema": 2, "policies": []}')
    (folder / "samples.jsonl").write_text("")
    with pytest.raises(UsageError, match="schema 2"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_figures_have_a_text_alternative_and_controls_are_reachable(html: str) -> None:
    opened = re.findall(r"<svg [^>]*>", html)
    assert opened and all("aria-label=" in tag or "aria-hidden=" in tag for tag in opened)
    assert html.count("<figure") == html.count("<figcaption")
    assert not re.search(r'tabindex="[1-9]', html)
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_the_command_is_put_together_from_the_arguments() -> None:
    parts = make(prompts=2, samples=1)
    arguments = {"model": "pocket/base", "reward": "length:target=30", "policies": ["best-of-n:n=8"], "seed": 3}
    parts["run"] = {"arguments": {**arguments, "prompts": [f"prompt {i}" for i in range(50)]}}
    text = Page(draw(parts)).all_text
    assert "trimtab compare pocket/base --reward length:target=30 --prompts prompts.jsonl" in text
    assert "--policy best-of-n:n=8 --seed 3" in text
    assert "... 47 more in run.json" in text and "prompt 40" not in text
