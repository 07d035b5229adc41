"""PLeaS on language models: folders in, a folder that `from_pretrained` loads out.

Only the feed-forward nets are widened (the groups `layers.N.ffn`: gate, up and down). Heads are matched and merged in full;
so is the residual stream, whose order is the same in models that share a base; with `residual` it is matched too, which
models trained apart need. Every linear layer is refitted. A head that is tied to the embeddings is their average.

Which architectures can express this: the families of `specs` (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, olmo,
olmo2, granite, phi, phi3, gpt2, gpt_neox, opt) have one width for all layers (intermediate_size, ffn_dim, n_inner).
So the scheme "uniform" gives each layer the same width and costs nothing more. "qp" and "zip" give each its own: narrower
layers are then padded with units that are zero to the width of the widest, which is exact in function, and whose cost is
`dense_ratio` (parameters stored and computed, relative to one parent). transformers' configs with a width a layer (Gemma 3n's
list; OpenELM, DeciLM in code of their own) have no permutation spec here. Torch modules may have any width: `merge_modules`.

The budget counts the multiply-adds of all linear layers, head included, for one token; with only the feed-forward nets
widened, the largest size is 1 + their share (about 1.6 for Llamas), and a budget above it gives that.

Cost: one forward pass of both parents over the texts, and again for every `memory` bytes of statistics; "qp" makes 2 L + 2
merges of L layers to see what each gains. Memory: both parents and the merged model, in float32, and the statistics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.files import dump_json
from trimtab.merge.align.specs import model_spec
from trimtab.merge.align.texts import Names, TextLoss, encode
from trimtab.merge.plan import Plan, make_plan
from trimtab.merge.pleas.layers import Batch
from trimtab.merge.pleas.modules import Merged
from trimtab.merge.pleas.pair import Pair
from trimtab.merge.pleas.pleas import PleasConfig
from trimtab.merge.recipe import Recipe
from trimtab.merge.source import Entry, Source
from trimtab.merge.writer import write_shards
from trimtab.run import RunDirectory, digest

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # a config's names for the feed-forward nets' width
TEXTS = 8  # forwarded together
APART = 0.2  # embeddings whose cosine is less seem to be of models that share no base
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """a, b: folders, adapters or pocket/NAME; data: files of texts, one a domain; the rest as for any merge (`Recipe`)."""

    a: str
    b: str
    data: tuple[Path, ...]
    dtype: str | None = None
    max_shard_size: str = "5GB"
    tokenizer: str = ""
    chat_template: str = ""
    untie: bool = False

    def recipe(self) -> Recipe:
        """The parents and what is done about their tokenizers and dtypes; its checks are those of every merge."""
        return Recipe(
            "linear", (self.a, self.b), None, [0.5, 0.5], dtype=self.dtype, max_shard_size=self.max_shard_size,
            tokenizer=self.tokenizer, chat_template=self.chat_template, untie=self.untie,
        )  # fmt: skip


def merge_folders(
    asked: Asked, out: str | Path, config: PleasConfig, progress: Progress | None = None, command: str = ""
) -> dict[str, Any]:
    """Merges two language models into the folder `out`; returns what `pleas.json` there holds (JSON values).

    A merge that was killed is made again by the same call, with the same bytes. UsageError for parents that do not fit
    together (all that is wrong at once), an architecture without a permutation spec, inputs that cannot be read, weights that
    are not finite; nothing is left behind.
    """
    say = progress or (lambda message: None)
    if config.heads != "shared":
        raise UsageError("language models share their vocabulary, and so their head: leave heads out")
    plan = make_plan(asked.recipe())
    texts = {str(path): read_texts(path) for path in asked.data}
    inputs = {f"model {i}": model.fingerprint for i, model in enumerate(plan.models)}
    inputs |= {f"data {i}": digest(path) for i, path in enumerate(asked.data)}
    settings = {**asdict(asked), **asdict(config), "data": [str(path) for path in asked.data]}
    with RunDirectory.open(out, "merge pleas", settings, inputs) as folder:
        done = folder.load_json("pleas") if folder.events("finished") else None
        if done is not None:
            return dict(done)
        work = _Work(plan, config, say)
        found = work.run(texts)
        _write(folder, plan, work, found, command)
        folder.event("finished")
    return found


def read_texts(path: Path) -> list[Any]:
    """A text a line, or JSONL with a "text" or a "prompt" (a string or messages) on every line. UsageError otherwise."""
    import json

    from trimtab.prompts import read_prompts

    try:
        lines = path.read_bytes().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()] if path.suffix == ".jsonl" else []
    except (OSError, ValueError):
        rows = []  # read_prompts says what is wrong, and where
    if rows and all(isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip() for row in rows):
        return [row["text"] for row in rows]
    return list(read_prompts(path))


class _Work:
    def __init__(self, plan: Plan, config: PleasConfig, say: Progress) -> None:
        self.plan, self.config, self.say = plan, config, say
        self.tensors: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = dict(plan.config)

    def run(self, texts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Merges; puts the tensors (by the checkpoint's names) and the config in place, and says what was done."""
        plan, config = self.plan, self.config
        shapes = {output.name: output.entry.shape for output in plan.outputs}
        spec = model_spec(plan.config, shapes, config.residual)
        width = next((key for key in WIDTHS if key in plan.config or key == "n_inner"), "")
        self.say("loading both models")
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer = self._tokenizer(Path(temporary))
            a, b = (self._model(source, i, Path(temporary)) for i, source in enumerate(plan.models))
        batches = [batch for name, rows in texts.items() for batch in self._batches(tokenizer, a, rows, name)]
        names = Names([output.name for output in plan.outputs], a, plan.models[0].name)
        groups = {group.name for group in spec.groups if group.name.endswith(".ffn")}
        self.say("matching units and running both models on the texts")
        pair = Pair(a, b, names.spec(spec), batches, config, widen=groups)
        scheme = "uniform" if config.scheme == "auto" else config.scheme
        separate = pair.budget.separate(pair.ratios(config.budget, scheme), config.budget)
        if scheme == "uniform":
            separate = dict.fromkeys(separate, min(separate.values()))
        widest = max(pair.budget.sizes[name] + count for name, count in separate.items())
        self.say("solving each layer")
        merged = pair.build(separate, width=widest)
        state = merged.model.state_dict()
        for output in plan.outputs:
            if output.name in names.of:
                self.tensors[output.name] = (
                    state[names.of[output.name]].detach().cpu().to(output.entry.dtype).contiguous()
                )
            else:
                self.tensors[output.name] = plan.models[0].read(output.names[0])
        bad = [name for name, one in self.tensors.items() if one.is_floating_point() and not bool(one.isfinite().all())]
        if bad:
            raise UsageError(f"the merged {bad[0]!r} is not finite in its dtype: --dtype float32, or a larger ridge")
        self.settings[width] = widest
        self.say("measuring the loss of all three")
        return self._report(pair, merged, widest, scheme, {"a": a, "b": b, "merged": merged.model}, batches)

    def _tokenizer(self, folder: Path) -> Any:
        from transformers import AutoTokenizer

        for name, found in self.plan.tokenizer.items():
            (folder / name).write_bytes(found if isinstance(found, bytes) else found.read_bytes())
        (folder / "config.json").write_text(dump_json(self.plan.config))
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise UsageError(
                f"{self.plan.models[0].name!r} has no tokenizer that loads, and PLeaS reads texts: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    def _model(self, source: Source, number: int, folder: Path) -> nn.Module:
        """A parent in float32, from the tensors that the plan names."""
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        names = Names([output.name for output in self.plan.outputs], model, source.name)
        tensors = {}
        for output in self.plan.outputs:
            if output.name in names.of:
                tensor = source.read(output.names[number]).to(torch.float32)
                if not bool(tensor.isfinite().all()):
                    raise UsageError(
                        f"the model {source.name!r} has weights that are not finite numbers, first in {output.name!r}"
                    )
                tensors[names.of[output.name]] = tensor
        model.load_state_dict(tensors, strict=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.eval().requires_grad_(False).to(device)

    def _batches(self, tokenizer: Any, model: Any, texts: Sequence[Any], domain: str) -> list[Batch]:
        lm = _Reader(tokenizer, model)
        device = next(model.parameters()).device
        return [
            Batch(
                (),
                {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False},
                mask.bool(),
                domain,
            )
            for ids, mask in encode(lm, texts, TEXTS)
        ]

    def _report(
        self,
        pair: Pair,
        merged: Merged,
        width: int,
        scheme: str,
        models: Mapping[str, nn.Module],
        batches: Sequence[Batch],
    ) -> dict[str, Any]:
        losses: dict[str, dict[str, float]] = {}
        for domain in merged.shares:
            here = [batch for batch in batches if batch.domain == domain]
            losses[domain] = {name: _loss(model, here) for name, model in models.items()}
        warnings = [*self.plan.warnings, *merged.warnings]
        alike = _alike(models["a"], models["b"])
        if alike < APART and not self.config.residual:
            warnings.append(
                f"the parents' embeddings have little in common (cosine {alike:.2f}), as of models trained apart: --residual "
                "matches their residual streams too"
            )
        if self.config.budget > pair.budget.most + 1e-9:
            warnings.append(
                f"the budget is {self.config.budget:g}, and with all feed-forward nets side by side the model has "
                f"{pair.budget.most:.3f} times one parent's multiply-adds: it has those"
            )
        padded = sum(width - merged.widths[name] for name in merged.widths)
        if padded:
            warnings.append(
                f"{padded} zero units pad the layers to one width of {width}, which is all that the config can say: "
                f"{merged.dense_ratio:.3f} times one parent is stored for a budget of {self.config.budget:g}"
            )
        return {
            "schema": 1,
            "models": [model.name for model in self.plan.models],
            "budget": self.config.budget,
            "scheme": scheme,
            "ratio": merged.ratio,
            "dense_ratio": merged.dense_ratio,
            "width": width,
            "separate": merged.separate,
            "shares": merged.shares,
            "losses": losses,
            "layers": {name: asdict(one) for name, one in merged.layers.items()},
            "warnings": warnings,
        }


class _Reader:
    """What `encode` asks of a language model."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        config = model.config.get_text_config(decoder=True)
        limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
        self.context_length = next((int(limit) for limit in limits if limit), None)

    def render(self, prompt: Any, number: int) -> str:
        """Messages as the model's chat template has them, or one after the other."""
        if getattr(self.tokenizer, "chat_template", None):
            return str(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        return "\n".join(message["content"] for message in prompt)


def _alike(a: Any, b: Any) -> float:
    """The cosine of two models' embeddings, as they are."""
    one, two = (model.get_input_embeddings().weight.flatten() for model in (a, b))
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean over texts of the negative log-likelihood in nats a token."""
    pairs = [(batch.kwargs["input_ids"], batch.kwargs["attention_mask"]) for batch in batches]
    losses = TextLoss(model, pairs)
    with torch.no_grad():
        return float(torch.cat([losses.each({}, pair)[0] for pair in pairs]).mean())


def _write(folder: RunDirectory, plan: Plan, work: _Work, found: dict[str, Any], command: str) -> None:
    """The weights, then everything around them; config.json last, since it is what makes the folder a model."""
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in work.tensors.items()}
    write_shards(folder.path, work.tensors, entries, plan.recipe.shard_bytes)
    for name, source in plan.tokenizer.items():
        folder.save(name, source if isinstance(source, bytes) else source.read_bytes())
    folder.save("README.md", _readme(plan, found, command))
    folder.save_json("pleas", found)
    folder.save("config.json", dump_json(work.settings))


def _readme(plan: Plan, found: Mapping[str, Any], command: str) -> str:
    from trimtab import __version__

    parents = "\n".join(f"| `{model.name}` | `{model.fingerprint}` |" for model in plan.models)
    names = " and ".join(f"`{model.name}`" for model in plan.models)
    losses = "\n".join(
        f"| {domain} | {row['a']:.4f} | {row['b']:.4f} | {row['merged']:.4f} |"
        for domain, row in found["losses"].items()
    )
    made = f"\nThe command:\n\n```bash\n{command}\n```\n" if command else ""
    warned = "".join(f"- {text}\n" for text in found["warnings"])
    return f"""---
base_model: [{", ".join(Path(model.name).name for model in plan.models)}]
base_model_relation: merge
library_name: transformers
tags: [merge, trimtab, pleas]
---

# A merged model

PLeaS (arXiv 2407.02447) of {names}, by trimtab {__version__}, without training: units matched, feed-forward nets
{found["width"]} wide, every layer refitted by least squares. Multiply-adds: {found["ratio"]:.3f} times one parent's.
{made}
| parent | fingerprint |
|---|---|
{parents}

Loss on the texts it was fitted on (nats a token):

| texts | first parent | second parent | merged |
|---|---|---|---|
{losses}

`pleas.json` has each layer's error. {"Warnings:" if warned else ""}

{warned}
The licences of both parents apply.
"""
