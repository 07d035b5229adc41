"""Benchmark files by format: golden fixtures, sniffing, the shapes of published files, and everything that is refused."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.measure.adapters import ADAPTERS, read_items, sniff

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text())
FILES = {path.name.partition(".")[0]: path for path in FIXTURES.iterdir() if path.name != "golden.json"}


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_there_are_thirteen_adapters_and_a_fixture_of_each() -> None:
    assert len(ADAPTERS) == 13
    assert set(FILES) == set(GOLDEN) == set(ADAPTERS)
    assert all(len(items) == 5 for items in GOLDEN.values())


@pytest.mark.parametrize("adapter", sorted(FILES))
def test_fixtures_are_sniffed_and_read_as_written(adapter: str) -> None:
    assert sniff(FILES[adapter]) == adapter
    assert read_items(FILES[adapter]) == read_items(FILES[adapter], adapter) == GOLDEN[adapter]


@pytest.mark.parametrize("adapter", sorted(set(FILES) - {"parallel"}))
def test_items_survive_other_formats(adapter: str, tmp_path: Path) -> None:
    """The same rows as .json, .jsonl.gz and .parquet give the same items."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trimtab.measure.adapters import _rows

    rows = [dict(row) for _, row in _rows(FILES[adapter])]
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    for name in ("rows.json", "rows.jsonl.gz"):
        assert read_items(tmp_path / name) == GOLDEN[adapter], name
    if adapter not in ("mc", "em-bank", "open-judge"):  # their rows differ in types or keys: no table
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        assert read_items(tmp_path / "rows.parquet") == GOLDEN[adapter]


MC = {"answer": 1, "answers": [1]}
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mc", {"question": "Q", "A": "a", "B": "b", "C": "c", "D": "d", "Answer": "B"}, MC | {"options": list("abcd")}),
    ("mc", {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, MC),
    ("mc", {"question": {"stem": "Q", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
            "answerKey": "B"}, MC | {"question": "Q", "options": ["a", "b"]}),
    ("mc", {"ctx": "He sits", "endings": ["a", "b", "c", "d"], "label": "1"}, MC | {"question": "He sits"}),
    ("mc", {"question": "Q", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, MC),
    ("mc", {"question": "Q", "mc1_targets": {"a": 0, "b": 1, "c": 1}}, {"answer": 1, "answers": [1, 2]}),
    ("mc", {"sentence": "The _ fell.", "option1": "cup", "option2": "cat", "answer": "2"},
     MC | {"question": "The", "options": ["cup fell.", "cat fell."]}),
    ("mc", {"context": "C", "question": "Q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1, "category": "Age"},
     MC | {"question": "C\nQ", "subject": "Age"}),
    ("mc", {"question": "Q", "options": ["a", "b"], "answer": 1, "category": "Ethics"}, MC),
    ("mc", {"scenario": "I am late", "excuse": "because of rain", "label": "1"}, MC | {"options": ["No", "Yes"]}),
    ("pair", {"prompt": "P", "chosen": "c", "rejected": "r", "subset": "s"},
     {"prompt": "P", "chosen": "c", "rejected": "r", "subset": "s"}),
    ("pair", {"prompt": "P", "chosen": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "c"}],
              "rejected": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "r"}]},
     {"prompt": "P", "chosen": "c", "rejected": "r"}),
    ("pair", {"chosen": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "c"}],
              "rejected": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "r"}]},
     {"prompt": [{"role": "user", "content": "P"}], "chosen": "c", "rejected": "r"}),
    ("pair", {"prompt": "P", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
     {"chosen": "b", "rejected": "a"}),
    ("pair", {"history": "P", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, {"chosen": "b", "rejected": "a"}),
    ("pair", {"prompt": "P", "response_1": "a", "response_2": "b", "preference_strength": -2}, {"chosen": "a"}),
    ("open-judge", {"instruction": "I", "output": "o", "generator": "g", "dataset": "d"},
     {"prompt": "I", "turns": ["I"], "category": "d", "reference": "o"}),
    ("open-judge", {"question_id": "x", "cluster": "c", "turns": [{"content": "I"}]}, {"prompt": "I", "category": "c"}),
    ("open-judge", {"conversation_input": [{"role": "user", "content": "I"}], "primary_tag": "t"}, {"prompt": "I"}),
    ("refusal", {"goal": "g", "target": "Sure"}, {"prompt": "g", "should_refuse": True}),
    ("refusal", {"Behavior": "b", "SemanticCategory": "c"}, {"prompt": "b", "should_refuse": True, "category": "c"}),
    ("refusal", {"category": "c", "source": "s", "forbidden_prompt": "f"}, {"prompt": "f", "should_refuse": True}),
    ("refusal", {"id": 1, "risk_area": "r", "question": "q"}, {"prompt": "q", "should_refuse": True, "category": "r"}),
    ("refusal", {"prompt": "p", "should_refuse": "false"}, {"should_refuse": False}),
    ("refusal", {"prompt": "p", "type": "contrast_homonyms"}, {"should_refuse": True}),
    ("toxicity-prompt", {"text": "t", "toxicity_human": 3.0, "target_group": "g"}, {"prompt": "t", "toxicity": 3.0}),
    ("contrast-likelihood", {"context": "The BLANK sat.", "bias_type": "race", "sentences": [
        {"sentence": "A sat.", "gold_label": "stereotype"}, {"sentence": "B sat.", "gold_label": "anti-stereotype"},
        {"sentence": "C sat.", "gold_label": "unrelated"}]}, {"sent_more": "A sat.", "sent_less": "B sat."}),
    ("contrast-likelihood", {"pro_stereotyped": "p", "anti_stereotyped": "a"}, {"sent_more": "p", "sent_less": "a"}),
    ("verify", {"problem": "P", "solution": "so \\boxed{\\frac12}", "level": "1", "type": "t"}, {"kind": "boxed"}),
    ("verify", {"task_id": "t/0", "prompt": "def f():", "canonical_solution": " return 1", "test": "def check(f): 0",
                "entry_point": "f"}, {"kind": "function", "entry_point": "f", "reference": " return 1"}),
    ("verify", {"text": "T", "code": "c", "test_list": ["assert 1"], "test_setup_code": ""},
     {"kind": "asserts", "tests": ["assert 1"], "setup": ""}),
    ("verify", {"key": 1, "prompt": "P", "instruction_id_list": ["a:b"], "kwargs": [{}]}, {"kind": "instructions"}),
    ("parallel", {"eng_Latn": "a", "deu_Latn": "b"}, {"texts": {"eng_Latn": "a", "deu_Latn": "b"}}),
    ("statement-pair", {"harmful": "h", "safe": "s"}, {"harmful": "h", "safe": "s"}),
    ("labelled-text", {"text": "t", "is_harmful": 1}, {"safe": False, "label": "1"}),
    ("labelled-text", {"text": "t", "label": 1}, {"safe": None, "label": "1"}),
    ("triplet", {"i": "cat", "j": "dog", "k": "cup", "odd": "k"}, {"odd": "cup"}),
    ("belief-mc", {"question": "Q", "answer_matching_behavior": [" Yes"], "answer_not_matching_behavior": " No"},
     {"options": ["Yes", "No"], "matching": 0, "letters": []}),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "row", "expected"), SHAPES)
def test_shapes_of_published_files(adapter: str, row: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, "file.jsonl", [row])
    assert sniff(path) == adapter
    (item,) = read_items(path)
    assert {name: item[name] for name in expected} == expected


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_wrong_columns_are_named_with_those_expected(adapter: str, tmp_path: Path) -> None:
    path = write(tmp_path, "file.jsonl", [{"colour": "red", "size": 3}])
    with pytest.raises(UsageError, match="colour, size") as error:
        read_items(path, adapter)
    wanted = {"parallel": "language", "pair": "chosen, prompt, rejected", "em-bank": "id, paraphrases"}
    assert wanted.get(adapter, "expected the columns ") in str(error.value)
    with pytest.raises(UsageError, match="fits no adapter.*--adapter"):
        sniff(path)


@pytest.mark.parametrize(
    ("name", "content", "both"),
    [
        ("list.txt", "one\ntwo\n", ("refusal", "open-judge", "toxicity-prompt")),
        ("prompts.jsonl", '{"prompt": "one"}\n', ("refusal", "open-judge")),
        ("topics.csv", "prompt,category\none,a\n", ("refusal", "open-judge")),
        ("both.jsonl", '{"i": 1, "j": 2, "k": 3, "harmful": "h", "safe": "s"}\n', ("triplet", "statement-pair")),
    ],
)
def test_ambiguous_files_are_refused(name: str, content: str, both: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match="say which with --adapter") as error:
        read_items(path)
    assert all(adapter in str(error.value) for adapter in both)
    assert read_items(path, both[0])  # named, it is read


def test_a_list_of_lines_is_prompts_that_should_be_refused_once_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("one\ntwo\n")
    assert [(item["prompt"], item["should_refuse"]) for item in read_items(path, "refusal")] == [
        ("one", True),
        ("two", True),
    ]


def test_malformed_rows_are_located_and_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    good = '{"question": "Q", "choices": ["a", "b"], "answer": 0}'
    path.write_text(f'{good}\n{good.replace("0", "7")}\n{{"question": "Q"}}\n{good}\n{good.replace("a", "", 1)}\n')
    with pytest.raises(UsageError, match=r"file\.jsonl:2: the answer points to none.*3 malformed rows.*3, 5"):
        read_items(path, "mc")
    path.write_text(f"{good}\n{{broken\n\n[1]\n")
    with pytest.raises(UsageError, match=r"file\.jsonl:2: not JSON.*\(3 malformed rows in all; the others: 3, 4\)"):
        read_items(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,should_refuse\none,true\ntwo\n", r"a\.csv:3: 1 cells where the header has 2"),
        ("a.csv", b'prompt,should_refuse\n"one,true\n', r"a\.csv:\d: unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("a.csv", b"prompt,should_refuse\none,perhaps\n", r"a\.csv:2: should_refuse is 'perhaps'"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.json", b"{", "cannot be read"),
        ("a.json", b"[1, 2]", r"a\.json:1: an object is needed \(2 malformed"),
        ("a.yaml", b"a: [", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "no whole gzip file"),
        ("a.parquet", b"nothing", "cannot be read as parquet"),
        ("a.xlsx", b"x", "read by their ending"),
        ("a.jsonl", b'{"image": "a.png", "question": "what?", "answer": "b"}\n', "only text is implemented"),
        ("a.csv", b"i,j,k\n1,2,2\n", "three different items"),
    ],
)
def test_bad_files_are_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_items(tmp_path / name)


def test_any_value_in_any_column_is_read_or_refused(tmp_path: Path) -> None:
    """Every form with values of every kind: items, or a `UsageError` that names the line; nothing else."""
    from trimtab.measure.adapters import FORMS

    draw = random.Random(0)
    messages = [[{"role": "user"}], [{"role": "user", "content": "a"}], [{}], [[]]]
    objects = [{}, {"text": "a"}, {"choices": ["a"], "labels": [1]}]
    plain = [None, True, 0, -1, 3, 1e400, "", " ", "a", "1", "(A)", [], ["a"], [1, 2], ["a", "b"]]
    values: list[Any] = [*plain, *objects, *messages]
    path = tmp_path / "file.jsonl"
    read = 0
    for form in FORMS * 12:
        names = [name for name in form.columns if "." not in name] or ["eng_Latn", "deu_Latn"]
        path.write_text(json.dumps({name: draw.choice(values) for name in names}) + "\n")
        try:
            read += len(read_items(path, form.adapter))
        except UsageError as error:
            assert "file.jsonl" in str(error)
    assert read > 20  # some are good


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "bank.yaml"
    path.write_text(f"- !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UsageError, match="could not determine a constructor"):
        read_items(path, "em-bank")
    assert not (tmp_path / "made").exists()


def test_names_that_are_no_adapters() -> None:
    with pytest.raises(UsageError, match="unknown adapter 'refusals'; did you mean 'refusal'"):
        read_items(FILES["refusal"], "refusals")
    with pytest.raises(UsageError, match="for images: only text"):
        read_items(FILES["mc"], "image-mc")
    with pytest.raises(UsageError, match="cannot read .*absent"):
        read_items("absent.jsonl")


def test_folders_must_be_line_aligned(tmp_path: Path) -> None:
    (tmp_path / "eng_Latn.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="two files or more"):
        sniff(tmp_path)
    (tmp_path / "deu_Latn.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match="deu_Latn 3, eng_Latn 2"):
        read_items(tmp_path)
    (tmp_path / "deu_Latn.txt").write_text("a\n\n")
    (tmp_path / "eng_Latn.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=r"eng_Latn|deu_Latn\.txt:2|not line-aligned"):
        read_items(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        read_items(FIXTURES / "parallel", "pair")


def test_files_without_a_header_are_known_by_their_shape(tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text('1\ta "good film\n0\tbad\n1\tfine\n0\tpoor\n')
    assert read_items(tmp_path / "labels.tsv")[0] == {"text": 'a "good film', "label": "1", "safe": None, "axiom": ""}
    (tmp_path / "odd.txt").write_text("0 1 2\n5 3 4\n")
    assert read_items(tmp_path / "odd.txt")[1] == {"i": 5, "j": 3, "k": 4, "odd": 4}
    (tmp_path / "exam.csv").write_text("What is 1+1?,1,2,3,4,B\n")
    assert read_items(tmp_path / "exam.csv")[0]["answer"] == 1


def test_transcripts_are_split_where_both_still_agree() -> None:
    """prompt + answer is the transcript again, whatever the answers quote."""
    for item, line in zip(GOLDEN["pair"], FILES["pair"].read_text().splitlines(), strict=True):
        row = json.loads(line)
        assert item["prompt"] + item["chosen"] == row["chosen"]
        assert item["prompt"] + item["rejected"] == row["rejected"]
        assert item["prompt"].endswith("\n\nAssistant:")


@pytest.mark.parametrize(
    ("file", "adapter", "count"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", "pair", 2312),
        ("sst2/dev.tsv", "labelled-text", 872),
        ("gsm8k/test.jsonl", "verify", 1319),
        ("humaneval/HumanEval.jsonl.gz", "verify", 164),
        ("anthropic-evals/power-seeking-inclination.jsonl", "belief-mc", 998),
        ("anthropic-evals/survival-instinct.jsonl", "belief-mc", 953),
    ],
)
def test_real_files_are_sniffed_and_every_row_is_read(file: str, adapter: str, count: int, shared: Path) -> None:
    assert sniff(shared / "data" / file) == adapter
    assert len(read_items(shared / "data" / file)) == count
