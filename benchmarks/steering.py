"""What steering costs while decoding: `LM.generate` under a control against the same call without one.

    python benchmarks/steering.py [MODEL ...] [--rows 64] [--new-tokens 48] [--repeats 7] [--threads 1] [--device cpu]

MODEL defaults to pocket/base, and to random Llamas of 2 M and 20 M parameters (random weights: only the time matters).
Both sides draw the same number of tokens (end tokens off); the runs alternate and the ratio is the median of the pairwise
ratios, by CPU time and by the clock. RE-Control takes 30 ascent steps with a value network as wide as the hidden state
(at least 128); Natural Control one pass of its network of the same width.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import transformers

from trimtab import LM, Sampling, Steered
from trimtab.steer import NaturalControl, ReControl, ValueNetwork
from trimtab.steer.natural_control import ControlNetwork

PROMPT_TOKENS = 24
RANDOM = {"random-2M": (192, 4), "random-20M": (512, 6)}  # hidden size, layers


def load(name: str, device: str) -> LM:
    if name not in RANDOM:
        return LM.load(name, device=device)
    width, layers = RANDOM[name]
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return LM(model.to(device), LM.load("pocket/base").tokenizer, name)


def controls(lm: LM) -> dict[str, Any]:
    """A strength at which the edits are about as long as they are in use: a twentieth of the hidden state."""
    width = max(128, lm.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value = ValueNetwork(lm.hidden_size, width).requires_grad_(False).to(lm.device)
        network = ControlNetwork(lm.hidden_size, width).requires_grad_(False).to(lm.device)
        torch.nn.init.normal_(network.layers[-1].weight, std=0.01)  # type: ignore[arg-type]
    states = next(lm.hidden_states(["Q: What is 3 + 5?\nA:"], [[5, 6, 7]]))
    found: dict[str, Any] = {}
    for name, control in (
        ("re-control, 30 steps", ReControl(value, step_size=0.01, steps=30)),
        ("natural-control", NaturalControl([network], strength=1.0)),
    ):
        moved = float(((control.edit(states) - states).norm(dim=-1) / states.norm(dim=-1)).mean())
        found[name] = control.scaled(0.05 / moved)
    return found


def seconds(policy: Any, rows: int, new_tokens: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    policy.generate([""] * rows, Sampling(max_new_tokens=new_tokens))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["pocket/base", *RANDOM])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(
        f"{platform.machine()}, {options.device}, {options.threads} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {options.rows} rows of {PROMPT_TOKENS} + {options.new_tokens} tokens, median of "
        f"{options.repeats} alternating runs"
    )
    for name in options.models:
        lm = load(name, options.device)
        size = sum(parameter.numel() for parameter in lm.model.parameters())
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(4, min(512, lm.vocab_size), (options.rows, PROMPT_TOKENS), generator=generator).tolist()
        lm.__dict__["encode"] = lambda given, rows=prompts: rows[: len(given)]
        lm.__dict__["eos_ids"] = frozenset()
        print(f"{name}: {size / 1e6:.2f} M parameters, hidden size {lm.hidden_size}")
        for label, control in controls(lm).items():
            steered = Steered(lm, control)
            seconds(lm, options.rows, 8), seconds(steered, options.rows, 8)
            pairs = [
                (seconds(lm, options.rows, options.new_tokens), seconds(steered, options.rows, options.new_tokens))
                for _ in range(options.repeats)
            ]
            wall, cpu = (statistics.median(edited[kind] / plain[kind] for plain, edited in pairs) for kind in (0, 1))
            print(f"  {label:22} {wall:.3f}x plain decoding (CPU time {cpu:.3f}x)")


if __name__ == "__main__":
    main()
