"""PLeaS against plain averaging and Git Re-Basin: digits in two halves, and tiny language models.

    python benchmarks/pleas.py digits [--seeds 5] [--out benchmarks/results/pleas.json]
    python benchmarks/pleas.py language --work DIR [--steps 600] [--out benchmarks/results/pleas.json]

digits: MLPs 64-256-256 on scikit-learn's 8 x 8 digits, from different seeds. `own heads`: A knows 0-4, B knows 5-9, each task
is read by its parent's own head, accuracy is the mean over both tasks. `one head`: the same halves, ten outputs, the mean of
both heads. `same labels`: both know all digits, from disjoint halves of the data. Inputs for matching and least squares: the
training images without labels; or, "data-free", random strokes, or Gaussian noise with each pixel's mean and deviation.
Intervals are over test images (paired, every image's mean over seeds); beside them, in how many seeds of five a difference is
above zero.

language: pocket/base with pocket/chat, which share a base; and two Llamas of 0.14 M parameters trained apart (here, in DIR).
Loss in nats a token on dialogues that were not used to merge, one value a dialogue.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.environment import environment
from trimtab.files import write_json
from trimtab.measure.stats import paired_difference

BUDGETS = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
LOW, HIGH = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


# Digits


class Digits:
    """1,200 images to train on, 597 to test on; [N, 64] in [0, 1]."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        images, labels = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
        self.train, self.train_labels = images[:1200], labels[:1200]
        self.test, self.test_labels = images[1200:], labels[1200:]

    def gaussian(self, seed: int) -> Tensor:
        noise = torch.randn(self.train.shape, generator=torch.Generator().manual_seed(seed))
        return noise * self.train.std(0) + self.train.mean(0)

    def strokes(self, seed: int) -> Tensor:
        """Another domain: two random straight strokes on the 8 x 8 grid, no digits."""
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0:8, 0:8]
        images = np.zeros((1200, 8, 8))
        for image in images:
            for _ in range(2):
                (y0, x0), (y1, x1) = rng.uniform(0, 7, (2, 2))
                along = ((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / max((y1 - y0) ** 2 + (x1 - x0) ** 2, 1e-9)
                along = along.clip(0, 1)
                away = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
                np.maximum(image, (1.5 - away).clip(0, 1), out=image)
        return torch.tensor(images.reshape(1200, 64), dtype=torch.float32)


def trained(digits: Digits, seed: int, labels: tuple[int, ...], outputs: int, part: slice = slice(None)) -> nn.Module:
    """An MLP 64-256-256-outputs after 40 epochs of Adam on the images of these labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))
    x, y = digits.train[part], digits.train_labels[part]
    chosen = torch.isin(y, torch.tensor(labels))
    x, y = x[chosen], y[chosen] - (labels[0] if outputs < 10 else 0)
    adam = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()
    return model.eval().requires_grad_(False)


def arms(setting: str, digits: Digits, seed: int) -> dict[str, Any]:
    """Correct or not for every test image, an arm each; and the sizes that were reached."""
    from trimtab.merge.align.module_specs import module_spec
    from trimtab.merge.pleas.pair import Pair
    from trimtab.merge.pleas.pleas import PleasConfig

    if setting == "same labels":
        a = trained(digits, 2 * seed, (*LOW, *HIGH), 10, slice(0, 600))
        b = trained(digits, 2 * seed + 1, (*LOW, *HIGH), 10, slice(600, 1200))
    else:
        outputs = 5 if setting == "own heads" else 10
        a, b = trained(digits, 2 * seed, LOW, outputs), trained(digits, 2 * seed + 1, HIGH, outputs)
    low = torch.isin(digits.test_labels, torch.tensor(LOW))

    def right(one: Any) -> list[float]:
        """one: a merged model, or a pair of models of which each answers for its own task."""
        if setting == "own heads":
            first, second = one if isinstance(one, tuple) else (one.task("a"), one.task("b"))
            said = torch.where(low, first(digits.test).argmax(1), second(digits.test).argmax(1) + 5)
        elif isinstance(one, tuple):
            said = torch.where(low, one[0](digits.test).argmax(1), one[1](digits.test).argmax(1))
        else:
            said = (one.model if hasattr(one, "model") else one)(digits.test).argmax(1)
        return (said == digits.test_labels).float().tolist()

    def pair(permutations: dict[str, Tensor] | None = None, inputs: Tensor = digits.train, **options: Any) -> Pair:
        heads = "separate" if setting == "own heads" else "shared"
        return Pair(a, b, spec, inputs, PleasConfig(heads=heads, **options), permutations)

    spec = module_spec(a, digits.train[:8])
    by_weights, by_activations, unmatched = pair(), pair(match="am"), pair({})
    found = {
        "parents, each on its task": right((a, b)),
        "average": right(unmatched.build({}, refit=False)),
        "average, least squares": right(unmatched.build({})),
        "Git Re-Basin (weights)": right(by_weights.build({}, refit=False)),
        "Git Re-Basin (activations)": right(by_activations.build({}, refit=False)),
    }
    if setting != "own heads":
        found["ensemble"] = right(lambda x: a(x) + b(x))
    sizes: dict[str, float] = {}
    for name, one in (("wm", by_weights), ("am", by_activations)):
        gains = one.gains()
        for budget in BUDGETS:
            merged = one.merge(budget, "qp", gains)
            found[f"PLeaS {name} {budget}"] = right(merged)
            found[f"PLeaS {name} {budget} block average"] = right(one.build(merged.separate, refit=False))
            sizes[f"PLeaS {name} {budget}"] = merged.ratio
            if name == "am" and 1.0 < budget < 2.0:
                for scheme in ("uniform", "zip"):
                    found[f"PLeaS am {budget} {scheme}"] = right(one.merge(budget, scheme))
    other = pair(match="am", targets="separate")
    for budget in (1.0, 1.4):
        found[f"PLeaS am {budget} separate targets"] = right(other.merge(budget, "uniform"))
    for name, inputs in (("strokes", digits.strokes(seed)), ("Gaussian", digits.gaussian(seed))):
        free = pair(inputs=inputs, match="am")
        for budget in (1.0, 1.4):
            found[f"PLeaS am {budget} on {name}"] = right(free.merge(budget, "uniform"))
    return {"right": found, "sizes": sizes}


PAIRS = (
    ("Git Re-Basin (weights)", "average"),
    ("Git Re-Basin (activations)", "average"),
    ("PLeaS wm 1.0", "average"),
    ("PLeaS am 1.0", "average"),
    ("PLeaS wm 1.0", "Git Re-Basin (weights)"),
    ("PLeaS am 1.0", "Git Re-Basin (activations)"),
    ("PLeaS am 1.0", "average, least squares"),
    ("PLeaS am 1.4", "PLeaS am 1.0"),
    ("PLeaS am 1.4", "PLeaS am 1.4 block average"),
    ("PLeaS am 1.4", "PLeaS am 1.4 uniform"),
    ("PLeaS wm 2.0", "PLeaS wm 1.0"),
    ("PLeaS wm 2.0", "Git Re-Basin (weights)"),
    ("PLeaS am 2.0", "Git Re-Basin (activations)"),
    ("PLeaS am 1.0 on strokes", "Git Re-Basin (activations)"),
    ("PLeaS am 1.0 on Gaussian", "Git Re-Basin (activations)"),
    ("PLeaS am 1.4 on strokes", "PLeaS am 1.4"),
    ("PLeaS am 1.4 on Gaussian", "PLeaS am 1.4"),
    ("PLeaS am 1.4 separate targets", "PLeaS am 1.4 uniform"),
)


def run_digits(seeds: int) -> dict[str, Any]:
    digits, out = Digits(), {}
    for setting in ("own heads", "one head", "same labels"):
        runs = []
        for seed in range(seeds):
            runs.append(arms(setting, digits, seed))
            print(f"{setting}, seed {seed}: done", flush=True)
        right = {name: np.array([run["right"][name] for run in runs]) for name in runs[0]["right"]}  # [seeds, images]
        accuracy = {name: {"mean": float(one.mean()), "seeds": one.mean(1).tolist()} for name, one in right.items()}
        differences = []
        for first, second in PAIRS:
            found = paired_difference(right[first].mean(0), right[second].mean(0))
            each = right[first].mean(1) - right[second].mean(1)
            differences.append(
                {"first": first, "second": second, **found.to_dict(), "seeds_above": int((each > 0).sum())}
            )
        sizes = {name: float(np.mean([run["sizes"][name] for run in runs])) for name in runs[0]["sizes"]}
        out[setting] = {"accuracy": accuracy, "differences": differences, "sizes": sizes}
        print(f"\n{setting}: accuracy, mean over {seeds} seeds (least, most)")
        for name, one in accuracy.items():
            print(f"  {name:38} {one['mean']:.4f} ({min(one['seeds']):.4f}, {max(one['seeds']):.4f})")
        for one in differences:
            shown = f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" if one["low"] is not None else "0"
            print(f"  {one['first']:32} - {one['second']:32} {shown}  above in {one['seeds_above']} of {seeds}")
    return {"seeds": seeds, "settings": out}


# Language models


def dialogues(split_seed: int, count: int, kind: str = "good") -> list[str]:
    """Questions with their answers, as the pocket models are trained on them."""
    from trimtab.pocket import world

    stream = world.dialogues(split_seed, kind)
    return [f"{task.prompt} {answer}" for task, answer in (next(stream) for _ in range(count))]


def train_apart(work: Path, steps: int) -> list[str]:
    """Two Llamas of 0.14 M parameters from different seeds, on different dialogues of the same world."""
    from transformers import LlamaForCausalLM

    from trimtab.pocket import nets, train, training
    from trimtab.pocket.tokenizer import base_tokenizer

    folders = []
    for seed in (1, 2):
        folder = work / f"apart-{seed}"
        folders.append(str(folder))
        if (folder / "config.json").exists():
            continue
        tokenizer = base_tokenizer(0)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(nets.config(vocabulary=512, hidden=64, inner=192, layers=2, heads=4))
        stream = train.encoded(tokenizer, 100 + seed, "mixed")
        step = lambda _: training.next_token_loss(model, *training.windows(stream, 32, 96, False))  # noqa: B023, E731
        training.fit(model, step, steps, 3e-3, f"apart-{seed}")
        nets.save(model, tokenizer, folder, {"kind": "base", "prompt": train.PROMPT, "seed": seed})
    return folders


def losses(folder: str, texts: list[str]) -> list[float]:
    """Nats a token, a value a dialogue."""
    from trimtab import LM
    from trimtab.merge.align.texts import TextLoss, encode

    lm = LM.load(folder)
    batches = encode(lm, texts, 32)
    found = TextLoss(lm.model, batches)
    with torch.no_grad():
        values = torch.cat([found.each({}, batch)[0] for batch in batches])
    # `encode` orders texts by length, the same for every model here.
    return values.tolist()


def run_language(work: Path, steps: int) -> dict[str, Any]:
    from trimtab.merge.align.align import AlignConfig
    from trimtab.merge.align.run import Asked as AskedAlign
    from trimtab.merge.align.run import align_folders
    from trimtab.merge.engine import run
    from trimtab.merge.pleas.models import Asked, merge_folders
    from trimtab.merge.pleas.pleas import PleasConfig
    from trimtab.merge.recipe import Recipe

    work.mkdir(parents=True, exist_ok=True)
    texts = work / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in dialogues(900, 400, "mixed")))
    held = dialogues(901, 300, "mixed")
    out: dict[str, Any] = {}
    apart = train_apart(work, steps)
    for name, (a, b), residual in (("one base", ("pocket/base", "pocket/chat"), False), ("trained apart", apart, True)):
        slug = name.replace(" ", "-")
        folders = {"A": a, "B": b}

        def merged(arm: str, make: Callable[[Path], Any]) -> None:
            folder = work / f"{slug}-{arm.replace(' ', '-').replace(',', '')}"  # noqa: B023
            make(folder)
            folders[arm] = str(folder)  # noqa: B023

        recipe = {"weights": [0.5, 0.5], "chat_template": "none"}
        merged("average", lambda at: run(Recipe("linear", (a, b), **recipe), at))  # noqa: B023
        aligned = work / f"{slug}-aligned"
        align_folders(AskedAlign(a, b, None, None, 10**9), str(aligned), AlignConfig(residual=residual))
        merged("Git Re-Basin", lambda at: run(Recipe("linear", (a, str(aligned)), **recipe), at))  # noqa: B023
        asked = Asked(a, b, (texts,), chat_template="none")
        ratios = {}
        for match in ("wm", "am"):
            for budget in (1.0, 1.2, 2.0):
                config = PleasConfig(budget=budget, match=match, residual=residual)
                arm = f"PLeaS {match} {budget}"
                merged(arm, lambda at: ratios.update({arm: merge_folders(asked, at, config)["ratio"]}))  # noqa: B023
        values = {arm: losses(folder, held) for arm, folder in folders.items()}
        differences = []
        for arm in values:
            if arm.startswith("PLeaS"):
                for other in ("average", "Git Re-Basin"):
                    differences.append(
                        {"first": arm, "second": other, **paired_difference(values[arm], values[other]).to_dict()}
                    )
        out[name] = {
            "loss": {arm: float(np.mean(one)) for arm, one in values.items()}, "ratios": ratios, "differences": differences,
        }  # fmt: skip
        print(f"\n{name}: loss in nats a token on {len(held)} held-out dialogues")
        for arm, loss in out[name]["loss"].items():
            print(f"  {arm:16} {loss:.4f}" + (f"  ({ratios[arm]:.3f} times one parent)" if arm in ratios else ""))
        for one in differences:
            print(f"  {one['first']} - {one['second']}: {one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]")
    return {"steps": steps, "pairs": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["digits", "language"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.part == "language" and args.work is None:
        parser.error("language needs --work DIR")
    found = run_digits(args.seeds) if args.part == "digits" else run_language(args.work, args.steps)
    if args.out is not None:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        write_json(args.out, {**kept, args.part: found, "environment": environment()})


if __name__ == "__main__":
    main()
