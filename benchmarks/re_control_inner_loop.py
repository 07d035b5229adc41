"""RE-Control's inner loop, closed form against the published one: same value network, same states, same number of steps.

    python benchmarks/re_control_inner_loop.py [--steps 30 100] [--width 4096] [--batch 8] [--prompt-tokens 64] [--threads 1]

"published" is the loop of the paper's code: an SGD optimiser on a copy of the hidden states, autograd through the value
network at every step, on every position it is handed. "all positions" is its prefill step (batch x prompt tokens rows),
"last position" is every later step (batch rows); ours edits the last position only, in both. The difference is
that of the two edits u of a row at the last position, relative to |u|; rounding can make a unit of V cross its kink one
step earlier or later in one of them, which moves a single row by some 1e-4.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from trimtab.steer.value import ValueNetwork


def published(value: torch.nn.Module, hidden: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
    """u [..., D] by minimising -sum V(hidden + u) with SGD."""
    edited = hidden.clone().requires_grad_(True)
    optimiser = torch.optim.SGD([edited], lr=step_size)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = -value(edited).sum()
        loss.backward()
        optimiser.step()
    return (edited - hidden).detach()


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100])
    parser.add_argument(
        "--width", type=int, default=4096, help="hidden size of the model and width of the value network"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value = ValueNetwork(options.width).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(options.batch, options.prompt_tokens, options.width, generator=generator)
    last = states[:, -1].clone()
    print(
        f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, float32, "
        f"d = H = {options.width}, batch {options.batch}, prompt {options.prompt_tokens}, median of {options.repeats}"
    )
    for steps in options.steps:
        ours = seconds(lambda n=steps: value.ascend(last, 1.0, n), options.repeats)
        theirs = seconds(lambda n=steps: published(value, last, 1.0, n), options.repeats)
        u = published(value, last, 1.0, steps)
        rows = (value.ascend(last, 1.0, steps) - u).norm(dim=-1) / u.norm(dim=-1)
        print(
            f"{steps:4d} steps, last position: published {theirs * 1e3:8.0f} ms, ours {ours * 1e3:8.0f} ms, "
            f"ratio {theirs / ours:6.1f}x, difference median {rows.median():.0e}, largest {rows.max():.0e}"
        )
        if steps == min(options.steps) and options.prompt_tokens > 1:
            start = time.perf_counter()
            published(value, states, 1.0, steps)
            theirs = time.perf_counter() - start
            print(
                f"{steps:4d} steps, all positions (prefill): published {theirs * 1e3:8.0f} ms, "
                f"ours {ours * 1e3:8.0f} ms, ratio {theirs / ours:6.1f}x"
            )


if __name__ == "__main__":
    main()
