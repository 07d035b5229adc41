"""Two networks trained apart: the loss barrier between them before and after their units are matched, and why.

    python benchmarks/weight_matching.py [--pairs 5] [--out benchmarks/results/weight_matching.json]

Digits: scikit-learn's 8 x 8 digits, 64-w-w-10 perceptrons, w 32, 256 and 1,024, Adam, a third of the digits held out. Pair i
is seeds 2 i and 2 i + 1, with their own initial weights and order of batches; a third network makes a triple. Norm: the same
with batch norms, whose statistics are estimated again at every point of the path, or are not. Language: two-layer Llamas on a
grammar of 24 words, from two seeds, with and without the residual stream. Barriers are nats on held-out data, over 25 points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from taught import taught_text
from trimtab.files import write_json
from trimtab.measure.stats import mean_interval
from trimtab.merge.align.activations import activation_match
from trimtab.merge.align.analysis import Directions, alignment, l2_reduction, matrices, taylor
from trimtab.merge.align.matching import match
from trimtab.merge.align.module_specs import module_spec
from trimtab.merge.align.path import interpolate, reestimate, repair, walk
from trimtab.merge.align.permutation import Spec, apply
from trimtab.merge.align.specs import model_spec
from trimtab.merge.align.straight_through import straight_through
from trimtab.merge.align.texts import TextLoss, encode, forward

Tensors = dict[str, Tensor]
SPEC_ROWS = 8


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inputs, targets) to train on, then those held out."""
    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return inputs[train], targets[train], inputs[test], targets[test]


def network(width: int, norm: bool) -> nn.Module:
    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]

    return nn.Sequential(*hidden(64), *hidden(width), nn.Linear(width, 10))


def train(width: int, seed: int, norm: bool, inputs: Tensor, targets: Tensor, epochs: int = 40) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(width, norm)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs)).split(100):
                loss = F.cross_entropy(model(inputs[batch]), targets[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval()


class Judge:
    """Loss and error of weights on data; batch norms get new statistics from the training inputs first."""

    def __init__(self, model: nn.Module, statistics: Tensor | None, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.statistics, self.inputs, self.targets = model, statistics, inputs, targets

    def __call__(self, tensors: Tensors) -> dict[str, float]:
        self.model.load_state_dict(tensors)
        if self.statistics is not None:
            reestimate(self.model, [self.statistics])
        with torch.no_grad():
            logits = self.model.eval()(self.inputs)
        error = (logits.argmax(1) != self.targets).double().mean()
        return {"loss": float(F.cross_entropy(logits, self.targets)), "error": float(error)}


def described(a: Tensors, b: Tensors, moved: Tensors, spec: Spec, order: Tensors) -> dict[str, float]:
    names = matrices(a)
    ours, theirs = ({name: Directions.of(side[name]) for name in names} for side in (a, b))
    after = {name: theirs[name].permuted(name, spec, order) for name in names}
    found = {"l2_reduction": l2_reduction(a, b, moved)["total"].value or 0.0}
    for gamma in (0.0, 0.3):
        found[f"R_{gamma:g}"] = alignment(ours, after, gamma)["total"]
        found[f"R_{gamma:g}_before"] = alignment(ours, theirs, gamma)["total"]
    return found


def barriers(a: Tensors, b: Tensors, judge: Callable[[Tensors], dict[str, float]]) -> dict[str, float]:
    path = walk(a, b, judge)
    return {
        "barrier": path.barrier(),
        "error_barrier": path.barrier("error"),
        "middle_loss": path.middle(),
        "middle_error": path.middle("error"),
        "end_loss": (path.values["loss"][0] + path.values["loss"][-1]) / 2,
        "end_error": (path.values["error"][0] + path.values["error"][-1]) / 2,
    }


def digit_pair(width: int, pair: int, data: tuple[Tensor, ...], ste: bool) -> list[dict[str, Any]]:
    inputs, targets, test_inputs, test_targets = data
    one, two = (train(width, 2 * pair + side, False, inputs, targets) for side in (0, 1))
    a, b = ({name: value.detach() for name, value in model.named_parameters()} for model in (one, two))
    spec = module_spec(one, inputs[:SPEC_ROWS])
    judge = Judge(network(width, False), None, test_inputs, test_targets)
    on_train = Judge(network(width, False), None, inputs, targets)
    start = time.process_time()
    orders = {"none": spec.identity(), "wm": match(spec, a, b).permutations}
    seconds = {"none": 0.0, "wm": time.process_time() - start}
    start = time.process_time()
    orders["am"] = activation_match(spec, one, two, [inputs]).permutations
    seconds["am"] = time.process_time() - start

    def loss(tensors: Tensors, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(one, tensors, (batch[0],)), batch[1])

    if ste:
        start = time.process_time()
        batches = list(zip(inputs.split(300), targets.split(300), strict=True))
        orders["ste"] = straight_through(spec, a, b, loss, batches, steps=150).permutations
        seconds["ste"] = time.process_time() - start
    rows = []
    for how, order in orders.items():
        moved = apply(spec, order, b)
        row = {"study": "digits", "width": width, "pair": pair, "how": how, "seconds": seconds[how]}
        row |= barriers(a, moved, judge) | described(a, b, moved, spec, order)
        row["train_barrier"] = walk(a, moved, on_train).barrier()
        row["taylor"] = max(taylor(lambda tensors: loss(tensors, (inputs, targets)), a, moved, [0.25, 0.5, 0.75])[0])
        row["true_excess_train"] = max(walk(a, moved, on_train, 5).excess())
        middle, other = network(width, False), network(width, False)
        middle.load_state_dict(interpolate(a, moved, 0.5))
        other.load_state_dict(moved)
        repair(middle, [one, other], 0.5, ["0", "2"], inputs)
        row["repaired_middle_loss"] = judge(dict(middle.state_dict()))["loss"]
        rows.append(row)
    return rows


def digit_triple(width: int, pair: int, data: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """B and C matched to A, each by itself: how far apart did that leave the two?"""
    inputs, targets, test_inputs, test_targets = data
    nets = [train(width, seed, False, inputs, targets) for seed in (2 * pair, 2 * pair + 1, 1000 + pair)]
    a, b, c = ({name: value.detach() for name, value in model.named_parameters()} for model in nets)
    spec = module_spec(nets[0], inputs[:SPEC_ROWS])
    judge = Judge(network(width, False), None, test_inputs, test_targets)
    batches = list(zip(inputs.split(300), targets.split(300), strict=True))

    def loss(tensors: Tensors, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(nets[0], tensors, (batch[0],)), batch[1])

    ways: dict[str, Callable[[Tensors], Tensors]] = {
        "none": lambda other: spec.identity(),
        "wm": lambda other: match(spec, a, other).permutations,
        "ste": lambda other: straight_through(spec, a, other, loss, batches, steps=150).permutations,
    }
    rows = []
    for how, way in ways.items():
        moved_b, moved_c = (apply(spec, way(other), other) for other in (b, c))
        row = {"study": "triple", "width": width, "pair": pair, "how": how}
        row |= {"b_to_c": barriers(moved_b, moved_c, judge)["barrier"]}
        row |= {"a_to_b": barriers(a, moved_b, judge)["barrier"], "a_to_c": barriers(a, moved_c, judge)["barrier"]}
        third = {name: (a[name] + moved_b[name] + moved_c[name]) / 3 for name in a}
        row["mean_of_three_loss"] = judge(third)["loss"]
        rows.append(row)
    return rows


def norm_pair(width: int, pair: int, data: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    inputs, targets, test_inputs, test_targets = data
    one, two = (train(width, 2 * pair + side, True, inputs, targets) for side in (0, 1))
    a, b = dict(one.state_dict()), dict(two.state_dict())
    spec = module_spec(one, inputs[:SPEC_ROWS])
    orders = {"none": spec.identity(), "wm": match(spec, a, b).permutations}
    rows = []
    for (how, order), again in itertools.product(orders.items(), (True, False)):
        judge = Judge(network(width, True), inputs if again else None, test_inputs, test_targets)
        row = {"study": "norm", "width": width, "pair": pair, "how": how, "statistics": "again" if again else "mean"}
        rows.append(row | barriers(a, apply(spec, order, b), judge))
    return rows


def sentences(count: int) -> list[str]:
    draw = random.Random(0)
    nouns, verbs = "cat dog bird fish cow".split(), "sees likes hears finds".split()
    colours, ends = "red blue green old young".split(), "runs sleeps sings".split()
    return [
        f"the {draw.choice(colours)} {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(colours)} "
        f"{draw.choice(nouns)} and it {draw.choice(ends)}"
        for _ in range(count)
    ]


def language_pair(width: int, pair: int, texts: list[str]) -> list[dict[str, Any]]:
    one, two = (taught_text(texts[200:], steps=300, seed=2 * pair + side, width=width) for side in (0, 1))
    a, b = ({name: value.detach() for name, value in lm.model.named_parameters()} for lm in (one, two))
    shapes = {name: tuple(value.shape) for name, value in a.items()}
    held_out, seen = encode(one, texts[:100], 50), encode(one, texts[200:600], 50)
    judge, on_train = TextLoss(one.model, held_out), TextLoss(one.model, seen)
    rows = []
    config = one.model.config.to_dict()
    for residual in (False, True):
        spec = model_spec(config, shapes, residual)
        orders = {"none": spec.identity()} if residual else {}
        orders["wm"] = match(spec, a, b).permutations
        orders["am"] = activation_match(spec, one.model, two.model, seen, forward=forward).permutations
        if residual:
            orders["am, correlation"] = activation_match(
                spec, one.model, two.model, seen, forward=forward, correlation=True
            ).permutations
            orders["am, then wm"] = match(spec, a, b, start=orders["am"]).permutations
            orders["ste"] = straight_through(spec, a, b, on_train.loss, seen, steps=50).permutations
        for how, order in orders.items():
            moved = apply(spec, order, b)
            row = {"study": "language", "width": width, "pair": pair, "how": how, "residual": residual}
            rows.append(row | barriers(a, moved, judge.evaluate) | described(a, b, moved, spec, order))
    return rows


def save_pair(folder: Path, texts: list[str]) -> None:
    """The first two language models and their texts, for `trimtab merge align`."""
    for side, name in enumerate("ab"):
        lm = taught_text(texts[200:], steps=300, seed=side, width=64)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    (folder / "seen.txt").write_text("\n".join(texts[200:600]) + "\n")
    (folder / "texts.txt").write_text("\n".join(texts[:100]) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: means over pairs; the share by which matching lowers the barrier with its 95 % interval."""
    keys = ("study", "width", "residual", "statistics", "how")
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in keys), {})[row["pair"]] = row
    lines = [
        "| study | units matched | pairs | barrier | lowered by | error, ends | error, middle | L2 | R_0 | R_0.3 |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    triples = [
        "| three models | pairs | A to B | A to C | B to C | loss of the mean of three |",
        "|---|---|---|---|---|---|",
    ]
    for group, pairs in sorted(groups.items(), key=str):
        study, width, residual, statistics, how = group

        def mean(key: str, digits: int = 3, rows: Any = pairs) -> str:
            values = [row[key] for row in rows.values() if key in row]
            return f"{sum(values) / len(values):.{digits}f}" if values else ""

        if study == "triple":
            cells = " | ".join(mean(key) for key in ("a_to_b", "a_to_c", "b_to_c", "mean_of_three_loss"))
            triples.append(f"| {how} | {len(pairs)} | {cells} |")
            continue
        base = groups.get((study, width, True if study == "language" else residual, statistics, "none"), {})
        share = mean_interval([1 - row["barrier"] / base[pair]["barrier"] for pair, row in pairs.items()])
        lowered = "" if how == "none" or share.low is None else f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
        name = {"norm": f"batch norm {width}, statistics {statistics}"}.get(study, f"{study} {width}")
        what = how + (" without the stream" if residual is False else "")
        cells = [mean("barrier"), lowered, mean("end_error"), mean("middle_error")]
        cells += [mean(key, 2) for key in ("l2_reduction", "R_0", "R_0.3")]
        lines.append(f"| {name} | {what} | {len(pairs)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *triples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--studies", nargs="+", default=["digits", "norm", "triple", "language"])
    parser.add_argument("--save", type=Path, help="only write the first two language models and their texts here")
    parser.add_argument("--out", default="benchmarks/results/weight_matching.json")
    parser.add_argument("--table", type=Path, nargs="+", help="only print stored results as a table")
    args = parser.parse_args()
    if args.table:
        print(table([row for path in args.table for row in json.loads(path.read_bytes())["rows"]]))
        return
    torch.set_num_threads(1)
    data, texts = digits(), sentences(1000)
    if args.save is not None:
        save_pair(args.save, texts)
        return
    jobs: list[Callable[[], list[dict[str, Any]]]] = []
    for pair in range(args.pairs):
        if "digits" in args.studies:
            jobs += [lambda w=w, p=pair: digit_pair(w, p, data, ste=w <= 256) for w in args.widths]
        if "norm" in args.studies:
            jobs.append(lambda p=pair: norm_pair(256, p, data))
        if "triple" in args.studies:
            jobs.append(lambda p=pair: digit_triple(256, p, data))
        if "language" in args.studies:
            jobs.append(lambda p=pair: language_pair(64, p, texts))
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for number, job in enumerate(jobs, 1):
        rows += job()
        write_json(
            args.out,
            {"schema": 1, "studies": args.studies, "pairs": args.pairs, "torch": torch.__version__, "rows": rows},
        )
        print(f"[{time.monotonic() - start:6.0f} s] {number} of {len(jobs)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
