"""Vocabularies: refused where they differ, and made one where that is asked for: rows by tokens, tokenizer, template, ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from merge_folders import config_of, merge, reconfigure, refused, rewrite, save, tensors
from tiny import CHAT, tiny_tokenizer
from trimtab.lm import LM
from trimtab.merge import Recipe, run
from trimtab.merge.heads import token_tensors
from trimtab.merge.plan import make_plan
from trimtab.merge.remapped import remap
from trimtab.merge.source import Folder
from trimtab.merge.vocabulary import read_vocabularies

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tokens(*tokens: str, kind: str = "word", chat: str | None = None) -> Any:
    """The tiny tokenizer with added tokens."""
    found = tiny_tokenizer(kind, chat=chat)
    found.add_tokens(list(tokens))
    return found


def permuted(folder: Path, to: Path, seed: int = 0) -> Path:
    """A copy of a model whose tokens have other ids, and its rows their order: the same model."""
    data = json.loads((folder / "tokenizer.json").read_text())
    size = len(data["model"]["vocab"])
    order = np.random.default_rng(seed).permutation(size)  # old id -> new id
    data["model"]["vocab"] = {token: int(order[i]) for token, i in data["model"]["vocab"].items()}
    for one in data["added_tokens"]:
        one["id"] = int(order[one["id"]])
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / "tokenizer.json").write_text(json.dumps(data))
    changes: dict[str, Tensor | None] = {}
    for name, tensor in tensors(folder).items():
        if name in (EMBEDDING, HEAD, "lm_head.bias"):
            changes[name] = tensor.clone()
            changes[name][torch.from_numpy(order)] = tensor[:size]
    rewrite(to, **changes)
    ids = {key: int(order[value]) for key, value in config_of(folder).items() if key.endswith("_token_id")}
    reconfigure(to, **ids)
    return to


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "slerp"])
@pytest.mark.parametrize("rows", [59, 64])
def test_a_model_merged_with_a_permuted_copy_of_itself_is_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, rows: int
) -> None:
    """Bit for bit: x/2 + x/2 and x + 0 are exact; slerp's sines are not (their rounding: 1e-6 of weights below 4)."""
    a = save(tmp_path / "a", rows=rows)
    b = permuted(a, tmp_path / "b")
    base = ["--base", a] if method in ("task-arithmetic", "ties") else []
    words = [method, "--models", a, b, "--tokenizer", a, *base]
    code, said = merge(capsys, *words, "--out", tmp_path / "out")
    assert code == 0, said
    before, after = tensors(a), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, rtol=0, atol=4e-6 if method == "slerp" else 0), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    assert config_of(tmp_path / "out") == config_of(a)


@pytest.mark.parametrize("arch", ["phi", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_every_architecture_s_tables_are_permuted(tmp_path: Path, arch: str) -> None:
    """In the copy's own order the merge is the copy: heads, tied heads and their biases (phi)."""
    a = save(tmp_path / "a", arch=arch)
    order = np.random.default_rng(1).permutation(59)
    names = [name for name, tensor in tensors(a).items() if tensor.shape[0] == 59]
    b = permuted(a, tmp_path / "b", seed=1)
    shuffled = {name: torch.empty_like(tensors(a)[name]) for name in names}
    for name in names:
        shuffled[name][torch.from_numpy(order)] = tensors(a)[name]
    rewrite(b, **shuffled)
    run(Recipe("linear", (str(a), str(b)), tokenizer=str(b)), tmp_path / "out")
    for name, tensor in tensors(b).items():
        assert torch.equal(tensors(tmp_path / "out")[name], tensor), name
    assert names and config_of(tmp_path / "out")["eos_token_id"] == config_of(b)["eos_token_id"] == order[2]


def test_positions_as_many_as_tokens_are_no_tokens(tmp_path: Path) -> None:
    a = save(tmp_path / "a", arch="gpt2", n_positions=59)
    assert token_tensors(Folder(a)) == ("transformer.wte.weight",)


def test_without_a_choice_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a")
    b = permuted(a, tmp_path / "b")
    line = refused(capsys, tmp_path / "out", "linear", "--models", a, b)
    assert "another vocabulary" in line and "other ids" in line and "--tokenizer union or one of the models" in line
    padded = save(tmp_path / "padded", rows=64)
    line = refused(capsys, tmp_path / "out", "ties", "--models", padded, "--base", a)
    assert EMBEDDING in line and "(59, 32)" in line and "(64, 32)" in line and "--tokenizer base" in line
    more = save(tmp_path / "more", tokenizer=with_tokens("<x>"))
    line = refused(capsys, tmp_path / "out", "linear", "--models", more, a)
    assert f"1 tokens of '{more}' are not in '{a}' (first '<x>')" in line and line.count("(60, 32)") == 1
    assert "unknown choice for --tokenizer" in refused(
        capsys, tmp_path / "out", "linear", "--models", a, b, "--tokenizer", "c"
    )
    assert "needs a --base" in refused(capsys, tmp_path / "out", "linear", "--models", a, b, "--tokenizer", "base")


def test_padded_embeddings_are_cut_or_filled(tmp_path: Path) -> None:
    """With the base's vocabulary the base's rows count; a parent's rows that no token has are its tokens' mean."""
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1, rows=64)
    run(Recipe("linear", (str(a), str(b)), tokenizer=str(a)), tmp_path / "less")
    run(Recipe("linear", (str(a), str(b)), tokenizer=str(b)), tmp_path / "more")
    one, two = tensors(a)[EMBEDDING], tensors(b)[EMBEDDING]
    less, more = tensors(tmp_path / "less")[EMBEDDING], tensors(tmp_path / "more")[EMBEDDING]
    assert torch.equal(less, (one + two[:59]) / 2) and config_of(tmp_path / "less")["vocab_size"] == 59
    assert torch.equal(more[:59], less) and config_of(tmp_path / "more")["vocab_size"] == 64
    # A mean of 59 float32 numbers below 2: 1e-6.
    assert torch.allclose(more[59:], (one.mean(dim=0) + two[59:]) / 2, rtol=0, atol=1e-6)


def test_a_union_has_every_token_and_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base")
    a = save(tmp_path / "a", seed=1, tokenizer=with_tokens("<x>", "<both>"))
    b = save(tmp_path / "b", seed=2, tokenizer=with_tokens("<both>", "<y>"))
    out = tmp_path / "out"
    words = ["task-arithmetic", "--models", a, b, "--base", base, "--weights", "0.5", "0.5", "--tokenizer", "union"]
    code, said = merge(capsys, *words, "--out", out)
    assert code == 0, said
    rows = {name: tensors(path)[EMBEDDING] for name, path in (("a", a), ("b", b), ("base", base), ("out", out))}
    assert rows["out"].shape == (62, 32) and config_of(out)["vocab_size"] == 62
    # A token of one model alone is that model's, whatever the weights: the base and the other borrow its row.
    assert torch.equal(rows["out"][59], rows["a"][59]) and torch.equal(rows["out"][61], rows["b"][60])
    # One that two of them have: the mean m is the base's row; m + (a - m)/2 + (b - m)/2 = m.
    assert torch.allclose(rows["out"][60], (rows["a"][60] + rows["b"][59]) / 2, rtol=0, atol=1e-6)
    # The base's tokens are merged as ever.
    assert torch.allclose(rows["out"][:59], (rows["a"][:59] + rows["b"][:59]) / 2, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("ba<x> <y>bu <both>")["input_ids"] == [4, 59, 61, 8, 60]
    assert tokenizer.decode([59, 60, 61]).replace(" ", "") == "<x><both><y>"
    text = LM.load(str(out)).generate(["ba <x>"])
    assert len(text.texts) == 1


def test_a_union_of_a_tied_and_an_untied_model(tmp_path: Path) -> None:
    """The head that --untie writes has its rows from the embeddings of the one, and borrows them from the other's head."""
    a = save(tmp_path / "a", tokenizer=with_tokens("<x>"), tie_word_embeddings=True)
    b = save(tmp_path / "b", seed=1, tokenizer=with_tokens("<y>"), rows=64)
    run(Recipe("linear", (str(a), str(b)), tokenizer="union", untie=True), tmp_path / "out")
    one, two, out = tensors(a), tensors(b), tensors(tmp_path / "out")
    assert out[EMBEDDING].shape == out[HEAD].shape == (61, 32)
    assert torch.equal(out[HEAD][:59], (one[EMBEDDING][:59] + two[HEAD][:59]) / 2)
    assert torch.equal(out[HEAD][59], one[EMBEDDING][59]) and torch.equal(out[HEAD][60], two[HEAD][59])
    assert torch.equal(out[EMBEDDING][59], one[EMBEDDING][59]) and torch.equal(out[EMBEDDING][60], two[EMBEDDING][59])


def test_a_union_of_merges_splits_text_as_the_first_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ordinary pieces of a second BPE get ids and rows; as tokens found in text they would cut words in two."""
    first, second = tiny_tokenizer("byte"), tiny_tokenizer("byte")
    data = json.loads(second.backend_tokenizer.to_str())
    data["model"]["merges"].append(["tu", "la"])
    data["model"]["merges"].insert(0, ["l", "a"])
    data["model"]["vocab"] |= {"la": 264, "tula": 265}
    a, b = save(tmp_path / "a", tokenizer=first), save(tmp_path / "b", seed=1, tokenizer=second, rows=266)
    (b / "tokenizer.json").write_text(json.dumps(data))
    out = tmp_path / "out"
    code, said = merge(capsys, "linear", "--models", a, b, "--tokenizer", "union", "--out", out)
    assert code == 0 and "text is split as" in said and "2 ordinary tokens" in said
    merged, before = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(a)
    assert AutoTokenizer.from_pretrained(b)("tula")["input_ids"] == [265]
    for text in ("tula", "a tula la", "ba moon tu"):
        assert merged(text)["input_ids"] == before(text)["input_ids"]
    assert merged.decode([265]) == "tula" and merged.convert_tokens_to_ids("la") == 264
    assert torch.equal(tensors(out)[EMBEDDING][264:], tensors(b)[EMBEDDING][264:])


def test_a_tokenizer_may_know_more_tokens_than_its_model(tmp_path: Path) -> None:
    """A token whose id lies behind the last row is not the model's (mergekit fails there)."""
    a = save(tmp_path / "a", tokenizer=with_tokens("<x>"), rows=59)
    b = save(tmp_path / "b", seed=1, tokenizer=with_tokens("<y>", "<x>"))
    run(Recipe("linear", (str(a), str(b)), tokenizer=str(b)), tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[EMBEDDING][59:], tensors(b)[EMBEDDING][59:])
    run(Recipe("linear", (str(a), str(b)), tokenizer="union"), tmp_path / "union")
    rows = tensors(tmp_path / "union")[EMBEDDING]
    ids = AutoTokenizer.from_pretrained(tmp_path / "union")("<x><y>")["input_ids"]
    assert ids == [59, 60] and torch.equal(rows[ids], tensors(b)[EMBEDDING][[60, 59]])


def test_rows_equal_the_rule_written_out(tmp_path: Path) -> None:
    """Random vocabularies, read in every cut, against the rule of the module, token by token."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(30)]
    for trial in range(6):
        based = trial % 2 == 0
        vocabularies, folders, counts = [], [], []
        for place in range(3):
            mine = rng.sample(words, rng.randint(12, 25))
            count = len(mine) + rng.randint(0, 6)
            vocabularies.append(dict(zip(mine, rng.sample(range(count), len(mine)), strict=True)))
            counts.append(count)
            folder = tmp_path / f"{trial}-{place}"
            folder.mkdir()
            table = torch.randn(count, 4, generator=torch.Generator().manual_seed(10 * trial + place))
            save_file({EMBEDDING: table, "norm.weight": torch.ones(4)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
            folders.append(Folder(folder))
        tokens = sorted(set().union(*vocabularies))
        rows = len(tokens) + 4
        ids = dict(zip(tokens, rng.sample(range(rows), len(tokens)), strict=True))
        found = remap(folders, 0 if based else None, vocabularies, counts, [EMBEDDING], ids, rows)
        for place, source in enumerate(found):
            wanted = _by_hand(place, based, folders, vocabularies, counts, ids, rows)
            assert source.entries[EMBEDDING].shape == (rows, 4)
            for step in (1, 3, rows):
                cuts = [source.read(EMBEDDING, start, start + step) for start in range(0, rows, step)]
                # Means of up to 25 float32 numbers in another order.
                assert torch.allclose(torch.cat(cuts), wanted, rtol=0, atol=1e-6)
            assert torch.equal(source.read("norm.weight"), torch.ones(4))


def _by_hand(
    place: int,
    based: bool,
    folders: Sequence[Folder],
    vocabularies: Sequence[dict[str, int]],
    counts: Sequence[int],
    ids: dict[str, int],
    rows: int,
) -> Tensor:
    tables = [folder.read(EMBEDDING) for folder in folders]
    out = torch.empty(rows, 4)
    for row in range(rows):
        token = next((token for token, number in ids.items() if number == row), None)
        mine = vocabularies[place]
        if token is None:
            free = row < counts[place] and row not in mine.values()
            out[row] = tables[place][row] if free else tables[place][list(mine.values())].mean(dim=0)
        elif token in mine:
            out[row] = tables[place][mine[token]]
        elif based and token in vocabularies[0]:
            out[row] = tables[0][vocabularies[0][token]]
        else:
            owners = [k for k in range(len(folders)) if token in vocabularies[k]]
            out[row] = torch.stack([tables[k][vocabularies[k][token]] for k in owners]).mean(dim=0)
    return out


def test_special_tokens_that_differ_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    edit(b, "tokenizer_config.json", eos_token="ba")
    edit(b, "config.json", eos_token_id=4)
    edit(b, "generation_config.json", eos_token_id=4)
    line = refused(capsys, tmp_path / "out", "linear", "--models", a, b)
    assert "eos_token is '</s>'" in line and "'ba'" in line and "--tokenizer" in line
    run(Recipe("linear", (str(a), str(b)), tokenizer=str(b)), tmp_path / "out")
    assert config_of(tmp_path / "out")["eos_token_id"] == 4
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "ba"


def test_chat_templates_that_differ_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, a = save(tmp_path / "base"), save(tmp_path / "a", seed=1, tokenizer=tiny_tokenizer(chat=CHAT))
    b = save(tmp_path / "b", seed=2, tokenizer=tiny_tokenizer(chat=CHAT + "!"))
    line = refused(capsys, tmp_path / "out", "ties", "--models", a, "--base", base)
    assert "chat templates differ" in line and "--chat-template base, none or one of the models" in line
    assert "different ones" in refused(capsys, tmp_path / "out", "linear", "--models", a, b)
    for number, (choice, wanted) in enumerate([(str(a), CHAT), (str(b), CHAT + "!"), ("base", None), ("none", None)]):
        out = tmp_path / f"out{number}"
        run(Recipe("task-arithmetic", (str(a), str(b)), str(base), chat_template=choice), out)
        assert AutoTokenizer.from_pretrained(out).chat_template == wanted
    run(Recipe("linear", (str(a), str(b)), chat_template="none"), tmp_path / "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "none").chat_template is None
    assert AutoTokenizer.from_pretrained(a).chat_template == CHAT
    line = refused(capsys, tmp_path / "out", "linear", "--models", a, b, "--chat-template", "nope")
    assert "unknown choice for --chat-template" in line


def test_older_forms_of_a_template_are_the_same_template(tmp_path: Path) -> None:
    a = save(tmp_path / "a", tokenizer=tiny_tokenizer(chat=CHAT))
    b, c = save(tmp_path / "b", tokenizer=tiny_tokenizer()), save(tmp_path / "c", tokenizer=tiny_tokenizer())
    edit(b, "tokenizer_config.json", chat_template=CHAT)
    edit(c, "tokenizer_config.json", chat_template=[{"name": "default", "template": CHAT}])
    assert [one.template for one in read_vocabularies([Folder(a), Folder(b), Folder(c)]) if one] == [CHAT] * 3
    several = {"tools": "x", "default": CHAT}
    edit(c, "tokenizer_config.json", chat_template=[{"name": k, "template": v} for k, v in several.items()])
    run(Recipe("linear", (str(a), str(c)), chat_template=str(c)), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == several


def test_a_tokenizer_in_its_older_form_is_read(tmp_path: Path) -> None:
    a = save(tmp_path / "a", tokenizer=tiny_tokenizer("byte"))
    data = json.loads((a / "tokenizer.json").read_text())["model"]
    (a / "tokenizer.json").unlink()
    (a / "vocab.json").write_text(json.dumps(data["vocab"]))
    (a / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in data["merges"]) + "\n")
    (a / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}))
    (found,) = read_vocabularies([Folder(a)])
    assert found is not None and {token: found.ids.get(token) for token in data["vocab"]} == data["vocab"]


def test_tokenizers_that_split_otherwise_are_said(tmp_path: Path) -> None:
    """One vocabulary, but other merges, or a token put before every text: the merged model gets the first's."""
    a = save(tmp_path / "a", tokenizer=tiny_tokenizer("byte"))
    b = save(tmp_path / "b", seed=1, tokenizer=tiny_tokenizer("byte", bos=True))
    (warning,) = make_plan(Recipe("linear", (str(a), str(b)))).warnings
    assert warning.startswith(f"'{b}' splits text otherwise than '{a}'")
    c = save(tmp_path / "c", seed=2, tokenizer=tiny_tokenizer("byte"))
    data = json.loads((c / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]  # as older files have them
    (c / "tokenizer.json").write_text(json.dumps(data))
    assert make_plan(Recipe("linear", (str(a), str(c)))).warnings == []
    data["model"]["merges"].reverse()
    (c / "tokenizer.json").write_text(json.dumps(data))
    assert "splits text otherwise" in make_plan(Recipe("linear", (str(a), str(c)))).warnings[0]


def test_parents_without_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (a / name).unlink()
    code, said = merge(capsys, "linear", "--models", a, b, "--out", tmp_path / "one")
    assert code == 0 and f"'{a}' has no tokenizer" in said and (tmp_path / "one" / "tokenizer.json").is_file()
    line = refused(capsys, tmp_path / "out", "linear", "--models", a, b, "--tokenizer", b)
    assert "has no tokenizer, which --tokenizer" in line
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (b / name).unlink()
    code, said = merge(capsys, "linear", "--models", a, b, "--out", tmp_path / "none")
    assert code == 0 and "no parent has a tokenizer" in said and not (tmp_path / "none" / "tokenizer.json").exists()


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a")
    (a / "tokenizer.json").write_text('{"model": {"vocab": {"a": ')
    line = refused(capsys, tmp_path / "out", "linear", "--models", a)
    assert f"the model '{a}': tokenizer.json cannot be read" in line


def edit(folder: Path, file: str, **changes: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **changes}))
