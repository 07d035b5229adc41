"""Reward-guided decoding (ARGS) with the reward model's cache kept against scoring every candidate from scratch.

    python benchmarks/reward_guided.py [--tokens 128] [--k 10] [--rows 1 8] [--repeats 3] [--threads 1]

Same model, prompts and candidates, greedy; the tokens of both sides are asserted equal. From scratch means one batched
forward of prompt, answer so far and candidate for all candidates of a step, without a cache and without tokenizing; the
text path (what other tokenizers get) is timed once beside it. End tokens are switched off, so that every answer has all
its tokens. The first ratio is of whole answers, the language model's own steps included on both sides; the second is of
the scoring alone (both sides less the time of the model's greedy answers).

pocket      pocket/base and pocket/reward (4 layers of width 128, 0.9 M parameters each)
six-layer   random Llamas of 6 layers of width 256 (5 M parameters each), built here
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from trimtab import LM, Sampling, pocket
from trimtab.decode.args import Args, ArgsSession
from trimtab.policy import Cost
from trimtab.rewards import Classifier, parse_reward
from trimtab.rewards.prefix import CachedScorer, TextScorer, UnfinishedText, prefix_scorer

WORDS = 500


class ScratchScorer(TextScorer):
    """The whole row of ids through the reward model for every candidate."""

    def score(self, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
        frames = [self.reward.frame(prompt) for prompt in self.asked]
        ids = [
            [*frames[row][0], *self.answers[row], *more, *frames[row][1]]
            for row, more in zip(rows, continuations, strict=True)
        ]
        self.meter.tokens[self.reward.name] = self.meter.tokens.get(self.reward.name, 0) + sum(map(len, ids))
        return self.reward._forward(ids)


class FromScratch(Args):
    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> ArgsSession:
        session = super().open(prompts, sampling, Cost())
        session.companions["scorer"] = ScratchScorer(self.reward, self.lm, prompts, meter)
        return session


def pocket_pair() -> tuple[LM, Classifier, list[str]]:
    return LM.load("pocket/base"), parse_reward("pocket/reward"), pocket.prompts("test", 64, seed=0)


def six_layer_pair() -> tuple[LM, Classifier, list[str]]:
    """Word-level tokens: the text of an answer is tokenized to the very ids that were drawn."""
    raw = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1")
    size: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    lm = LM(transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)), tokenizer, "six-layer")
    judge = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(num_labels=1, **size))
    with tempfile.TemporaryDirectory() as folder:
        judge.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reward = Classifier(Path(folder), template="{prompt} {response}")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, WORDS, (64, 16), generator=generator).tolist()
    return lm, reward, [" ".join(f"w{word}" for word in row) for row in words]


def timed(policy: Any, prompts: Sequence[str], sampling: Sampling) -> tuple[float, float, Any]:
    """Seconds by the clock and of this process's CPU time (which other work on the machine disturbs less)."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = policy.generate(prompts, sampling)
    return time.perf_counter() - wall, time.process_time() - cpu, done


def memory(reward: Classifier, lm: LM, prompts: Sequence[str], k: int, tokens: int) -> tuple[float, float, float]:
    """MiB at the last token: the reward model's cache, what its candidates add to it, what forks of it would hold."""
    scorer = prefix_scorer(reward, lm, prompts, Cost())
    assert isinstance(scorer, CachedScorer)
    scorer.append([[2] * (tokens - 1) for _ in prompts])
    owners = [row for row in range(len(prompts)) for _ in range(k)]
    scorer.score(owners, [[3 + at % k] for at in range(len(owners))])
    assert scorer.seen is not None
    column = sum(
        buffer[: len(prompts), :, 0].numel() * buffer.element_size()
        for layer in scorer.session._layers()
        for buffer in layer.buffers
    )
    cache, candidates = scorer.session.columns * column, scorer.seen.states.shape[1] * column
    return cache / 2**20, candidates / 2**20, k * cache / 2**20


def measure(label: str, pair: tuple[LM, Classifier, list[str]], tokens: int, k: int, rows: int, repeats: int) -> None:
    lm, reward, all_prompts = pair
    lm.__dict__["eos_ids"] = frozenset()
    prompts, sampling = all_prompts[:rows], Sampling(max_new_tokens=tokens)
    cached, scratch, text = Args(lm, reward, k=k), FromScratch(lm, reward, k=k), Args(lm, reward, k=k, cache=False)
    timed(cached, prompts, Sampling(max_new_tokens=4)), timed(scratch, prompts, Sampling(max_new_tokens=4))
    pairs = [(timed(scratch, prompts, sampling), timed(cached, prompts, sampling)) for _ in range(repeats)]
    for (*_, theirs), (*_, ours) in pairs:
        assert ours.tokens == theirs.tokens, "the two sides chose different tokens"
        assert all(len(row) == tokens for row in ours.tokens)
    plain = min(timed(lm, prompts, sampling.but(temperature=0))[0] for _ in range(repeats))
    wall, cpu = (statistics.median(theirs[kind] / own[kind] for theirs, own in pairs) for kind in (0, 1))
    seconds = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
    spent = [pairs[0][side][2].cost.tokens[reward.name] for side in (0, 1)]
    as_text, _, done = timed(text, prompts, sampling)
    alone = statistics.median((theirs[0] - plain) / (own[0] - plain) for theirs, own in pairs)
    cache, candidates, forks = memory(reward, lm, prompts, k, tokens)
    same = sum(a == b for a, b in zip(done.tokens, pairs[0][1][2].tokens, strict=True))
    print(
        f"{label:9} {rows:2} rows, T {tokens}, k {k}: from scratch {seconds[0]:7.2f} s ({spent[0]:9,} reward tokens), "
        f"cached {seconds[1]:6.2f} s ({spent[1]:7,}), ratio {wall:.1f}x (CPU time {cpu:.1f}x), scoring {alone:.1f}x"
    )
    print(
        f"{'':9} same tokens; text path {as_text:.2f} s ({same} of {rows} answers equal); the model alone {plain:.2f} s; "
        f"cache {cache:.1f} MiB, candidates {candidates:.1f} MiB beside it (forks: {forks:.1f} MiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", UnfinishedText)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"median of {arguments.repeats} alternating runs"
    )
    for label, pair in (("pocket", pocket_pair()), ("six-layer", six_layer_pair())):
        for rows in arguments.rows:
            measure(label, pair, arguments.tokens, arguments.k, rows, arguments.repeats)


if __name__ == "__main__":
    main()
