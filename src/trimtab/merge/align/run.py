"""Aligning checkpoint folders: B's units in A's order, as a model folder that computes what B does; and what it changed.

    DIR/model*.safetensors, config.json, tokenizer     the permuted B; config.json last: without it nothing loads the folder
    DIR/permutations.safetensors                       int64 [size] a group; unit perm[i] of B stands at place i
    DIR/align.json, report.html                        the analysis: distances, singular directions, the loss on the path

Everything is checked before the first byte is written, and the permuted model is run beside B: a spec under which it computes
something else is refused. A killed run is begun again by the same command and ends with the same bytes.

Memory: both checkpoints in their dtype, and B (with texts: A too) as a float32 model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.files import digest, dump_json
from trimtab.lm import LM
from trimtab.merge.align.align import Align, AlignConfig
from trimtab.merge.align.analysis import taylor
from trimtab.merge.align.path import Path as LossPath
from trimtab.merge.align.path import walk
from trimtab.merge.align.permutation import Spec, apply, check_function, is_identity
from trimtab.merge.align.report import Found, measured
from trimtab.merge.align.specs import model_spec
from trimtab.merge.align.texts import Names, TextLoss, encode, forward
from trimtab.merge.card import TOKENIZER_FILES
from trimtab.merge.source import MERGEABLE, Folder, Source
from trimtab.merge.writer import write_shards
from trimtab.prompts import read_prompts
from trimtab.run import RunDirectory

Progress = Callable[[str], None]
# config keys that change what weights of one shape mean
_SAME = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "hidden_act", "activation_function",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
)  # fmt: skip
_TAYLOR_TEXTS = 32


@dataclass(frozen=True)
class Asked:
    """What is aligned. texts: of the loss; am and ste match by three of four. spec: a permutation spec of one's own."""

    a: str
    b: str
    texts: Path | None = None
    spec: Path | None = None
    max_shard_bytes: int = 5_000_000_000


def align_folders(
    asked: Asked,
    out: str | Path,
    config: AlignConfig | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Aligns B to A and writes the folder `out`; returns align.json. UsageError for anything wrong, with nothing written."""
    config = config if config is not None else AlignConfig()
    say = _paced(progress)
    one, two = Folder(asked.a), Folder(asked.b)
    warnings = _check_alike(one, two)
    if config.method != "wm" and asked.texts is None:
        raise UsageError(f"--method {config.method} looks at what the models do: give --texts FILE")
    texts = read_prompts(asked.texts) if asked.texts is not None else []
    spec = _spec(asked, two, config)
    arguments = {
        "a": asked.a,
        "b": asked.b,
        "texts": str(asked.texts or ""),
        "spec": str(asked.spec or ""),
        **asdict(config),
    }
    inputs = {"a": one.fingerprint, "b": two.fingerprint}
    inputs |= {key: digest(path) for key, path in (("texts", asked.texts), ("spec", asked.spec)) if path is not None}
    with RunDirectory.open(out, "align", arguments, inputs) as folder:
        done = folder.load_json("align") if folder.events("finished") else None
        if done is not None:
            return dict(done)
        say("reading both models")
        a, b = ({name: model.read(name) for name in model.entries} for model in (one, two))
        _check_finite(one, a)
        _check_finite(two, b)
        found = _Work(asked, config, spec, say).run(a, b, texts, one)
        found.warnings[:0] = warnings
        result = measured(found, asked, config, inputs)
        say("writing")
        _write(folder, two, found, result, asked.max_shard_bytes, command)
        folder.event("finished")
    return result


class _Work:
    """Matching, checking and measuring, all in memory."""

    def __init__(self, asked: Asked, config: AlignConfig, spec: Spec, say: Progress) -> None:
        self.asked, self.config, self.spec, self.say = asked, config, spec, say

    def run(self, a: dict[str, Tensor], b: dict[str, Tensor], texts: Sequence[Any], one: Source) -> Found:
        config, warnings = self.config, list[str]()
        self.say("loading B")
        model_b, lm_b = _model(self.asked.b, bool(texts))
        names = Names(list(b), model_b, f"the model {self.asked.b!r}")
        inner = names.spec(self.spec)
        seen, held_out = _split(texts, config.method, warnings)
        batches = encode(lm_b, held_out, config.batch) if texts else [_random_batch(one.config, config.seed)]
        losses = TextLoss(model_b, batches)
        self.say("checking the permutation spec")
        in_b = names.tensors(b)
        with torch.no_grad():
            check_function(
                inner,
                in_b,
                lambda tensors: losses.logits(tensors, batches[0]) * batches[0][1][..., None],
                config.seed,
                2e-3,
            )
        modules = None
        if config.method == "am":
            modules = (_model(self.asked.a, False)[0], model_b)
        self.say(f"matching {len(self.spec.groups)} groups")
        in_a = names.tensors(a)
        if config.method == "wm":  # in the file's own names: a head stored beside its embedding counts as in the file
            permutations = Align(config).permutations(self.spec, a, b, progress=self.say)
        else:
            batches = encode(lm_b, seen, config.batch)
            permutations = Align(config).permutations(
                inner,
                in_a,
                in_b,
                modules=modules,
                batches=batches,
                forward=forward,
                keep=lambda batch: batch[1].bool(),
                loss=losses.loss,
                progress=self.say,
            )
        permuted = apply(self.spec, permutations, b)
        found = Found(self.spec, permutations, a, b, permuted, warnings=warnings)
        if texts:
            found.texts = losses.texts
            self._walk(found, losses, in_a, in_b, names.tensors(permuted))
        found.forwarded = losses.forwarded
        return found

    def _walk(
        self, found: Found, losses: TextLoss, a: dict[str, Tensor], b: dict[str, Tensor], permuted: dict[str, Tensor]
    ) -> None:
        """The loss on the paths from A to B and to the permuted B, and what curvature at the ends predicts."""
        points = self.config.points
        for key, end in (("before", b), ("after", permuted)):
            if key == "after" and is_identity(found.permutations):
                found.paths["after"] = found.paths["before"]
                found.middle["after"], found.taylor["after"] = found.middle["before"], found.taylor["before"]
                return
            losses.seen = []
            self.say(f"the path {key} matching")
            found.paths[key] = walk(a, end, losses.evaluate, points, self.say)
            found.middle[key] = _middle(found.paths[key], losses.seen)
            found.taylor[key] = self._taylor(losses, a, end, found)

    def _taylor(
        self, losses: TextLoss, a: dict[str, Tensor], end: dict[str, Tensor], found: Found
    ) -> list[float] | None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        batch = losses.batches[len(losses.batches) // 2]
        batch = (batch[0][:_TAYLOR_TEXTS], batch[1][:_TAYLOR_TEXTS])
        lambdas = [i / (self.config.points - 1) for i in range(self.config.points)]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                return taylor(lambda tensors: losses.loss(tensors, batch), a, end, lambdas)[0]
        except RuntimeError as error:
            note = f"no Taylor prediction: this model has no second derivative here ({str(error).splitlines()[0]})"
            if note not in found.warnings:
                found.warnings.append(note)
            return None


def _split(texts: Sequence[Any], method: str, warnings: list[str]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(texts that am and ste match by, texts that the path is measured on): three of four, and the fourth."""
    if method == "wm" or not texts:
        return texts, texts
    if len(texts) < 8:
        warnings.append(
            "the path is measured on the texts that were matched by: give 8 or more, and every fourth is kept apart"
        )
        return texts, texts
    return [text for number, text in enumerate(texts) if number % 4 != 3], texts[3::4]


def _paced(progress: Progress | None) -> Progress:
    """The same, with messages of a step ("3 of 25") at most once a second."""
    last = [0.0]

    def say(message: str) -> None:
        now = time.monotonic()
        if progress is not None and (" of " not in message or now - last[0] >= 1.0):
            last[0] = now
            progress(message)

    return say


def _middle(path: LossPath, seen: list[list[float]]) -> list[float]:
    """The excess loss at the path's middle, a text each."""
    at = min(range(len(path.lambdas)), key=lambda i: abs(path.lambdas[i] - 0.5))
    share = path.lambdas[at]
    return [
        mid - (1 - share) * first - share * last for first, mid, last in zip(seen[0], seen[at], seen[-1], strict=True)
    ]


def _spec(asked: Asked, model: Folder, config: AlignConfig) -> Spec:
    shapes = {name: entry.shape for name, entry in model.entries.items()}
    if asked.spec is None:
        return model_spec(model.config, shapes, config.residual, config.query_key)
    try:
        data = json.loads(asked.spec.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--spec {asked.spec} cannot be read as JSON ({error})") from error
    spec = Spec.from_dict(data)
    spec.check(shapes)
    return spec


def _check_alike(one: Folder, two: Folder) -> list[str]:
    """UsageError listing everything in which two checkpoints do not fit; returns warnings."""
    problems = []
    for key in _SAME:
        if one.config.get(key) != two.config.get(key):
            problems.append(f"{key} is {one.config.get(key)} in {one.name!r} and {two.config.get(key)} in {two.name!r}")
    for name in sorted({*one.entries, *two.entries}):
        first, second = one.entries.get(name), two.entries.get(name)
        if first is None or second is None:
            problems.append(f"{(one if first is None else two).name!r} lacks the tensor {name!r} that the other has")
        elif first.shape != second.shape:
            problems.append(f"{name!r} has the shape {first.shape} in {one.name!r} and {second.shape} in {two.name!r}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UsageError(f"only models of one architecture and size can be aligned: {'; '.join(problems[:8])}{more}")
    files = [model.folder / "tokenizer.json" for model in (one, two)]
    if all(path.is_file() for path in files) and _vocabulary(files[0]) != _vocabulary(files[1]):
        return [
            "the two tokenizers differ: a row of the embeddings is another token in each, and no permutation mends that"
        ]
    return []


def _vocabulary(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return digest(path)


def _check_finite(model: Folder, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, one in tensors.items() if one.dtype in MERGEABLE and not bool(one.isfinite().all())]
    if bad:
        raise UsageError(f"the model {model.name!r} has weights that are not finite numbers, first in {bad[0]!r}")


def _model(name: str, tokenizer: bool) -> tuple[Any, Any]:
    """(module in float32, LM): the LM only where texts must be encoded."""
    if tokenizer:
        lm = LM.load(name, device="cpu", dtype=torch.float32)
        return lm.model, lm
    from transformers import AutoModelForCausalLM

    folder = Folder(name).folder
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        raise UsageError(f"cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), None


def _random_batch(config: Mapping[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(config.get("vocab_size") or 2), (2, 16), generator=generator)
    return ids, torch.ones_like(ids)


def _write(
    folder: RunDirectory,
    source: Folder,
    found: Found,
    result: Mapping[str, Any],
    max_shard_bytes: int,
    command: Sequence[str],
) -> None:
    from trimtab.report.measured import render

    write_shards(folder.path, found.permuted, source.entries, max_shard_bytes)
    ordered = {name: one.to(torch.int64).contiguous() for name, one in found.permutations.items()}
    folder.save("permutations.safetensors", save(ordered))
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            folder.save(name, (source.folder / name).read_bytes())
    folder.save("spec.json", dump_json(found.spec.to_dict()))
    folder.save_json("align", result)
    folder.save("report.html", render(result, command))
    folder.save("config.json", dump_json(source.config))
