"""Tokens per second of `LM.generate` and of transformers `generate`: same model, rows, lengths and number of tokens.

    python benchmarks/sampling.py [MODEL ...] [--rows 48] [--new-tokens 64] [--repeats 7] [--threads 1]

MODEL defaults to ../shared/models/stories260k (beside the project) and pocket/base, whichever exist. Both sides draw at
temperature 1 without cuts and the runs alternate; the ratio is the median of the pairwise ratios.

unpadded  prompts of equal lengths; end tokens are switched off on both sides, so both draw the same number of tokens
padded    the same with prompts between half and the whole of that length
ending    end tokens on, the world's own prompts for a pocket model: tokens that belong to an answer count, and
          transformers goes on until the last row has ended
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab import LM, Sampling, pocket

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = {
    str(ROOT.parent / "shared/models/stories260k"): ROOT.parent / "shared/models/stories260k",
    "pocket/base": ROOT / "src/trimtab/pocket/models/base",
}
PROMPT_TOKENS = 24


def peer(lm: LM, prompts: list[list[int]], new_tokens: int) -> int:
    """transformers `generate` on left-padded rows. Returns how many tokens belong to an answer."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    ends = sorted(lm.eos_ids)
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=ends or None,
        pad_token_id=0,
    )  # fmt: skip
    new = lm.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    ended = torch.isin(new, torch.tensor(ends, dtype=torch.long)).int().cumsum(1)
    return int((ended == 0).sum()) + int((ended.amax(1) > 0).sum())


def ours(lm: LM, prompts: list[list[int]], new_tokens: int) -> int:
    lm.__dict__["encode"] = lambda _: prompts  # the peer does not tokenize either
    return sum(map(len, lm.generate([""] * len(prompts), Sampling(max_new_tokens=new_tokens)).tokens))


def timed(run: Callable[..., int], *arguments: Any) -> tuple[float, float]:
    """Seconds a token by the clock and of this process's CPU time (which other work on the machine disturbs less)."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = run(*arguments)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def measure(name: str, rows: int, new_tokens: int, repeats: int) -> None:
    lm = LM.load(name)
    # the peer is measured with the attention that transformers chooses by itself
    stock = LM(transformers.AutoModelForCausalLM.from_pretrained(lm.model.name_or_path), lm.tokenizer, name)
    stock.model.generation_config = transformers.GenerationConfig()
    size, ends = sum(parameter.numel() for parameter in lm.model.parameters()), lm.eos_ids
    print(f"{name}: {type(lm.model).__name__}, {size / 1e6:.2f} M parameters, {lm.model.dtype}, {rows} rows")
    generator = torch.Generator().manual_seed(0)
    for label, shortest in (("unpadded", PROMPT_TOKENS), ("padded", PROMPT_TOKENS // 2), ("ending", PROMPT_TOKENS)):
        lengths = torch.randint(shortest, PROMPT_TOKENS + 1, (rows,), generator=generator).tolist()
        lengths[0] = PROMPT_TOKENS
        prompts = [torch.randint(4, lm.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        if label == "ending" and name.startswith("pocket/"):
            lm.__dict__.pop("encode", None)
            prompts = lm.encode(pocket.prompts("test", rows, seed=0))
        for side in (stock, lm):
            side.__dict__["eos_ids"] = ends if label == "ending" else frozenset()
        timed(peer, stock, prompts, 8), timed(ours, lm, prompts, 8)
        pairs = [
            (timed(peer, stock, prompts, new_tokens), timed(ours, lm, prompts, new_tokens)) for _ in range(repeats)
        ]
        speed = [1 / statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
        wall, cpu = (statistics.median(theirs[kind] / own[kind] for theirs, own in pairs) for kind in (0, 1))
        print(
            f"  {label:9} prompt {min(map(len, prompts))}-{max(map(len, prompts))}, new {new_tokens}: transformers "
            f"{speed[0]:6.0f} tokens/s, trimtab {speed[1]:6.0f} tokens/s, ratio {wall:.2f}x (CPU time {cpu:.2f}x)"
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
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"median of {arguments.repeats} alternating runs"
    )
    for name in models:
        for rows in arguments.rows:
            measure(name, rows, arguments.new_tokens, arguments.repeats)


if __name__ == "__main__":
    main()
