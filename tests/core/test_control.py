"""`Control`: the same edit in a session, in `generate`, in a pipeline and in scoring; and hooks that always go away."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf

from recompute import PROMPTS, recompute, transformers_generate
from tiny import tiny_lm
from trimtab import LM, Control, Sampling, Steered
from trimtab.control import Controls, FunctionControl
from trimtab.errors import UsageError

GREEDY = Sampling(max_new_tokens=12, temperature=0)


class Push(Control):
    """Adds a fixed random vector to the final state, and counts the rows it edits."""

    def __init__(self, width: int, size: float = 0.7, seed: int = 0):
        self.name, self.edited = f"push {seed}", 0
        self.vector = size * torch.randn(width, generator=torch.Generator().manual_seed(seed))

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        self.edited += hidden.shape[:-1].numel()
        return hidden + self.vector


class BlockPush(Control):
    """Adds a vector to the output of the first block, at every position."""

    name, final = "block push", False

    def __init__(self, width: int, size: float = 0.7):
        self.vector = size * torch.randn(width, generator=torch.Generator().manual_seed(9))

    def hooks(self, model: Any, positions: str) -> Iterator[Any]:
        base = model.base_model
        block = (base.layers if hasattr(base, "layers") else base.h)[0]

        def push(_module: Any, _inputs: Any, output: Any) -> Any:
            return (output[0] + self.vector, *output[1:]) if isinstance(output, tuple) else output + self.vector

        yield block.register_forward_hook(push)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def hooked(lm: LM, control: Control, steps: int = 12, **how: Any) -> list[list[int]]:
    """Greedy tokens of transformers' own generate under the control, a row at a time."""
    with control.attached(lm.model, **how):
        return [transformers_generate(lm, ids, steps) for ids in lm.encode(PROMPTS)]


def test_steered_answers_are_those_of_generate_with_hooks(lm: LM) -> None:
    control = Push(lm.hidden_size)
    expected = hooked(lm, control)
    assert Steered(lm, control).generate(PROMPTS, GREEDY).tokens == expected
    assert lm.generate(PROMPTS, GREEDY).tokens != expected
    assert hook_count(lm.model) == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_edits_inside_a_block_work_everywhere(arch: str, lm_of: Callable[..., LM]) -> None:
    lm, control = lm_of(arch), BlockPush(32)
    expected = hooked(lm, control)
    steered = Steered(lm, control)
    done = steered.generate(PROMPTS, GREEDY)
    assert done.tokens == expected != lm.generate(PROMPTS, GREEDY).tokens
    states = list(lm.hidden_states(PROMPTS, done.tokens, control))
    scores = lm.score(PROMPTS, done.tokens, control)
    distributions = list(steered.token_logprobs(PROMPTS, done.tokens))
    for row, (prompt, answer) in enumerate(zip(lm.encode(PROMPTS), done.tokens, strict=True)):
        with control.attached(lm.model):
            logits, hidden = recompute(lm, [[*prompt, *answer]])[0]
        torch.testing.assert_close(states[row], hidden[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(distributions[row], logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            scores[row], logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0], atol=1e-4, rtol=0
        )


def test_final_edits_are_in_the_reported_scores(llama: LM) -> None:
    control = Push(32)
    done = Steered(llama, control).generate(PROMPTS, Sampling(max_new_tokens=9, seed=2))
    assert done.tokens != llama.generate(PROMPTS, Sampling(max_new_tokens=9, seed=2)).tokens
    for own, score in zip(done.logprobs, llama.score(PROMPTS, done.tokens, control), strict=True):
        torch.testing.assert_close(torch.tensor(own), score, atol=1e-4, rtol=0)


def test_a_mixture_of_block_and_final_edits(llama: LM) -> None:
    """Each part is applied where it belongs: neither lost, nor applied twice."""
    block, push = BlockPush(32), Push(32)
    for both in (Controls([block, push]), Controls([push, block]), Controls([Controls([push]), block])):
        done = Steered(llama, both).generate(PROMPTS, GREEDY)
        assert done.tokens == hooked(llama, both)
        with block.attached(llama.model), push.attached(llama.model, positions="all"):
            logits, _ = recompute(llama, [[*llama.encode(PROMPTS)[0], *done.tokens[0]]])[0]
        expected = logits.log_softmax(-1)[-1 - len(done.tokens[0]) : -1]
        given = next(Steered(llama, both).token_logprobs(PROMPTS[:1], done.tokens[:1]))
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


def test_nested_steering_applies_in_order(llama: LM) -> None:
    double, push = FunctionControl(lambda hidden: 2 * hidden), Push(32)
    inner_first = Steered(Steered(llama, double), push)
    expected = Steered(llama, FunctionControl(lambda hidden: 2 * hidden + push.vector))
    assert inner_first.generate(PROMPTS, GREEDY).tokens == expected.generate(PROMPTS, GREEDY).tokens
    with double.attached(llama.model), push.attached(llama.model):
        nested = [transformers_generate(llama, ids, 12) for ids in llama.encode(PROMPTS)]
    assert nested == expected.generate(PROMPTS, GREEDY).tokens
    assert nested != Steered(Steered(llama, push), double).generate(PROMPTS, GREEDY).tokens


def test_nested_contexts_unwind_one_by_one(llama: LM) -> None:
    ids = torch.tensor(llama.encode(PROMPTS[:1]))
    plain = llama.model(ids).logits
    first, second = Push(32, seed=1), Push(32, seed=2)
    with first.attached(llama.model):
        alone = llama.model(ids).logits
        with second.attached(llama.model), first.attached(llama.model):
            assert not torch.equal(llama.model(ids).logits, alone)
        assert torch.equal(llama.model(ids).logits, alone)
    assert torch.equal(llama.model(ids).logits, plain)
    assert hook_count(llama.model) == 0


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt", "phi"])
def test_plain_forward_at_the_last_position_and_at_all(arch: str, lm_of: Callable[..., LM]) -> None:
    lm = lm_of(arch)
    ids, control = torch.tensor([[5, 6, 7, 8]]), Push(lm.hidden_size)
    plain, hidden = recompute(lm, ids.tolist())[0]
    pushed = lm.head(hidden + control.vector)
    with control.attached(lm.model, positions="last"):
        last = lm.model(ids).logits[0]
    with control.attached(lm.model, positions="all"):
        everywhere = lm.model(ids).logits[0]
    torch.testing.assert_close(last, torch.cat([plain[:-1], pushed[-1:]]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(everywhere, pushed, atol=1e-5, rtol=1e-5)


def test_text_generation_pipelines_are_steered(llama: LM) -> None:
    control = FunctionControl(lambda hidden: hidden + 40 * llama.unembedding[20])
    pipeline = tf.pipeline("text-generation", model=llama.model, tokenizer=llama.tokenizer)
    word = llama.decode([20])
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    with control.attached(pipeline):
        assert pipeline(PROMPTS[0], **settings)[0]["generated_text"].split() == [word] * 4
    assert word not in pipeline(PROMPTS[0], **settings)[0]["generated_text"]


def test_an_lm_inside_an_attached_model_is_steered(llama: LM) -> None:
    control = Push(32)
    with control.attached(llama):
        inside = llama.generate(PROMPTS, GREEDY)
    assert inside.tokens == Steered(llama, control).generate(PROMPTS, GREEDY).tokens


@pytest.mark.parametrize("zero", [lambda hidden: hidden, lambda hidden: hidden + 0.0], ids=["identity", "plus zero"])
def test_a_zero_edit_is_the_base_bit_for_bit(zero: Callable[..., torch.Tensor], lm: LM) -> None:
    control, sampling = FunctionControl(zero), Sampling(max_new_tokens=10, seed=1)
    base, steered = lm.generate(PROMPTS, sampling), Steered(lm, control).generate(PROMPTS, sampling)
    assert (base.tokens, base.logprobs) == (steered.tokens, steered.logprobs)
    ids = torch.tensor(lm.encode(PROMPTS[:1]))
    plain = lm.model(ids).logits
    for positions in ("last", "all"):
        with control.attached(lm.model, positions=positions):  # type: ignore[arg-type]
            assert torch.equal(lm.model(ids).logits, plain)


def test_finished_rows_are_never_edited(llama: LM) -> None:
    control = Push(32, size=0.1)
    for samples in (1, 4):
        control.edited = 0
        done = Steered(llama, control).generate(PROMPTS, Sampling(max_new_tokens=30, samples=samples, seed=3))
        assert "stop" in done.finish_reasons
        assert control.edited == sum(map(len, done.tokens))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UsageError])
def test_hooks_are_gone_after_any_exception(error: type[BaseException]) -> None:
    lm, calls = tiny_lm(), []

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) > 3:
            raise error("stop")
        return hidden

    with pytest.raises(error), FunctionControl(edit).attached(lm.model):
        lm.model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
    assert hook_count(lm.model) == 0
    failing = BlockPush(31)  # of another width: fails inside the session's forward
    with pytest.raises(RuntimeError):
        Steered(lm, failing).generate(PROMPTS, GREEDY)
    assert hook_count(lm.model) == 0


def test_hooks_are_gone_when_installing_them_fails_half_way(llama: LM) -> None:
    class Broken(Control):
        def hooks(self, model: Any, positions: str) -> Iterator[Any]:
            yield model.register_forward_hook(lambda *_: None)
            raise UsageError("no such layer")

    with pytest.raises(UsageError), Controls([Push(32), Broken()]).attached(llama.model):
        pass
    assert hook_count(llama.model) == 0


def test_hooks_are_gone_after_an_abandoned_generator(llama: LM) -> None:
    def stream() -> Iterator[torch.Tensor]:
        with Push(32).attached(llama.model):
            for _ in range(5):
                yield llama.model(torch.tensor([[5]])).logits

    generator = stream()
    next(generator)
    assert hook_count(llama.model) > 0
    del generator
    gc.collect()
    assert hook_count(llama.model) == 0


def test_inference_mode_and_autograd(llama: LM) -> None:
    ids, control = torch.tensor([[5, 6, 7]]), Push(32)
    with control.attached(llama.model):
        plain = llama.model(ids).logits
        with torch.inference_mode():
            assert torch.equal(llama.model(ids).logits, plain)
    with torch.inference_mode():
        inside = Steered(llama, control).generate(PROMPTS, GREEDY)
    assert inside.tokens == Steered(llama, control).generate(PROMPTS, GREEDY).tokens
    scale = torch.ones(32, requires_grad=True)
    with FunctionControl(lambda hidden: hidden * scale).attached(llama.model, positions="all"):
        llama.model(ids, labels=ids).loss.backward()
    assert scale.grad is not None and float(scale.grad.abs().sum()) > 0


def test_two_threads_on_two_models() -> None:
    models = [tiny_lm(arch, seed=seed) for seed, arch in enumerate(("llama", "gpt2"))]
    steered = [Steered(lm, Push(32, seed=seed)) for seed, lm in enumerate(models)]
    expected = [each.generate(PROMPTS, GREEDY).tokens for each in steered]
    hooks_too = [hooked(lm, each.control) for lm, each in zip(models, steered, strict=True)]
    found: dict[int, Any] = {}

    def work(which: int) -> None:
        runs = [steered[which].generate(PROMPTS, GREEDY).tokens for _ in range(4)]
        found[which] = runs, hooked(models[which], steered[which].control)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {which: ([expected[which]] * 4, hooks_too[which]) for which in (0, 1)}


def test_one_row_of_a_padded_batch_is_steered_as_alone(llama: LM) -> None:
    """transformers' own left padding, with hooks: the last position is the row's own last token."""
    llama.tokenizer.padding_side = "left"
    batch = llama.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    control = Push(32)
    with control.attached(llama.model):
        out = llama.model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    alone = hooked(llama, control, steps=6)
    for row, tokens in zip(out[:, batch.input_ids.shape[1] :].tolist(), alone, strict=True):
        assert row[: len(tokens)] == tokens


def test_beam_search_and_assistants_given_to_generate_are_refused() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([[3, 4, 5]])
    with Push(32).attached(lm.model):
        with pytest.raises(UsageError, match="beam search"):
            lm.model.generate(ids, num_beams=2, max_new_tokens=2)
        with pytest.raises(UsageError, match="assisted"):
            lm.model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
        with Push(32).attached(lm.model):
            lm.model.generate(ids, max_new_tokens=2)
    assert "generate" not in lm.model.__dict__
    lm.model.generate(ids, num_beams=2, max_new_tokens=2)


def test_beam_search_is_refused() -> None:
    lm = tiny_lm()
    lm.model.generation_config.num_beams = 4
    with pytest.raises(UsageError, match="beam search"), Push(32).attached(lm.model):
        pass


def test_what_hooks_cannot_steer_is_refused(llama: LM) -> None:
    with pytest.raises(UsageError, match="causal language model, not Linear"), Push(32).attached(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(UsageError, match="LlamaModel has no output embedding"), Push(32).attached(llama.backbone):
        pass
    compiled = torch.compile(llama.model, backend="eager")
    with pytest.raises(UsageError, match="torch.compile"), Push(32).attached(compiled):
        pass
    with pytest.raises(UsageError, match="needs a local language model, not object"):
        Steered(object(), Push(32))


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    lm = tiny_lm()
    head, lm.model.lm_head.forward = lm.model.lm_head, None
    lm.model.forward = lambda ids: lm.backbone(ids).last_hidden_state @ head.weight.T
    with pytest.raises(UsageError, match="does not call its output embedding"), Push(32).attached(lm.model):
        lm.model(torch.tensor([[5]]))


def test_controls_are_checked_before_anything_runs(llama: LM) -> None:
    class Other(Push):
        def check(self, model: Any) -> None:
            raise UsageError("made for another model")

    other = Other(32)
    for use in (
        lambda: Steered(llama, other),
        lambda: llama.generate(PROMPTS, GREEDY, control=other),
        lambda: other.attached(llama.model).__enter__(),
        lambda: Controls([Push(32), other]).attached(llama.model).__enter__(),
    ):
        with pytest.raises(UsageError, match="another model"):
            use()
    assert other.edited == 0 and hook_count(llama.model) == 0
