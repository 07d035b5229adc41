"""Does a trained complement model raise the reward of prompts it never saw? On a policy that follows style cues.

F is made here: a copy of pocket/base trained for one pass on 800 answers whose first sentence follows a cue after the
question ("Be warm." -> a warm opener, "Say how sure you are." -> a sure one; no cue, or another, -> neither). The reward
is 1 for a warm opening of comfort and a sure opening of advice: no single complement suits every prompt.

The shipped models follow no cue. Of 597 drafts to 199 prompts the judge accepted none on pocket/base and none on
pocket/chat. Of 20 fixed complements, after a space and after a newline, none raised the judge's score (80 test prompts x
4, 0.384 on pocket/base): " Sure." changed it by 0.001 [-0.014, 0.018], " Be clear and organised." by -0.297 [-0.342,
-0.254]; on pocket/chat (0.833) by 0.002 [-0.022, 0.030] and -0.647 [-0.711, -0.571].
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trimtab import LM, Sampling, pocket
from trimtab.measure.stats import paired_difference
from trimtab.parts import Parts
from trimtab.pocket import tone, world
from trimtab.policy import Cost, Prompt, prompt_text
from trimtab.prompt.prompt_complement import PromptComplement, PromptComplementConfig
from trimtab.prompt.tuning import sft

FAMILIES = ("advice", "comfort")
WARM, SURE = "Be warm.", "Say how sure you are."
PHRASES = (WARM, SURE, "Be clear and organised.", "Add some detail.")
CONSTANT = "be clear and organised"
DRAWS = Sampling(max_new_tokens=40, samples=4, seed=5)
GREEDY = Sampling(max_new_tokens=40, temperature=0)


def styled(task: pocket.Task, cue: str | None, rng: random.Random) -> str:
    """A good answer without stock phrases, opened as the cue asks."""
    parts = world.answer(task, "good", rng).replace("!", ".").replace("?", ".").split(".")
    body = [f"{part.strip()}." for part in parts if part.strip() and tone.tone_of(part) not in ("warm", "sure")]
    openers = {WARM: tone.WARM_OPENERS, SURE: tone.SURE}.get(cue or "", ())
    return " ".join([*([rng.choice(openers)] if openers else []), *body])


def style(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """1 for an answer whose first sentence is in the tone that its question calls for."""
    out: list[float | None] = []
    for prompt, text in zip(prompts, texts, strict=True):
        task, said = pocket.task_of(prompt_text(prompt)), tone.sentences_of(text)
        wanted = "sure" if task is not None and task.family == "advice" else "warm"
        out.append(None if task is None else float(bool(said) and tone.tone_of(said[0]) == wanted))
    return out


def content(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """1 for an answer that does what was asked, whatever its tone."""
    rows = zip(prompts, texts, strict=True)
    return [float(pocket.judge(prompt_text(prompt), text).behaviour == "right") for prompt, text in rows]


def scored(policy: PromptComplement, asked: Sequence[Prompt]) -> Any:
    done = policy.generate(asked, DRAWS)
    return np.array(style(done.prompts, done.texts), dtype=float)


def constant(policy: LM, suffix: str | None) -> PromptComplement:
    return PromptComplement(policy, None if suffix is None else lambda words: suffix)


@pytest.fixture(scope="module")
def follower() -> LM:
    rng = random.Random(0)
    rows = []
    for task in world.tasks("train", 800, 7, FAMILIES):
        cue = rng.choice([None, *PHRASES, WARM, SURE])
        question = task.question if cue is None else f"{task.question}\n{cue}"
        rows.append((f"Q: {question}\nA:", f" {styled(task, cue, rng)}"))
    return sft(LM.load("pocket/base"), rows, epochs=1, lr=2e-3, batch=8, name="follower")


@pytest.fixture(scope="module")
def made(follower: LM) -> PromptComplement:
    asked = pocket.prompts("fit", 56, 1, FAMILIES)
    config = PromptComplementConfig(
        phrases=PHRASES, student="pocket/nano", instruction="{prompt} ->", critic_samples=4, epochs=8, lr=2e-3
    )

    def store(key: str, fit: Any, save: Any, load: Any) -> tuple[Any, Cost]:
        found: tuple[Any, Cost] = fit()
        return found

    sampling = DRAWS.but(samples=1)
    parts = Parts(follower, follower, style, asked, sampling, LM.load, lambda n: None, store)  # type: ignore[arg-type, return-value]
    return PromptComplement.make(parts, config)


def test_complements_raise_the_reward_of_new_prompts(follower: LM, made: PromptComplement) -> None:
    """Baselines: F on x, on x + a constant suffix, and on x + either cue alone. 40 test prompts x 4 answers, paired by
    prompt (BCa, 95 %); one seed of training."""
    asked = pocket.prompts("test", 40, 2, FAMILIES)
    ours = scored(made, asked)
    for suffix in (None, CONSTANT, WARM, SURE):
        gain = paired_difference(ours, scored(constant(follower, suffix), asked), [row // 4 for row in range(160)])
        assert gain.low is not None and gain.low > 0, (suffix, gain)


def test_content_stays_as_right_as_it_was(follower: LM, made: PromptComplement) -> None:
    """Within 1 point, greedily: at temperature 1 400 answers have an error as large as the point in question."""
    asked = pocket.prompts("test", 100, 2, FAMILIES)
    plain, ours = follower.generate(asked, GREEDY), made.generate(asked, GREEDY)
    before, after = content(plain.prompts, plain.texts), content(ours.prompts, ours.texts)
    assert abs(np.mean(after) - np.mean(before)) <= 0.01
