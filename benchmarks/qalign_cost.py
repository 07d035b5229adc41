"""What a QAlign step costs: tokens forwarded and seconds, against a whole answer of the same policy.

    python benchmarks/qalign_cost.py [MODEL] [--reward SPEC] [--prompts 24] [--chains 4] [--steps 32] [--threads 1]

Every line is one run at one beta over the same prompts and seed.
step / answer   tokens that the model forwards for one step, over the mean of the answers that the chains stood at (an
                answer's last token is never forwarded, the prompt is forwarded once a run and not counted)
again           the same where rows of the proposals are let go, and what the next cuts need is forwarded again
rescored        the same where a step forwards the kept prefix too, as sampling without a cache between calls does
seconds         of one step over that of one answer of the model alone, both for all rows at once
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings

import torch

from trimtab import LM, Sampling, pocket
from trimtab.decode import metropolis
from trimtab.decode.chains import Chains
from trimtab.decode.metropolis import Walk
from trimtab.decode.qalign import QAlign
from trimtab.rewards import parse_reward

BETAS = (8.0, 2.0, 0.5, 0.1)


def run(method: QAlign, prompts: list[str], sampling: Sampling, steps: int) -> tuple[Chains, float, float, float]:
    """The chains, tokens a step, tokens of the prefixes that the steps kept (also a step), and seconds a step of all rows."""
    kept: list[int] = []
    propose = Walk.propose

    def counted(walk: Walk) -> object:
        proposed, cut = propose(walk)
        kept.append(int(cut.sum()))
        return proposed, cut

    chains = method.run(method.start(prompts, sampling), 0)
    Walk.propose = counted  # type: ignore[method-assign, assignment]
    try:
        fresh = method.start(prompts, sampling)
        start = time.perf_counter()
        method.run(fresh, steps)
        seconds = (time.perf_counter() - start - chains.cost.seconds) / steps
    finally:
        Walk.propose = propose  # type: ignore[method-assign]
    name, proposals = method.lm.name, steps * len(fresh.chains)
    forwarded = fresh.cost.tokens[name] - chains.cost.tokens[name]
    return fresh, forwarded / proposals, sum(kept) / proposals, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pocket/base", metavar="MODEL")
    parser.add_argument("--reward", default="pocket/reward")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    lm, reward = LM.load(arguments.model), parse_reward(arguments.reward)
    prompts = pocket.prompts("test", arguments.prompts, seed=0)
    sampling = Sampling(max_new_tokens=64, samples=arguments.chains, seed=1)
    lm.generate(prompts, sampling)
    plain = lm.generate(prompts, sampling)
    answer = sum(len(row) - 1 for row in plain.tokens) / len(plain)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {lm.name}, {reward.name}, "
        f"{len(prompts)} prompts x {arguments.chains} chains x {arguments.steps} steps; an answer of the model alone "
        f"forwards {answer:.1f} tokens; all {len(plain)} take {plain.cost.seconds:.2f} s"
    )
    print("    beta  accepted   answer  step / answer   again  rescored  seconds")
    for beta in BETAS:
        method = QAlign(lm, reward, beta=beta)
        chains, step, kept, seconds = run(method, prompts, sampling, arguments.steps)
        takes, metropolis.can_take = metropolis.can_take, lambda session: False
        try:
            again = run(method, prompts, sampling, arguments.steps)[1]
        finally:
            metropolis.can_take = takes
        held = [len(state.tokens) - 1 for chain in chains.chains for state in chain.draws]
        stood = sum(held) / len(held)
        print(
            f"{beta:8g} {chains.moves / chains.fresh:9.2f} {stood:8.1f} {step / stood:14.3f} {again / stood:7.3f} "
            f"{(step + kept) / stood:9.3f} {seconds / plain.cost.seconds:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
