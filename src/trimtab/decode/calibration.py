"""Calibration of a reward on a base policy: where an answer's reward stands among the base's own answers to that prompt.

    C(x, y) = P(r(x, z) < r(x, y)) + P(r(x, z) = r(x, y)) / 2,   z drawn from the base

C lies in [0, 1], does not change under any increasing transform of r (not even one of its own for each prompt), has mean
1/2 under the base, and its mean under a policy is that policy's win rate over the base. `Calibrator` estimates it without
bias by the mid-rank among K draws of the base; `Calibrated` is transform(C) as a reward, usable wherever a reward is:
in a policy, in rollouts, in a trainer (`as_trl`). Balashankar et al., InfAlign, arXiv 2412.19792.

The ranks are plain: nothing is interpolated between two neighbouring draws, so that the estimate stays unbiased and
invariant. A coarse table (small K) limits what a steep transform can see.
Cost: K answers and K reward calls a prompt, once; then the reward alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from safetensors.torch import save as torch_bytes

from trimtab.errors import UsageError
from trimtab.files import write_atomic
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.win_rates import Transform
from trimtab.policy import Cost, Policy, Prompt, prompt_text
from trimtab.rewards import as_reward
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed

Array = npt.NDArray[np.float64]
Progress = Callable[[str], None]
FORMAT = 1
FEWEST = 16  # draws a prompt under which ranks are too coarse to be worth much
CHUNK = 64  # prompts sampled together
FILE = "calibrator.safetensors"


@dataclass(frozen=True)
class Source:
    """What a calibrator was made from: another base, other sampling or another reward need another one."""

    policy: str
    sampling: str
    reward: str
    names: tuple[str, str]  # of the policy and the reward, for messages

    @staticmethod
    def of(policy: Policy, sampling: Sampling, reward: Reward) -> Source:
        drawn = {key: value for key, value in sampling.to_dict().items() if key not in ("seed", "samples")}
        text = ", ".join(f"{key}={value}" for key, value in drawn.items())
        return Source(policy_fingerprint(policy), text, reward.fingerprint, (policy.name, reward.name))


class Calibrator:
    """Sorted rewards of the base's own answers, a table a prompt. Make one with `fit` or `load`.

    tables      prompt hash -> rewards [K'] ascending, K' <= draws: answers that could not be judged are left out
    draws       K, answers drawn for each prompt
    truncated   share of the draws that were cut at max_new_tokens; they are scored as they are
    cost        what drawing and scoring took
    """

    def __init__(
        self,
        tables: Mapping[str, Array],
        draws: int,
        source: Source,
        truncated: float = 0.0,
        cost: Cost | None = None,
    ):
        self.tables, self.draws, self.source = dict(tables), draws, source
        self.truncated, self.cost = truncated, cost or Cost()

    @classmethod
    def fit(
        cls,
        policy: Policy,
        prompts: Sequence[Prompt],
        reward: Any,
        draws: int = 64,
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> Calibrator:
        """Draw `draws` answers to each different prompt and score them. Warns where the tables are of little use."""
        if draws < 2:
            raise UsageError(f"a calibrator needs 2 draws a prompt or more (64 is usual), not {draws}")
        if not prompts:
            raise UsageError("a calibrator needs at least one prompt")
        if draws < FEWEST:
            warnings.warn(f"{draws} draws a prompt rank answers coarsely: give {FEWEST} or more", stacklevel=2)
        out = draw_tables(policy, prompts, as_reward(reward), draws, sampling, progress)
        if 0 < out.tied < len(out.tables):
            warnings.warn(
                f"{out.tied} of {len(out.tables)} prompts have one reward on all their draws and teach nothing: "
                "informative() leaves them out",
                stacklevel=2,
            )
        return out

    @property
    def tied(self) -> int:
        """Prompts of which every draw has the same reward (or none was judged): C is 1/2 on all the base's answers."""
        return sum(_flat(table) for table in self.tables.values())

    def informative(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose draws differ in reward: what a trainer should be given. Unknown prompts are kept."""
        return [prompt for prompt in prompts if not _flat(self.tables.get(prompt_hash(prompt), np.array([0.0, 1.0])))]

    def lacks(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The different prompts among these that have no table, in order."""
        missing = {key: prompt for prompt in prompts if (key := prompt_hash(prompt)) not in self.tables}
        return list(missing.values())

    def calibrate(self, prompts: Sequence[Prompt], rewards: Sequence[float | None]) -> list[float | None]:
        """C of each answer from its reward. None where it was not judged, or where none of its prompt's draws was."""
        out: list[float | None] = []
        start = 0
        while start < len(rewards):  # a run of rows of one prompt at a time
            stop = start + 1
            while stop < len(rewards) and prompts[stop] == prompts[start]:
                stop += 1
            out += _ranked(self._table(prompts[start]), rewards[start:stop])
            start = stop
        return out

    def _table(self, prompt: Prompt) -> Array:
        table = self.tables.get(prompt_hash(prompt))
        if table is None:
            said = prompt_text(prompt)[:60]
            raise UsageError(f"the calibrator has no table for the prompt {said!r}: fit it on that prompt too")
        return table

    def merged(self, other: Calibrator) -> Calibrator:
        """The tables of both; those of the other where both have one."""
        self._agree(other.source)
        return Calibrator(
            {**self.tables, **other.tables}, min(self.draws, other.draws), self.source,
            max(self.truncated, other.truncated), self.cost + other.cost,
        )  # fmt: skip

    def check(self, policy: Policy, sampling: Sampling, reward: Reward) -> None:
        """Refuse another base (weights, options), other sampling or another reward than the tables were made with."""
        self._agree(Source.of(policy, sampling, reward))

    def _agree(self, used: Source) -> None:
        made = self.source
        for what, a, b in (
            ("policy", f"{made.names[0]} ({made.policy})", f"{used.names[0]} ({used.policy})"),
            ("sampling", made.sampling, used.sampling),
            ("reward", f"{made.names[1]} ({made.reward})", f"{used.names[1]} ({used.reward})"),
        ):
            if getattr(made, what) != getattr(used, what):
                raise UsageError(f"this calibrator was made with the {what} {a}, not {b}: fit a new one")

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the tables and what they were made from."""
        return hashlib.sha256(self._to_bytes()).hexdigest()[:16]

    # on disk

    def save(self, folder: str | Path) -> Path:
        """Write `calibrator.safetensors` (rewards, and the rest as JSON in its header) into a folder; returns the file."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        write_atomic(where / FILE, self._to_bytes())
        return where / FILE

    def _to_bytes(self) -> bytes:
        record = {
            "format": FORMAT,
            "draws": self.draws,
            "truncated": self.truncated,
            "source": dataclasses.asdict(self.source),
            "prompts": list(self.tables),
        }
        tensors = {
            "rewards": np.concatenate([np.empty(0), *self.tables.values()]),
            "counts": np.array([len(table) for table in self.tables.values()], dtype=np.int64),
        }
        return to_bytes(tensors, metadata={"calibrator": json.dumps(record, sort_keys=True)})

    @classmethod
    def load(cls, folder: str | Path) -> Calibrator:
        """Read what `save` wrote. Raises `UsageError` for a folder without one, or a damaged one."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise UsageError(f"{str(folder)!r} is not a calibrator: {FILE} is missing")
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {})["calibrator"])
                rewards, counts = file.get_tensor("rewards"), file.get_tensor("counts")
            keys, source = record["prompts"], record["source"]
            known = Source(source["policy"], source["sampling"], source["reward"], tuple(source["names"]))
            whole = record["format"] == FORMAT and len(keys) == len(counts) and counts.sum() == len(rewards)
            draws, truncated = int(record["draws"]), float(record["truncated"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"the calibrator in {str(folder)!r} is damaged: {error}") from error
        tables = np.split(rewards, np.cumsum(counts)[:-1]) if len(counts) else []
        if not whole or not np.isfinite(rewards).all() or any((np.diff(table) < 0).any() for table in tables):
            raise UsageError(f"the calibrator in {str(folder)!r} is damaged: its tables do not fit together")
        return cls(dict(zip(keys, tables, strict=True)), draws, known, truncated)


class Calibrated(Reward):
    """transform(C(reward)): another reward. `policy` given: prompts without a table are sampled on the fly.

    transform: a function on [0, 1] such as `measure.win_rates.Transform`; None is C itself. What is sampled on the fly is
    kept in the calibrator, and its cost is added to the calibrator's.
    """

    slug: ClassVar[str] = "calibrated"
    on_prefixes = False  # ranks are those of whole answers

    def __init__(
        self,
        reward: Any,
        calibrator: Calibrator,
        transform: Transform | None = None,
        policy: Policy | None = None,
        sampling: Sampling = Sampling(),
    ):
        self.reward, self.calibrator, self.transform = as_reward(reward), calibrator, transform or Transform("identity")
        self.policy, self.sampling = policy, sampling
        if policy is not None:
            calibrator.check(policy, sampling, self.reward)
        elif calibrator.source.reward != self.reward.fingerprint:
            made = calibrator.source.names[1]
            raise UsageError(f"this calibrator was made with the reward {made}, not {self.reward.name}: fit a new one")
        parts = (self.reward.fingerprint, calibrator.fingerprint, dataclasses.asdict(self.transform))
        self._fingerprint = fingerprint_of(
            self.slug, *parts
        )  # of the tables at the start: those made on the way are draws alike

    @property
    def name(self) -> str:
        return f"{self.transform.kind}(calibrated({self.reward.name}))"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def tokens_forwarded(self) -> int:  # type: ignore[override]
        return self.reward.tokens_forwarded

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        missing = self.calibrator.lacks(prompts) if self.policy is not None else []
        if missing and self.policy is not None:
            made = draw_tables(self.policy, missing, self.reward, self.calibrator.draws, self.sampling)
            self.calibrator.tables |= made.tables
            self.calibrator.cost = self.calibrator.cost + made.cost
        ranks = self.calibrator.calibrate(prompts, self.reward.score(prompts, texts))
        return self.transform.each(ranks)


def draw_tables(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    draws: int,
    sampling: Sampling,
    progress: Progress | None = None,
) -> Calibrator:
    """A calibrator of these prompts, each different one drawn once; without the warnings of `Calibrator.fit`."""
    start = time.perf_counter()
    different = list({prompt_hash(prompt): prompt for prompt in prompts}.items())
    out = Calibrator({}, draws, Source.of(policy, sampling, reward))
    cut = 0
    for first in range(0, len(different), CHUNK):
        part = different[first : first + CHUNK]
        seed = derive_seed(sampling.seed, "calibration", first)
        drawn = policy.generate([prompt for _, prompt in part], sampling.but(samples=draws, seed=seed))
        rewards = reward.score(drawn.prompts, drawn.texts, drawn.cost)
        for row, (key, _) in enumerate(part):
            judged = [value for value in rewards[row * draws : (row + 1) * draws] if value is not None]
            out.tables[key] = np.sort(np.array(judged, dtype=np.float64))
        cut += drawn.finish_reasons.count("length")
        out.cost = out.cost + drawn.cost
        if progress is not None:
            progress(f"calibrating: prompt {first + len(part)} of {len(different)}")
    out.truncated = cut / (draws * max(1, len(different)))
    out.cost.seconds = time.perf_counter() - start
    return out


def mid_ranks(table: Array, rewards: Array) -> Array:
    """The share of the ascending table [K] below each reward [N], ties counting half."""
    return (table.searchsorted(rewards, "left") + table.searchsorted(rewards, "right")) / (2 * len(table))


def prompt_hash(prompt: Prompt) -> str:
    """16 hex digits of a prompt."""
    return fingerprint_of(prompt)


def policy_fingerprint(policy: Any) -> str:
    """16 hex digits of what a policy draws from: a model's weights; of a wrapper its class, options and all it wraps."""
    own = getattr(policy, "fingerprint", None)
    if isinstance(own, str):
        return own
    if hasattr(policy, "tensors"):  # a fitted control
        tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in policy.tensors().items()}
        return fingerprint_of(type(policy).__name__, _marks(policy), hashlib.sha256(torch_bytes(tensors)).hexdigest())
    return fingerprint_of(type(policy).__name__, getattr(policy, "name", ""), _marks(policy))


def _marks(policy: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in vars(policy).items():
        if key.startswith("_") or key == "origin":
            continue
        if isinstance(getattr(value, "fingerprint", None), str) or hasattr(value, "generate") or hasattr(value, "edit"):
            out[key] = policy_fingerprint(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            out[key] = dataclasses.asdict(value)
    return out


def _ranked(table: Array, rewards: Sequence[float | None]) -> list[float | None]:
    if not len(table):
        return [None] * len(rewards)
    ranks = mid_ranks(table, np.array([np.nan if reward is None else reward for reward in rewards]))
    return [None if reward is None else float(rank) for reward, rank in zip(rewards, ranks, strict=True)]


def _flat(table: Array) -> bool:
    return not len(table) or bool(table[0] == table[-1])
