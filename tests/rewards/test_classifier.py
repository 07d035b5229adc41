"""Sequence classifiers: the score is that of the last real token, whatever the batch, the padding and the pad token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trimtab.errors import UsageError
from trimtab.rewards import Classifier, PocketReward, parse_reward

PLAIN = "{prompt}{response}"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)
PROMPTS = ["one", "a longer prompt", "x", "what is this", "two words", "1 + 1", "the last of them"]
TEXTS = [" yes", " no, and here is why it is so", " z", "", " perhaps", " 2", " end"]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, `<pad>` 0 and `</s>` 1: no training, nothing to download."""
    vocab = {"<pad>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_max_length=64, **special)


def tiny(family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None} | config
    if family == "gpt2":
        model: Any = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes))
    else:
        width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= width | {"max_position_embeddings": 64}
        if family == "bert":
            model = BertForSequenceClassification(BertConfig(**sizes))
        else:
            model = LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **sizes))
    for parameter in model.parameters():  # scores of about one, so that a tolerance of 1e-5 means something
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), tiny(), byte_tokenizer(pad_token="<pad>"))


@pytest.mark.parametrize(
    ("family", "side"), [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("bert", "left")]
)
def test_batch_invariance(family: str, side: str, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny(family), byte_tokenizer(pad_token="<pad>", padding_side=side))
    together = Classifier(folder, template=PLAIN, device="cpu")
    alone = np.array([together.score([p], [t])[0] for p, t in zip(PROMPTS, TEXTS, strict=True)])
    assert np.std(alone) > 0.01  # scores differ, or invariance would be easy
    np.testing.assert_allclose(together(PROMPTS, TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(together(PROMPTS[::-1], TEXTS[::-1]), alone[::-1], atol=1e-5)
    small = Classifier(folder, template=PLAIN, batch_size=2, device="cpu")
    np.testing.assert_allclose(small(PROMPTS, TEXTS), alone, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pad_equal_to_eos_scores_the_eos(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny(family, pad_token_id=1), byte_tokenizer(pad_token="</s>")
    reward = Classifier(save(tmp_path, model, tokenizer), template=PLAIN, append_eos=True, device="cpu")
    ids = torch.tensor([[*tokenizer("a b")["input_ids"], 1]])
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state
        at_eos, before = (float(model.score(states[0, i])) for i in (-1, -2))
        trapped = float(model(ids).logits)
    assert trapped == pytest.approx(before, abs=1e-5) and abs(at_eos - before) > 0.01  # the trap is there
    scores = reward.score(["a", "a much longer"], [" b", " row beside it"])
    assert scores[0] == pytest.approx(at_eos, abs=1e-5)


def test_no_pad_token_at_all(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny(pad_token_id=None), byte_tokenizer())
    assert len(Classifier(folder, template=PLAIN, device="cpu").score(PROMPTS, TEXTS)) == len(PROMPTS)


def test_equal_to_the_model_where_the_model_is_right(llama: Path) -> None:
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(llama), byte_tokenizer(pad_token="<pad>")
    batch = tokenizer([p + t for p, t in zip(PROMPTS, TEXTS, strict=True)], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    np.testing.assert_allclose(Classifier(llama, template=PLAIN, device="cpu")(PROMPTS, TEXTS), expected, atol=1e-5)


def test_columns(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny(num_labels=3), byte_tokenizer(pad_token="<pad>"))
    with pytest.raises(UsageError, match=r"3 outputs \(0 LABEL_0, 1 LABEL_1, 2 LABEL_2\); say which with column="):
        Classifier(folder, template=PLAIN)
    with pytest.raises(UsageError, match=r"column=3 is not in 0\.\.2"):
        Classifier(folder, column=3, template=PLAIN)
    scores = [Classifier(folder, column=c, template=PLAIN, device="cpu").score(["p"], ["t"])[0] for c in range(3)]
    assert len(set(scores)) == 3


def test_chat_template_or_template_is_needed(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template; give template="):
        Classifier(llama)
    with pytest.raises(UsageError, match=r"must hold \{prompt\} and \{response\}"):
        Classifier(llama, template="{prompt}")
    tokenizer = byte_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = CHAT
    chat = Classifier(save(tmp_path, tiny(), tokenizer), device="cpu")
    plain = Classifier(llama, template="<user>{prompt}<assistant>{response}</s>", device="cpu")
    messages = [{"role": "user", "content": "hi"}]
    expected = plain.score(["hi"], ["ho"])[0]
    assert chat.score(["hi"], ["ho"])[0] == pytest.approx(expected, abs=1e-6)
    assert chat.score([messages], ["ho"])[0] == pytest.approx(expected, abs=1e-6)


def test_a_prompt_with_braces_is_not_a_template(llama: Path) -> None:
    reward = Classifier(llama, template=PLAIN, device="cpu")
    assert reward._tokenize("{response}", "a") == reward._tokenizer("{response}a")["input_ids"]


def test_too_long_cuts_the_prompt_and_never_the_answer(llama: Path) -> None:
    reward = Classifier(llama, template="Q{prompt}A{response}", device="cpu")  # a context of 64 bytes
    with pytest.warns(UserWarning, match="2 of 4 prompts were cut on the left to fit 64 tokens"):
        scores = reward.score(
            ["p" * 100 + "end", "short", [{"role": "user", "content": "p" * 80}], "x"], ["t", "u", "t", "v" * 80]
        )
    exact = reward.score(["p" * 58 + "end"], ["t"])  # 64 = Q + 61 + A + t
    assert scores[0] == pytest.approx(exact[0], abs=1e-5)
    assert None not in scores[:3] and scores[3] is None  # an answer over the context is not judged, and not 0


def test_what_is_no_classifier_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a local model folder"):
        Classifier(tmp_path / "none", template=PLAIN)
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \.safetensors"):
        Classifier(bare, template=PLAIN)
    (bare / "pytorch_model.bin").unlink()
    (bare / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UsageError, match="does not load"):
        Classifier(bare, template=PLAIN)
    headless = save(tmp_path / "lm", LlamaForCausalLM(tiny().config), byte_tokenizer(pad_token="<pad>"))
    with pytest.raises(UsageError, match=r"lacks score\.weight: it is not a trained sequence classifier"):
        Classifier(headless, template=PLAIN)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    model = tiny()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    folder = save(tmp_path, model, byte_tokenizer(pad_token="<pad>"))
    with pytest.raises(UsageError, match="NaN or infinite; its weights are damaged"):
        Classifier(folder, template=PLAIN)


def test_the_head_is_float32(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny().bfloat16(), byte_tokenizer(pad_token="<pad>"))
    reward = Classifier(folder, template=PLAIN, dtype="auto", device="cpu")
    assert reward._model.dtype == torch.bfloat16
    scores = torch.tensor(reward.score(PROMPTS, TEXTS))
    assert not torch.equal(scores, scores.bfloat16().float())


def test_fingerprint_follows_weights_and_options(llama: Path, tmp_path: Path) -> None:
    first = Classifier(llama, template=PLAIN).fingerprint
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert Classifier(copy, template=PLAIN).fingerprint == first
    assert Classifier(copy, template=PLAIN, append_eos=True).fingerprint != first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert Classifier(copy, template=PLAIN).fingerprint != first


def test_from_a_spec(llama: Path) -> None:
    reward = parse_reward(f"classifier:path={llama},template={{prompt}}{{response}},device=cpu")
    assert isinstance(reward, Classifier) and reward.name == f"classifier/{llama.name}"
    bare = parse_reward(f"{llama}:template={{prompt}}{{response}},device=cpu")
    assert bare.score(["a"], ["b"]) == reward.score(["a"], ["b"])
    total = parse_reward(f"0.5*{llama}:template={{prompt}}{{response}}+length:target=1")
    assert total.score(["a"], ["b"])[0] == pytest.approx(0.5 * (reward.score(["a"], ["b"])[0] or 0))


def test_pocket_reward_scores_the_end_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the shipped weights: the text is what it was trained on, however the prompt is written."""
    from trimtab import pocket

    folder = save(tmp_path, tiny(), byte_tokenizer(pad_token="<pad>"))
    monkeypatch.setattr(pocket, "path", lambda name: folder)
    reward = PocketReward(device="cpu")
    explicit = Classifier(folder, template="{prompt}{response}</s>", device="cpu")
    expected = explicit.score(["Q: Who?\nA:"], [" Me."])[0]
    for prompt in ("Q: Who?\nA:", "Who?", [{"role": "user", "content": "Who?"}]):
        for text in (" Me.", "Me.", "Me.\n"):
            assert reward.score([prompt], [text])[0] == pytest.approx(expected, abs=1e-6)
    assert reward.name == "pocket/reward"
