"""Reading hidden states and repeating a measurement: one pass against two libraries' ways, memory, and the cache.

    python benchmarks/measuring.py [--texts 500] [--repeats 3] [--threads 1]

reading    pooled states of all layers (four poolings) by hooks in one pass, against the model's own forward with
           `output_hidden_states=True` and the mean pooled from them; same batches, pocket/base, ratio in one run
memory     peak resident memory of a process that reads 500 texts and of one that reads 10 times as many
cache      the same measurement asked twice (refusal on pocket/base), in one process, Python's own start left out; and the
           whole command, with it
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trimtab import LM, pocket
from trimtab.environment import environment
from trimtab.measure.cache import Cache
from trimtab.measure.measuring import Asked, diagnostic, run_measure
from trimtab.measure.states import read_states, text_rows
from trimtab.policy import prompt_text
from trimtab.sampling import Sampling


def texts(count: int) -> list[str]:
    return [f"{prompt_text(prompt)} {number}" for number, prompt in enumerate(pocket.prompts("train", count, seed=0))]


@torch.no_grad()
def by_library(lm: LM, rows: list[list[int]]) -> list[torch.Tensor]:
    """The usual way: the whole forward, every layer's states kept, then the mean over real tokens."""
    out = []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), 64):
        part = [rows[i] for i in order[at : at + 64]]
        longest = max(map(len, part))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        hidden = lm.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = mask[..., None] / mask.sum(1)[:, None, None]
        out.append(torch.stack([(one * weights).sum(1) for one in hidden], 1))
    return out


def reading(count: int, repeats: int) -> None:
    lm = LM.load("pocket/base")
    rows = text_rows(lm, texts(count))
    pairs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        by_library(lm, rows)
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        read_states(lm, rows)
        pairs.append((theirs, time.perf_counter() - start))
    pairs = pairs[1:]  # the first warms up
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"reading {count} texts, {sum(map(len, rows)):,} tokens: output_hidden_states {pairs[-1][0]:.2f} s, "
        f"hooks {pairs[-1][1]:.2f} s with four poolings, written to disk; ratio {ratio:.2f}x"
    )


def memory(count: int) -> None:
    """Each size in a process of its own: the peak of a process never falls."""
    peaks = []
    for size in (0, count, 10 * count):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", str(size)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    print(f"memory: {peaks[0]:,} MB without a text, {peaks[1]:,} MB after {count}, {peaks[2]:,} MB after {10 * count}")


def peak(count: int) -> None:
    lm = LM.load("pocket/base")
    if count:
        with tempfile.TemporaryDirectory() as folder:
            states = read_states(lm, text_rows(lm, texts(count)), cache=Cache(Path(folder)))
            states.pooled("mean", 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def cache() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        file.write_text("\n".join(dict.fromkeys(texts(300))))
        tool, asked = diagnostic("refusal", {"samples": "4"}), Asked((file,), sampling=Sampling(max_new_tokens=48))
        store = Cache(Path(folder) / "cache")
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            run_measure(tool, ["pocket/base"], asked, cache=store)
            seconds.append(time.perf_counter() - start)
        command = [
            sys.executable,
            "-m",
            "trimtab",
            "measure",
            "refusal",
            "pocket/base",
            "--texts",
            str(file),
            "--samples",
            "4",
        ]
        environment = {**os.environ, "TRIMTAB_CACHE": str(Path(folder) / "other")}
        whole = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            whole.append(time.perf_counter() - start)
    print(
        f"cache: first {seconds[0]:.2f} s, again {seconds[1] * 1000:.1f} ms, ratio {seconds[0] / seconds[1]:.0f}x; "
        f"the whole command {whole[0]:.2f} s, again {whole[1]:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        peak(args.peak)
        return
    about = environment()
    print(f"{about['machine']}, {about['cpu_count']} cores, torch {about['torch']}, transformers {about['transformers']}, "
          f"float32, {args.threads} thread")  # fmt: skip
    reading(args.texts, args.repeats)
    memory(args.texts)
    cache()


if __name__ == "__main__":
    main()
