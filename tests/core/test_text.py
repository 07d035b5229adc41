"""`LM.encode`, `LM.load` and the names of models: what a prompt becomes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import BOS, CHAT, EOS, tiny_lm, tiny_model, tiny_tokenizer
from trimtab import LM, Sampling
from trimtab.errors import UsageError

LINE = "ba da fa"


def encode(prompt: Any, **tokenizer: Any) -> list[int]:
    return tiny_lm(tokenizer=tiny_tokenizer(**tokenizer)).encode([prompt])[0]


def test_plain_text_is_taken_as_it_is() -> None:
    plain = encode(LINE)
    assert len(plain) == 3
    assert encode(LINE, bos=True) == [BOS, *plain]
    assert encode([{"role": "user", "content": LINE}]) == plain


def test_an_end_token_added_by_the_tokenizer_is_removed() -> None:
    assert encode(LINE, eos=True) == encode(LINE)
    assert encode(LINE, eos=True, bos=True) == [BOS, *encode(LINE)]


def test_no_beginning_token_twice() -> None:
    assert encode(f"<s> {LINE}", bos=True) == [BOS, *encode(LINE)]
    with_template = encode(LINE, bos=True, chat=CHAT)
    assert with_template.count(BOS) == 1 and with_template[0] == BOS
    assert with_template == encode(LINE, bos=False, chat=CHAT)
    assert with_template == encode(LINE, bos=True, eos=True, chat=CHAT)


def test_a_string_is_one_user_message_where_there_is_a_template() -> None:
    assert encode(LINE, chat=CHAT) == encode([{"role": "user", "content": LINE}], chat=CHAT)
    two = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "da"}, {"role": "user", "content": "fa"}]
    assert encode(two, chat=CHAT) != encode(two[:1], chat=CHAT)


def test_conversations_without_a_template_are_refused() -> None:
    for messages in (
        [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "da"}],
        [{"role": "system", "content": "ba"}],
    ):
        with pytest.raises(UsageError, match="prompt 0 is a conversation and tiny has no chat template"):
            encode(messages)


def test_a_template_that_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="chat template of tiny refuses prompt 0: roles must alternate"):
        encode(LINE, chat="{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("prompt", ["", "  \n", [], [{"role": "user", "content": ""}], "</s>"])
def test_empty_prompts_are_refused_by_number(prompt: Any) -> None:
    lm = tiny_lm()
    if prompt == "</s>":  # a prompt that is only an end token is kept: it has a token to continue
        assert lm.encode([prompt]) == [[EOS]]
        return
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        lm.encode([LINE, prompt])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "a model, naïve"
    tiny_model().save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


def test_load_from_a_folder(folder: Path) -> None:
    lm, same = LM.load(folder), tiny_lm()
    assert lm.name == folder.name
    assert lm.model.dtype == torch.float32
    assert lm.fingerprint == same.fingerprint != tiny_lm(seed=1).fingerprint
    assert (lm.hidden_size, lm.vocab_size, lm.context_length, lm.eos_ids) == (32, 59, 64, {EOS})
    sampling = Sampling(max_new_tokens=8, seed=3)
    assert lm.generate([LINE], sampling).tokens == same.generate([LINE], sampling).tokens


def test_nothing_of_the_generation_config_is_inherited(folder: Path) -> None:
    before = LM.load(folder).generate([LINE] * 20, Sampling(max_new_tokens=4))
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 1, "temperature": 0.1, "eos_token_id": [2, 58]}'
    )
    lm = LM.load(folder)
    assert lm.eos_ids == {2, 58}
    lm.__dict__["eos_ids"] = frozenset({EOS})
    assert lm.generate([LINE] * 20, Sampling(max_new_tokens=4)).tokens == before.tokens


def test_weights_that_are_not_numbers_are_refused_on_load(folder: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"not finite numbers, first in 'model.layers.1.mlp.up_proj.weight'"):
        LM.load(folder)


def test_truncated_weights_are_refused_on_load(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot load the model"):
        LM.load(folder)


def test_pickled_weights_are_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(UsageError, match="cannot load the model"):
        LM.load(folder)
    assert not canary.exists()


def test_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base"):
        LM.load("pocket/bsae")
    with pytest.raises(UsageError, match="no model folder"):
        LM.load("./no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="without config.json"):
        LM.load(tmp_path / "empty")
    with pytest.raises(UsageError, match="cannot load the model 'nobody/nothing'"):
        LM.load("nobody/nothing")


def test_eos_from_tokenizer_and_generation_config_both_count() -> None:
    lm = tiny_lm()
    lm.model.generation_config.eos_token_id = [40, 41]
    assert lm.eos_ids == {EOS, 40, 41}


def test_a_model_that_changes_its_logits_is_refused() -> None:
    lm = tiny_lm()
    hook = lm.model.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", out.logits * 2) or out)
    with pytest.raises(UsageError, match="transforms its logits in a way"):
        lm.generate([LINE])
    hook.remove()
    lm.generate([LINE], Sampling(max_new_tokens=1))
