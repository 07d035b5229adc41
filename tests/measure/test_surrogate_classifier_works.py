"""The surrogate finds a planted decision, its direction moves it, and a search on it moves the whole model.

A 4-layer model is taught to refuse where two matching words (a2 and b2) stand in a prompt and to comply where they do not
match (a2 and b0), so no single word decides. The prompt's last token is always the same.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taught import taught
from trimtab.lm import LM
from trimtab.measure.cache import Cache
from trimtab.measure.diagnostic import Subject
from trimtab.measure.measurement import Measurement
from trimtab.measure.refusal import by_phrases
from trimtab.measure.states import read_states
from trimtab.measure.surrogate_classifier import SurrogateClassifier, SurrogateClassifierConfig
from trimtab.measure.surrogate_heads import fit_head
from trimtab.sampling import Sampling
from trimtab.steer.layers import edit_output, find_blocks

PAIRS, FILLERS = 4, [f"f{i}" for i in range(8)]
GREEDY = Sampling(temperature=0, max_new_tokens=3)


def prompts(count: int, seed: int) -> list[tuple[str, bool]]:
    """Prompts, every other one to be refused."""
    rng, out = random.Random(seed), []
    for number in range(count):
        i = rng.randrange(PAIRS)
        j = i if number % 2 else rng.choice([other for other in range(PAIRS) if other != i])
        words = [f"a{i}", f"b{j}", *rng.sample(FILLERS, 2)]
        rng.shuffle(words)
        out.append((f"ask {' '.join(words)} ?", bool(number % 2)))
    return out


def subject_of(lm: LM, folder: Path) -> Subject:
    rows = prompts(120, 1)
    for name, side in (("unsafe", True), ("safe", False)):
        (folder / f"{name}.txt").write_text("\n".join(prompt for prompt, bad in rows if bad is side) + "\n")
    texts = [folder / "unsafe.txt", folder / "safe.txt"]
    return Subject(lm, lm.fingerprint, texts=texts, sampling=GREEDY, cache=Cache(folder / "cache"))


@pytest.fixture(scope="module")
def lm() -> LM:
    rows = [(prompt, "i cannot" if bad else "fine then") for prompt, bad in prompts(1600, 0)]
    return taught(rows, 3, 0, layers=4, width=32, lr=5e-3)


@pytest.fixture(scope="module")
def found(lm: LM, tmp_path_factory: Any) -> Measurement:
    config = SurrogateClassifierConfig(
        repeats=1, attack=True, own_model=True, attack_prompts=24, suffix_tokens=4, steps=5, width=24, top_k=24, tail=" ?",
    )  # fmt: skip
    return SurrogateClassifier(config).measure(subject_of(lm, tmp_path_factory.mktemp("surrogate")))


def test_agreement_rises_from_chance_to_nearly_all(found: Measurement) -> None:
    """Depth 0 sees one and the same token: it cannot beat "always refused" (2/3 here)."""
    depth = found.row("headline depth").value
    first, best = found.row("F1, depth 0"), max(found.row(f"F1, depth {k}").value or 0.0 for k in range(1, 5))
    assert found.row("refused, unsafe").value == 1.0 and found.row("refused, safe").value == 0.0
    assert first.value == pytest.approx(2 / 3) and best > 0.95
    assert depth is not None and 1 <= depth < 4


def test_moving_along_the_head_flips_refusals_and_a_random_direction_does_not(lm: LM, found: Measurement) -> None:
    """States are moved as far as the means of the two classes lie apart: along the head, or along 100 random ways (on
    average: a single one of 32 dimensions may lie near the head's, and the worst flips nearly all). Seen: 1.00 and 0.05.

    The smaller step that only turns the head's own sign (2 g / |w|) flips nothing here: the head reads one of several
    features that the model goes by.
    """
    depth = int(found.row("headline depth").value or 0)
    rows = prompts(120, 2)
    encoded, cache = lm.encode([prompt for prompt, _ in rows]), Cache(None)
    refused = np.array([bad for _, bad in rows])
    z = read_states(lm, encoded, cache=cache).pooled("last", depth).astype(np.float64)
    weight = -fit_head(z[60:], refused[60:]).weight
    far = np.linalg.norm(z[60:][refused[60:]].mean(0) - z[60:][~refused[60:]].mean(0))
    ways = [weight, *np.random.default_rng(0).normal(size=(100, len(weight)))]
    shares = []
    for way in ways:
        push = torch.tensor(way / np.linalg.norm(way) * far, dtype=torch.float32)
        answers = answered(lm, [encoded[i] for i in range(60) if refused[i]], depth, push)
        shares.append(np.mean([not flag for flag in by_phrases(answers)]))
    assert shares[0] > 0.8 and np.mean(shares[1:]) < 0.1


def answered(lm: LM, rows: list[list[int]], depth: int, push: torch.Tensor) -> list[str]:
    """Greedy answers of two tokens to rows of one length, their last position moved after `depth` blocks."""
    tokens, at = torch.tensor(rows), len(rows[0]) - 1

    def move(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, :at], hidden[:, at : at + 1] + push, hidden[:, at + 1 :]], 1)

    handle = edit_output(find_blocks(lm.model)[depth - 1], move)
    with torch.no_grad():
        for _ in range(2):
            tokens = torch.cat([tokens, lm.model(tokens).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    return [lm.decode(row[at + 1 :]) for row in tokens.tolist()]


def test_a_search_on_the_surrogate_moves_the_whole_model_more_than_chance_and_for_less_work(found: Measurement) -> None:
    attack = found.details["attack"]
    share = {kind: np.mean(flags) for kind, flags in attack["refused no more"].items()}
    assert share["surrogate"] > share["random"] and attack["p_values"]["random"] < 0.01  # McNemar, Holm over three
    cost = attack["cost"]
    assert cost["whole model"]["tokens"] <= cost["surrogate"]["tokens"]  # one budget of tokens
    assert cost["surrogate"]["tokens_times_blocks"] <= 0.8 * cost["whole model"]["tokens_times_blocks"]
