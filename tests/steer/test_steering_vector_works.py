"""Works: on a model trained here on text in two styles, a vector turns the style, a random one does not, and the
trade-off has the shape of the laws.

The text: every noun is followed by a particle. In style A the particles are 'ba' 'da' ..., in style B 'be' 'de' ...;
plain text has none. Nouns follow one another in a fixed cycle with noise, so that there is something to be right about.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tiny import EOS, PAD, WORDS, tiny_model, tiny_tokenizer
from trimtab import LM
from trimtab.measure.stats import paired_difference
from trimtab.steer import SteeringVector
from trimtab.steer.contrast import unit
from trimtab.steer.tradeoff import Choice, Measure, balance, multiple_choice, trade_off

NOUNS = [word for word in WORDS if word[1] in "iou"]  # 33
PARTICLES = {"A": [word for word in WORDS if word[1] == "a"], "B": [word for word in WORDS if word[1] == "e"]}
GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
WIDTH, LENGTH, STEPS, BATCH = 256, 6, 100, 30


def sentence(style: str, generator: np.random.Generator) -> str:
    """6 nouns, each with a particle (none in style ""). After noun n comes n + 1 with probability 0.7, else any."""
    at, out = int(generator.integers(len(NOUNS))), []
    for _ in range(LENGTH):
        out.append(NOUNS[at])
        if style:
            usual = generator.random() < 0.8
            out.append(PARTICLES[style][at * 5 % 11] if usual else str(generator.choice(PARTICLES[style])))
        at = (at + 1) % len(NOUNS) if generator.random() < 0.7 else int(generator.integers(len(NOUNS)))
    return " ".join(out)


@pytest.fixture(scope="module")
def lm():
    """Three blocks, trained for a few seconds on a third of each style."""
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model("llama", tied=False, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=3)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.ones_like(parameter) if parameter.dim() == 1 else 0.15 * parameter)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        texts = [sentence(style, generator) for style in ("A", "B", "") for _ in range(BATCH // 3)]
        rows = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
        ids = torch.tensor([row + [PAD] * (2 * LENGTH + 2 - len(row)) for row in rows])
        loss = model(ids, labels=ids.masked_fill(ids == PAD, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    return LM(model, tokenizer, "two-styles")


@pytest.fixture(scope="module")
def pairs():
    """The same nouns with the particles of A and of B."""
    return [tuple(sentence(name, np.random.default_rng(1000 + seed)) for name in ("A", "B")) for seed in range(100)]


@pytest.fixture(scope="module")
def vector(lm, pairs):
    return SteeringVector.from_pairs(lm, pairs, read="mean", unit="relative", strength=0.1)


@pytest.fixture(scope="module")
def curve(lm, vector):
    """One block, relative strengths of both signs, on even nouns."""
    grid = sorted({sign * c for c in GRID for sign in (-1, 1)})
    texts = [sentence("", np.random.default_rng(2000 + seed)) for seed in range(40)]
    return trade_off(lm, vector, grid, style(lm, NOUNS[::2]), multiple_choice(items(0)), texts)


def style(lm: LM, prompts: list[str]) -> Measure:
    """After a noun: (P(A particle) - P(B particle)) / (P(A) + P(B))."""
    a, b = (lm.tokenizer.convert_tokens_to_ids(PARTICLES[name]) for name in ("A", "B"))
    return balance(prompts, a, b)


def items(seed: int) -> list[Choice]:
    """120 questions: after three nouns in order, which of four comes next?"""
    generator, out = np.random.default_rng(seed), []
    for start in generator.integers(len(NOUNS), size=120).tolist():
        *before, right = (NOUNS[(start + k) % len(NOUNS)] for k in range(4))
        wrong = generator.choice([noun for noun in NOUNS if noun != right], 3, replace=False)
        out.append(Choice(" ".join(before), (right, *map(str, wrong)), 0))
    return out


def test_the_middle_block_tells_the_styles_apart(vector):
    assert vector.layers == (1,) and vector.pair_accuracy[1] > 0.95


def test_the_style_follows_the_strength(curve):
    means, small = curve.behaviour.mean(1), np.abs(curve.strengths) <= 0.2
    assert spearmanr(curve.strengths[small], means[small]).statistic > 0.9
    assert means[-1] - means[0] > 1  # of at most 2
    fit = curve.fit_behaviour()
    assert fit.r2 > 0.95 and fit.delta.low > 0


def test_random_directions_of_the_same_norm_do_a_fifth_at_most(lm, vector):
    behaviour = style(lm, NOUNS)

    def effect(control: SteeringVector) -> float:
        return abs(float(np.mean(behaviour(lm, control)) - np.mean(behaviour(lm, -control))))

    norm, generator = vector.vectors()[1].norm(), torch.Generator().manual_seed(0)
    random = [unit(torch.randn(WIDTH, generator=generator)) * norm for _ in range(10)]
    effects = [effect(SteeringVector.from_vectors({1: one}, 3)) for one in random]
    assert max(effects) < effect(vector) / 5, (max(effects), effect(vector))


def test_neutral_text_and_skill_suffer_with_the_square(curve):
    nll = curve.fit_nll()
    assert nll.k2.low > 0 and nll.r2 > 0.95
    assert abs(curve.fit_nll(symmetric=False).k1.mean) < nll.k2.mean * 0.4  # the linear part is small over the range
    assert curve.fit_capability().k2.high < 0


def test_the_recommended_strength_holds_on_other_prompts(lm, vector, curve):
    found = curve.recommend(tolerance=0.02)
    assert found.strength > 0 and not any("cannot resolve" in note for note in found.notes)
    chosen = vector.but(strength=found.strength)
    behaviour, skill = style(lm, NOUNS[1::2]), multiple_choice(items(1))
    assert paired_difference(behaviour(lm, chosen), behaviour(lm, None)).low > 0
    assert paired_difference(skill(lm, None), skill(lm, chosen)).high <= 0.02
