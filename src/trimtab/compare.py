"""The table: policies x prompts x measures, every figure with an interval, every quality with its cost.

`compare` takes policies that exist; `run_compare` is the command: it builds policies from specs (fitting what they need),
keeps everything in a run directory and resumes there. Answers are drawn in fixed chunks of prompts, each with its own
seed, and each chunk is saved as soon as it is scored, so a kill costs at most the chunk in flight and a resumed run gives
the rows of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.budget import Budget, Sized, build_sized
from trimtab.divergence import Divergence, divergences, same_tokens
from trimtab.environment import environment
from trimtab.errors import UsageError
from trimtab.files import digest, dump_json
from trimtab.lm import LM
from trimtab.measure.diagnostic import config_files
from trimtab.measure.diversity import diversity
from trimtab.measure.refusal import is_refusal
from trimtab.measures import Surroundings, Wanted, panels, take
from trimtab.memory import peak_memory
from trimtab.policies import Built, Workshop, check_policy, input_digest, policy_key
from trimtab.policy import Completions, Policy, Prompt, prompt_text
from trimtab.rewards import as_reward, parse_reward
from trimtab.run import RunDirectory
from trimtab.sampling import Sampling, derive_seed
from trimtab.steer.controller import Controller, Origin
from trimtab.steer.rollouts import Progress
from trimtab.table import Measured, policy_record

CHUNK = 16  # prompts answered, scored and saved together
TRACED = 6  # prompts whose first answer is traced token by token, for steered policies
SWEEP = (0.25, 0.5, 1.5, 2.0, 3.0)  # multiples of a policy's strength
SCHEMA = 1


@dataclass
class Setting:
    """What every policy of a comparison is measured with."""

    base: LM
    prompts: Sequence[Prompt]
    reward: Any
    gold: Any | None
    sampling: Sampling
    run: RunDirectory | None = None
    progress: Progress | None = None
    coherence: Any | None = None
    families: list[str | None] = field(default_factory=list)


def compare(
    policies: Sequence[Policy],
    prompts: Sequence[Prompt],
    reward: Any,
    *,
    base: LM | None = None,
    gold: Any | None = None,
    sampling: Sampling = Sampling(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare policies on prompts; returns what `compare.json` holds.

    reward, gold: a `Reward`, a function or a spec. base: the unedited model (default: the first policy, which must be
    an `LM`). Win rate and verdict are by gold where there is one, else by the reward; both are against the base.
    """
    if not policies or not prompts:
        raise UsageError("compare needs at least one policy and one prompt")
    first = base or policies[0]
    if not isinstance(first, LM):
        raise UsageError("the first policy must be the base model (an LM), or give base=")
    others = policies[1:] if base is None else [policy for policy in policies if policy is not base]
    named = ["base", *(policy.name for policy in others)]
    if len(set(named)) < len(named):
        raise UsageError(f"policies need different names, not {named}")
    built = [Built("base", "base", first), *(_given(policy, first) for policy in others)]
    setting = Setting(
        first, prompts, as_reward(reward), None if gold is None else as_reward(gold), sampling, None, progress
    )
    return _summary(setting, [measure(setting, one, number) for number, one in enumerate(built)])


def _given(policy: Policy, base: LM) -> Built:
    """A policy made in Python as a row. A bound is on the KL from the policy it draws from: it holds if that is the base."""
    below = getattr(policy, "policy", None)
    control = getattr(below or policy, "control", None)
    made = control.origin if isinstance(control, Controller) else Origin()
    config = getattr(policy, "config", None) or getattr(control, "config", None)
    return Built(
        policy.name,
        getattr(policy, "slug", "given"),
        policy,
        dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {},
        fit_seconds=made.fit_seconds,
        fit_tokens=made.fit_tokens,
        kl_bound=getattr(policy, "kl_bound", None) if below is base else None,
    )


def run_compare(
    model: str,
    reward: str,
    prompts: Sequence[Prompt],
    policies: Sequence[str],
    *,
    out: Path,
    gold: str | None = None,
    fit_prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    sweep: bool = False,
    coherence: bool = True,
    budget: str | None = None,
    measures: Sequence[str] = (),
    judge: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build, measure, save. Writes compare.json, samples.jsonl, sweep.json and report.html into `out`.

    budget: "tokens=N" or "kl=X" (see `trimtab.budget`). measures: diagnostics as `NAME[:texts=FILE|FILE,key=value]`,
    asked of every policy; judge: who judges, for those that need a judge. What can be refused is refused before anything
    is written.
    """
    for spec in policies:
        check_policy(spec)
    limit = None if budget is None else Budget.parse(budget)
    wanted = [Wanted.parse(spec) for spec in measures]
    proxy = parse_reward(reward)
    truth = None if gold is None else parse_reward(gold)
    lm = LM.load(model)
    lm.encode(prompts)
    lm.encode(fit_prompts or [])
    for spec in policies:
        check_policy(spec, lm)
    sampling = Sampling(max_new_tokens, temperature, samples=samples, seed=seed)
    arguments = {
        "model": model, "reward": reward, "gold": gold, "prompts": list(prompts), "policies": list(policies),
        "fit_prompts": None if fit_prompts is None else list(fit_prompts), "max_new_tokens": max_new_tokens,
        "temperature": temperature, "seed": seed, "samples": samples, "sweep": sweep, "coherence": coherence,
        **({"budget": budget} if budget is not None else {}), **({"measures": list(measures)} if measures else {}),
        **({"judge": judge} if judge else {}),
    }  # fmt: skip
    inputs = {"model": lm.fingerprint, "reward": proxy.fingerprint, "gold": truth.fingerprint if truth else ""}
    inputs |= {spec: found for spec in policies if (found := input_digest(spec))}
    inputs |= {str(path): digest(path) for one in wanted for path in [*one.texts, *config_files(one.tool)]}
    with RunDirectory.open(out, "compare", arguments, inputs) as run:
        setting = Setting(lm, prompts, proxy, truth, sampling, run, progress)
        setting.families = _families(prompts)
        setting.coherence = _embedder(progress) if coherence else None
        draws = sampling.but(samples=1, seed=derive_seed(seed, "fit"))
        workshop = Workshop(lm, proxy, fit_prompts or prompts, draws, run, progress)
        specs = ["base", *(spec for spec in policies if spec != "base")]
        measured = []
        for number, spec in enumerate(specs):
            built, sized = _built(setting, workshop, spec, limit)
            measured.append(measure(setting, built, number))
            measured[-1].sized = sized
        result = _summary(setting, measured)
        if wanted:
            around = Surroundings(list(prompts), sampling.but(samples=1), proxy, judge, lm.fingerprint, run, progress)
            result["measures"] = take(wanted, measured, around)
        run.save("samples.jsonl", "".join(dump_json(row, indent=None) for one in measured for row in one.rows))
        if sweep:
            run.save_json("sweep", _sweep(setting, measured))
        run.save_json("compare", result)
        from trimtab.report import write_report

        write_report(run.path)
        run.event("finished")
    return result


def _built(setting: Setting, workshop: Workshop, spec: str, limit: Budget | None) -> tuple[Built, Sized | None]:
    """A policy, sized to the budget where there is one; how it was sized is kept, so that a resumed run does not ask."""
    if limit is None or spec == "base":
        return workshop.build(spec), None
    key = f"sized/{policy_key(spec)}"
    known = setting.run.load_json(key) if setting.run is not None else None
    if known is not None:
        built = workshop.build(spec, known["changes"])
        built.fit_tokens, built.fit_seconds = known["fit_tokens"], known["fit_seconds"]
        return built, Sized(limit, known["changes"], known["note"])
    built, sized = build_sized(workshop, spec, limit, workshop.prompts)
    if setting.run is not None:
        took = {"fit_tokens": built.fit_tokens, "fit_seconds": built.fit_seconds}
        setting.run.save_json(key, {"changes": sized.changes, "note": sized.note, **took})
    return built, sized


def measure(setting: Setting, built: Built, number: int, prompts: int | None = None) -> Measured:
    """All answers of one policy, chunk by chunk, with their scores and the cost of answering."""
    count = len(setting.prompts) if prompts is None else prompts
    measured = Measured(built)
    for first in range(0, count, CHUNK):
        key = f"chunks/{number:02d}-{first // CHUNK:04d}"
        chunk = setting.run.load_json(key) if setting.run is not None else None
        if chunk is None:
            if setting.progress is not None:
                setting.progress(f"{built.name}: prompts {first + 1} to {min(first + CHUNK, count)} of {count}")
            chunk = _answer(setting, built, range(first, min(first + CHUNK, count)))
            if setting.run is not None:
                setting.run.save_json(key, chunk)
        measured.add(chunk)
    if setting.coherence is not None:
        from trimtab.measure.coherence import coherence

        texts = [row["text"] for row in measured.rows]
        cosines = coherence([row["prompt"] for row in measured.rows], texts, setting.coherence)
        measured.coherence = float(cosines.mean())
    return measured


def _answer(setting: Setting, built: Built, numbers: range) -> dict[str, Any]:
    """One chunk: answers, scores, log-probabilities under the base, KL. Only the answering is charged."""
    prompts = [setting.prompts[i] for i in numbers]
    sampling = setting.sampling.but(seed=derive_seed(setting.sampling.seed, "answers", numbers.start // CHUNK))
    with peak_memory() as peak:
        start = time.perf_counter()
        answers = built.policy.generate(prompts, sampling)
        answers.cost.seconds = time.perf_counter() - start
    rewards = setting.reward.score(answers.prompts, answers.texts)
    golds = setting.gold.score(answers.prompts, answers.texts) if setting.gold is not None else [None] * len(answers)
    kl, nll, entropy, traces = _against_base(setting, built, answers, numbers.start)
    rows = []
    for row, text in enumerate(answers.texts):
        index = numbers[row // sampling.samples]
        rows.append(
            {
                "policy": built.name,
                "prompt_index": index,
                "sample": row % sampling.samples,
                "prompt": prompt_text(answers.prompts[row]),
                "family": setting.families[index] if setting.families else None,
                "text": text,
                "reward": rewards[row],
                "gold": golds[row],
                "kl": kl[row],
                "nll_base": nll[row],
                "entropy": entropy[row],
                "unrepeated": diversity(answers.tokens[row]).value,
                "refuses": is_refusal(text),
                "length": len(answers.tokens[row]),
                "finish": answers.finish_reasons[row],
                "trace": traces.get(row),
                "tokens": answers.tokens[row],
            }
        )
    cost = answers.cost.to_dict()
    cost["peak_memory_bytes"] = peak[0] if peak else None
    return {"rows": rows, "cost": cost}


def _against_base(
    setting: Setting, built: Built, answers: Completions, first: int
) -> tuple[list[float | None], list[float | None], list[float | None], dict[int, dict[str, Any]]]:
    """Per answer the mean KL a token (None where the policy has only a bound), NLL and entropy; traces of a few."""
    base, sampling = setting.base, setting.sampling
    traces: dict[int, dict[str, Any]] = {}
    unknown: list[float | None] = [None] * len(answers)
    if built.family == "base":
        found = divergences(base, base, answers.prompts, answers.tokens, sampling)
        nll = [_mean(-one.base_logprobs) for one in found]
        return [0.0] * len(answers), nll, _entropies(found, sampling), traces
    if not same_tokens(built.policy, base):  # another tokenizer: its answers are judged as text alone
        return unknown, unknown, unknown, traces
    if not hasattr(built.policy, "token_logprobs"):
        nll = [_mean(-one) for one in base.score(answers.prompts, answers.tokens)]
        reported = [_mean(np.array(kl)) for kl in answers.kl or [[]] * len(answers)]
        return reported, nll, unknown, traces
    found = divergences(built.policy, base, answers.prompts, answers.tokens, sampling)
    if built.controller is not None:
        wanted = [row for row in range(0, len(answers), sampling.samples) if first + row // sampling.samples < TRACED]
        states = base.hidden_states([answers.prompts[i] for i in wanted], [answers.tokens[i] for i in wanted])
        for row, hidden in zip(wanted, states, strict=True):
            signals = built.controller.trace(hidden) if built.controller.final else {}
            traces[row] = {
                "pieces": pieces(base, answers.tokens[row]),
                "value_before": None,
                "value_after": None,
                "edit_norm": None,
                **{key: [round(float(x), 5) for x in values] for key, values in signals.items()},
                "kl": [round(float(x), 6) for x in found[row].kl],
            }
    nll = [_mean(-one.base_logprobs) for one in found]
    return [_mean(one.kl) for one in found], nll, _entropies(found, sampling), traces


def _entropies(found: Sequence[Divergence], sampling: Sampling) -> list[float | None]:
    """Mean entropy a token of each answer; of a greedy policy, which has none, None."""
    return [_mean(one.entropy) if sampling.temperature else None for one in found]


def pieces(lm: LM, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to the answer: together they are the decoded answer, white space and all.

    A token on its own decodes otherwise (without its leading space, or to half a character, which here goes to the
    token that completes it).
    """
    whole = lm.decode(tokens)
    out, at = [], 0
    for end in range(1, len(tokens)):
        reached = max(at, len(os.path.commonprefix([lm.decode(tokens[:end]), whole])))
        out.append(whole[at:reached])
        at = reached
    return [*out, whole[at:]] if tokens else []


def _sweep(setting: Setting, measured: Sequence[Measured]) -> dict[str, Any]:
    """Every steered policy at multiples of its strength: where the proxy keeps rising and gold turns."""
    families: list[dict[str, Any]] = []
    for number, one in enumerate(measured):
        controller = one.built.controller
        if controller is None or one.built.family in {family["family"] for family in families}:
            continue
        points: list[dict[str, Any]] = []
        for step, factor in enumerate((*SWEEP, 1.0)):
            scaled = controller.scaled(factor)
            at = f"{one.built.family}:{controller.DIAL}={scaled.strength:.4g}"
            built = Built(at, one.built.family, scaled.as_policy(setting.base), controller=scaled)
            row = measure(setting, built, 1000 + number * 20 + step) if factor != 1.0 else one
            record = policy_record(row, measured[0], setting.gold is not None)
            kept = ("kl_per_token", "reward", "gold", "diversity", "nll_base_per_token", "length_tokens")
            points.append(
                {"name": at, "strength": scaled.strength, "strength_multiplier": factor} | {k: record[k] for k in kept}
            )
        points.sort(key=lambda point: point["strength_multiplier"])
        families.append({"family": one.built.family, "policies": points})
    return {"schema": SCHEMA, "families": families}


def _summary(setting: Setting, measured: Sequence[Measured]) -> dict[str, Any]:
    """What compare.json holds."""
    records = [policy_record(one, measured[0], setting.gold is not None) for one in measured]
    return {
        "schema": SCHEMA,
        "model": setting.base.name,
        "reward": setting.reward.name,
        "gold": None if setting.gold is None else setting.gold.name,
        "prompts": len(setting.prompts),
        "samples": setting.sampling.samples,
        "seed": setting.sampling.seed,
        "policies": records,
        "side_effects": panels(measured, records),
        "environment": environment(),
    }


def _families(prompts: Sequence[Prompt]) -> list[str | None]:
    """The task family of each prompt where the pocket world knows it."""
    from trimtab import pocket

    tasks = [pocket.task_of(prompt_text(prompt)) for prompt in prompts]
    return [None if task is None else task.family for task in tasks]


def _embedder(progress: Progress | None) -> Any | None:
    from trimtab.measure.coherence import load_embedder

    if progress is not None:
        progress("loading the sentence embedder")
    return load_embedder()


def _mean(values: Any) -> float | None:
    return round(float(values.mean()), 8) if len(values) else None
