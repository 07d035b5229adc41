"""Tokens per second of `LM.generate` and of transformers `generate`: same model, rows, lengths and number of tokens.

    python benchmarks/sampling.py [MODEL ...] [--rows 48] [--new-tokens 64] [--repeats 7] [--threads 1]

MODEL defaults to ../shared/models/stories260k (beside the project) and pocket/base, whichever exist. Both sides draw at
temperature 1 without cuts, end tokens are switched off on both sides, and the runs alternate; the ratio is the median of
the pairwise ratios. "unpadded" prompts have equal lengths, "padded" ones between half and the whole of that.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab import LM, Sampling

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = {
    str(ROOT.parent / "shared/models/stories260k"): ROOT.parent / "shared/models/stories260k",
    "pocket/base": ROOT / "src/trimtab/pocket/models/base",
}
PROMPT_TOKENS = 24


def peer(lm: LM, prompts: list[list[int]], new_tokens: int) -> None:
    """transformers `generate` on left-padded rows."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    out = lm.model.generate(ids, attention_mask=mask, generation_config=config)
    assert out.shape[1] == width + new_tokens


def ours(lm: LM, prompts: list[list[int]], new_tokens: int) -> None:
    lm.__dict__["encode"] = lambda _: prompts  # the peer does not tokenize either
    done = lm.generate([""] * len(prompts), Sampling(max_new_tokens=new_tokens))
    assert all(len(row) == new_tokens for row in done.tokens)


def seconds(run: Any, *arguments: Any) -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU time (which other work on the machine disturbs less)."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, rows: int, new_tokens: int, repeats: int) -> None:
    plain = LM.load(name)
    plain.__dict__["eos_ids"] = frozenset()
    # the peer is measured with the attention transformers chooses by itself
    stock = LM(transformers.AutoModelForCausalLM.from_pretrained(plain.model.name_or_path), plain.tokenizer, name)
    stock.model.generation_config.eos_token_id = None
    size = sum(parameter.numel() for parameter in plain.model.parameters())
    print(f"\n{name}: {type(plain.model).__name__}, {size / 1e6:.2f} M parameters, {plain.model.dtype}")
    generator = torch.Generator().manual_seed(0)
    for label, shortest in (("unpadded", PROMPT_TOKENS), ("padded", PROMPT_TOKENS // 2)):
        lengths = torch.randint(shortest, PROMPT_TOKENS + 1, (rows,), generator=generator).tolist()
        lengths[0] = PROMPT_TOKENS
        prompts = [torch.randint(4, plain.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        peer(stock, prompts, 8), ours(plain, prompts, 8)
        pairs = [
            (seconds(peer, stock, prompts, new_tokens), seconds(ours, plain, prompts, new_tokens))
            for _ in range(repeats)
        ]
        speed = [statistics.median(rows * new_tokens / pair[side][0] for pair in pairs) for side in (0, 1)]
        wall, cpu = (statistics.median(theirs[kind] / own[kind] for theirs, own in pairs) for kind in (0, 1))
        print(
            f"  {label:9} rows {rows:4d}  prompt {min(lengths)}-{max(lengths)}  new {new_tokens}: "
            f"transformers {speed[0]:8.0f} tokens/s, trimtab {speed[1]:8.0f} tokens/s, "
            f"ratio {wall:.2f}x (CPU time {cpu:.2f}x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    models = arguments.models or [name for name, folder in CANDIDATES.items() if folder.is_dir()]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; median of {arguments.repeats} alternating runs"
    )
    for name in models:
        for rows in arguments.rows:
            measure(name, rows, arguments.new_tokens, arguments.repeats)


if __name__ == "__main__":
    main()
