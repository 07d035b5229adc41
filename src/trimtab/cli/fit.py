"""`trimtab fit`: fits a controller from a reward and saves it."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

from trimtab import catalogue
from trimtab.cli.arguments import Parser, add_reward, add_sampling
from trimtab.cli.output import progress
from trimtab.errors import UsageError, unknown
from trimtab.files import digest
from trimtab.policy import Prompt
from trimtab.prompts import read_prompts
from trimtab.spec import build, changed

EXAMPLES = """\
  trimtab fit natural-control pocket/base --reward pocket/reward --prompts prompts.jsonl --out fits/kind
  trimtab fit re-control MODEL --reward sentiment --prompts openings.txt --out fits/happy --steps 30 --step-size 1
  trimtab methods re-control        # the options of a method, each as --KEY VALUE"""


def run(words: list[str]) -> None:
    """Fits and saves."""
    parser = Parser("fit", "Fits a controller to a model and a reward, and saves it as safetensors and JSON.", EXAMPLES)
    parser.add_argument("method", metavar="METHOD", help="natural-control, re-control, pref-ctrl, static-re, ...")
    parser.add_argument("model", metavar="MODEL", help="pocket/NAME, a local folder or a Hub id")
    add_reward(parser, required=True)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="text, one a line, or JSONL with 'prompt'")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where the controller goes; the same command resumes"
    )
    add_sampling(parser)
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [--KEY VALUE ...]"
    ours, options = split_options(words, parser.flags())
    args = parser.parse(ours)

    names = _options(args.method)
    known = [f"--{name.replace('_', '-')}" for name in names]
    for flag in options:
        if flag.replace("_", "-") not in known:
            raise unknown(f"option of trimtab fit {args.method}", flag, {*known, *parser.flags()})
    prompts = read_prompts(args.prompts)

    settings = {flag.removeprefix("--").replace("-", "_"): value for flag, value in options.items()}
    if "seed" in names:
        settings["seed"] = str(args.seed)
    config = build(catalogue.method(args.method).Config, settings, f"method {args.method!r}")
    _fit(args, prompts, config)
    print(f"controller: {args.out}\nuse it: trimtab generate {args.model} PROMPT --controller {args.out}")


def _fit(args: Namespace, prompts: list[Prompt], config: Any) -> None:
    """Fits into a run directory: killed at any moment, the same command ends with the same controller."""
    from trimtab.lm import LM
    from trimtab.rewards import parse_reward
    from trimtab.run import RunDirectory
    from trimtab.sampling import Sampling

    reward = parse_reward(args.reward)
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    with progress() as say:
        say(f"loading {args.model}")
        lm = LM.load(args.model)
        arguments = {"method": args.method, "model": args.model, "reward": args.reward, "options": changed(config)}
        arguments |= {"sampling": sampling.to_dict()}
        inputs = {"prompts": digest(args.prompts), "model": lm.fingerprint, "reward": reward.fingerprint}
        with RunDirectory.open(args.out, "fit", arguments, inputs) as run:
            if run.events("fitted"):
                say(f"{args.out} was finished before")
                return
            with run.contents() as folder:
                method = catalogue.method(args.method)
                controller = method.fit(lm, prompts, reward, sampling=sampling, config=config, progress=say)
                controller.save_pretrained(folder)
            run.event("fitted", warnings=controller.origin.warnings)
            for warning in controller.origin.warnings:
                warnings.warn(warning, stacklevel=2)


def split_options(words: list[str], flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of `fit` itself, and the method's own `--KEY VALUE` or `--KEY=VALUE` pairs (those not in `flags`)."""
    ours: list[str] = []
    options: dict[str, str] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or flag in flags:
            ours.append(word)
            if flag in flags and flag != "--help" and not equals and at < len(words):
                ours.append(words[at])
                at += 1
            continue
        if not equals:
            if at == len(words) or words[at].startswith("--"):
                raise UsageError(f"{flag} needs a value: {flag} VALUE")
            value = words[at]
            at += 1
        if flag in options:
            raise UsageError(f"{flag} is given twice")
        options[flag] = value
    return ours, options


def _options(slug: str) -> list[str]:
    card = catalogue.card(slug)
    if card.stage != "steer":
        known = [other.slug for other in catalogue.cards() if other.stage == "steer"]
        raise UsageError(f"{slug} has nothing to fit (methods that do: {', '.join(known)})")
    return list(catalogue.options(slug))
