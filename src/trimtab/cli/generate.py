"""`trimtab generate`: answers, from the plain model, a policy or a saved controller."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from trimtab.cli.arguments import Parser, add_json, add_reward, add_sampling, whole
from trimtab.cli.output import Progress, check_json, progress, text_stream, write_result
from trimtab.errors import UsageError
from trimtab.policy import Completions, Policy, Prompt, prompt_text
from trimtab.prompts import check_prompt, read_prompts

EXAMPLES = """\
  trimtab generate pocket/base "Q: What colour is the sky?" --n 4
  trimtab generate MODEL --prompts prompts.txt --controller fits/happy --json answers.json
  trimtab generate MODEL "Once upon a time" --policy best-of-n:n=8 --reward sentiment"""


def run(words: list[str]) -> None:
    """Prints the answers."""
    parser = Parser("generate", "Answers prompts.", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="pocket/NAME, a local folder or a Hub id")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one prompt; or use --prompts")
    parser.add_argument("--prompts", metavar="FILE", help="text, one a line, or JSONL with 'prompt'")
    parser.add_argument("--policy", metavar="NAME[:key=value,...]", help="a method with its options")
    parser.add_argument("--controller", metavar="DIR", help="a controller that trimtab fit has saved")
    add_reward(parser, required=False)
    parser.add_argument("--n", type=whole(1), default=1, metavar="K", help="answers a prompt (1)")
    add_sampling(parser)
    add_json(parser)
    args = parser.parse(words)

    if args.policy and args.controller:
        raise UsageError(
            "--policy and --controller exclude each other: NAME:controller=DIR joins a policy and a controller"
        )
    if args.controller and not Path(args.controller).is_dir():
        raise UsageError(f"--controller {args.controller}: there is no such folder")
    check_json(args.json)
    prompts = _prompts(args)

    from trimtab.sampling import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, samples=args.n, seed=args.seed)
    with progress() as say:
        say(f"loading {args.model}")
        policy = _policy(args, prompts, sampling, say)
        say(f"answering {len(prompts)} prompt{'s' if len(prompts) > 1 else ''} with {policy.name}")
        answers = policy.generate(prompts, sampling)
    if args.json != "-":
        _print(answers, args.n)
    write_result(args.json, _result(args, policy, answers))


def _prompts(args: Namespace) -> list[Prompt]:
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("give one PROMPT or --prompts FILE" + (", not both" if args.prompt is not None else ""))
    if args.prompts is not None:
        return read_prompts(args.prompts)
    try:
        return [check_prompt(args.prompt)]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _policy(args: Namespace, prompts: list[Prompt], sampling: Any, say: Progress) -> Policy:
    from trimtab.lm import LM
    from trimtab.policies import Workshop, check_policy, needs_reward
    from trimtab.rewards import parse_reward

    if args.policy:
        check_policy(args.policy)
    if args.policy and args.reward is None and needs_reward(args.policy):
        raise UsageError(f"--policy {args.policy} needs to know what is good: give --reward")
    reward = None if args.reward is None else parse_reward(args.reward)
    lm = LM.load(args.model)
    if args.controller:
        from trimtab.steer import load_controller

        return load_controller(args.controller).as_policy(lm)
    if args.policy:
        # What has to be fitted is fitted on the prompts themselves, and not kept: `trimtab fit` keeps it.
        return Workshop(lm, reward, prompts, sampling.but(samples=1), progress=say).build(args.policy).policy
    return lm


def _print(answers: Completions, samples: int) -> None:
    """The answer alone for one prompt and one sample; otherwise each under its prompt."""
    stream = text_stream(None)
    if len(answers) == 1:
        print(answers.texts[0], file=stream)
        return
    for row, text in enumerate(answers.texts):
        if row % samples == 0:
            print(f"{'' if row == 0 else chr(10)}> {prompt_text(answers.prompts[row])}", file=stream)
        print(f"{f'[{row % samples + 1}] ' if samples > 1 else ''}{text}", file=stream)
    sys.stdout.flush()


def _result(args: Namespace, policy: Policy, answers: Completions) -> dict[str, Any]:
    rows = [
        {
            "prompt": answers.prompts[row],
            "sample": row % args.n,
            "text": answers.texts[row],
            "length": len(answers.tokens[row]),
            "finish": answers.finish_reasons[row],
            "logprob": sum(answers.logprobs[row]),
        }
        for row in range(len(answers))
    ]
    return {
        "schema": 1,
        "model": args.model,
        "policy": policy.name,
        "seed": args.seed,
        "answers": rows,
        "cost": answers.cost.to_dict(),
    }
