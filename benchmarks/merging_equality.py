"""Our merges beside mergekit's: every method both have, on the same random folders, from the same YAML, in float32.

    python -m venv ../mergekit && ../mergekit/bin/pip install mergekit       # in an environment of its own
    python benchmarks/merging_equality.py --python ../mergekit/bin/python [--seeds 2] [--work FOLDER]

Three fine-tunes of a base, all random (a Llama of two layers, weights of standard deviation 0.1, changes of 0.03). mergekit
reads the configurations as they are; ours come through `trimtab merge run`'s reader of them. Both round as they like, so the
goal is 1e-6 and not 0. Methods that draw at random get the same numbers: on mergekit's side torch.bernoulli is replaced by a
comparison with ours, by tensor and model. Prints the largest difference a method; ends with 1 where the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOAL = 1e-6
HIDDEN, INNER, LAYERS, WORDS, HEADS, KEY_VALUE = 64, 96, 2, 100, 4, 32

# method -> settings: those of the whole, and those of each model
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "linear": [({}, {"weight": [0.7, 0.2, 0.4]}), ({"normalize": False}, {"weight": [0.7, -0.2, 0.4]})],
    "task_arithmetic": [({}, {"weight": [0.7, -0.2, 0.4]}), ({"normalize": True, "lambda": 0.5}, {"weight": [1, 2, 1]})],
    "ties": [
        ({}, {"weight": [1, 1, 1], "density": [0.3, 0.3, 0.3]}),
        ({"lambda": 1.5}, {"weight": [0.7, 0.2, 0.4], "density": [0.9, 0.5, 1.0]}),
        ({"normalize": False}, {"weight": [1, 1, 1], "density": [0.5, 0.5, 0.5]}),
    ],
    "dare_linear": [({}, {"weight": [0.7, 0.2, 0.4], "density": [0.5, 0.3, 0.9]})],
    "dare_ties": [
        ({}, {"weight": [0.7, 0.2, 0.4], "density": [0.5, 0.3, 0.9]}),
        ({"normalize": True}, {"weight": [1, 1, 1], "density": [0.5, 0.5, 0.5]}),
    ],
    "della": [({}, {"weight": [0.7, 0.2, 0.4], "density": [0.5, 0.3, 0.7], "epsilon": [0.15, 0.1, 0.2]})],
    "della_linear": [({}, {"weight": [0.7, 0.2, 0.4], "density": [0.5, 0.3, 0.7], "epsilon": [0.15, 0.1, 0.2]})],
    "breadcrumbs": [({}, {"weight": [0.7, 0.2, 0.4], "density": [0.9, 0.5, 0.8], "gamma": [0.05, 0.05, 0.05]})],
    "breadcrumbs_ties": [({}, {"weight": [0.7, 0.2, 0.4], "density": [0.9, 0.5, 0.8], "gamma": [0.05, 0.05, 0.05]})],
    "model_stock": [({}, {}), ({"filter_wise": True}, {})],
    "slerp": [({"t": 0.3}, {}), ({"t": [0.1, 0.9]}, {})],
    "nuslerp": [
        ({}, {"weight": [0.7, 0.4]}),
        ({"nuslerp_flatten": False}, {"weight": [0.7, 0.4]}),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [0.7, 0.4]}),
        ({"base": True}, {"weight": [0.7, 0.4]}),
    ],
    "karcher": [({}, {}), ({"max_iter": 50, "tol": 1e-8}, {})],
    "sce": [({"select_topk": 0.3}, {}), ({"select_topk": 1.0}, {})],
}  # fmt: skip
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def shapes() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "lm_head.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        out |= {f"{at}self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in
                (("q", HIDDEN), ("k", KEY_VALUE), ("v", KEY_VALUE), ("o", HIDDEN))}  # fmt: skip
        out |= {f"{at}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        out |= {f"{at}mlp.down_proj.weight": (HIDDEN, INNER)}
        out |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return out


def make_folders(root: Path, seed: int) -> None:
    """base, one, two, three."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS * KEY_VALUE // HIDDEN,
        "vocab_size": WORDS, "tie_word_embeddings": False, "torch_dtype": "float32", "max_position_embeddings": 128,
    }  # fmt: skip
    chance = torch.Generator().manual_seed(seed)
    base = {name: 0.1 * torch.randn(shape, generator=chance) for name, shape in shapes().items()}
    for model in ("base", "one", "two", "three"):
        folder = root / model
        folder.mkdir()
        tensors = {
            name: tensor + (0.03 * torch.randn(tensor.shape, generator=chance) if model != "base" else 0)
            for name, tensor in base.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))


def configuration(root: Path, method: str, settings: dict[str, Any], each: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    count = {"slerp": 1, "nuslerp": 2}.get(method, 3)
    models: list[dict[str, Any]] = [
        {"model": str(root / name), "parameters": {key: values[i] for key, values in each.items()}}
        for i, name in enumerate(("one", "two", "three")[:count])
    ]
    based = method not in ("linear", "karcher", "nuslerp") or settings.pop("base", False)
    if method == "slerp":
        models.insert(0, {"model": str(root / "base")})
    made = {"merge_method": method, "models": models, "parameters": settings, "dtype": "float32"}
    return made | ({"base_model": str(root / "base")} if based else {})


def draw(root: Path) -> None:
    """The numbers that our methods draw, for mergekit's side: `tensor|model` -> float32 of the tensor's shape."""
    import torch
    from safetensors.torch import save_file

    from trimtab.merge.method import Part, Place

    drawn: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        part = Part(Place(name, shape, (1.0,) * 3), 0, [torch.empty(shape)] * 3)
        drawn |= {f"{name}|{model}": part.uniform(number) for number, model in enumerate(("one", "two", "three"))}
    save_file(drawn, root / "drawn.safetensors")


def theirs(root: Path) -> None:
    """Runs in mergekit's environment: every configuration of `root`."""
    import mergekit.merge_methods.generalized_task_arithmetic as arithmetic
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    drawn = load_file(root / "drawn.safetensors")
    coming: list[str] = []
    vectors, thin = arithmetic.get_task_vectors, arithmetic.sparsify

    def named_vectors(weight: Any, *arguments: Any, **more: Any) -> Any:
        found = vectors(weight, *arguments, **more)
        coming[:] = [f"{weight.name}|{Path(str(one['model'].model.path)).name}" for one in found[0]]
        return found

    def named_thin(*arguments: Any, **more: Any) -> Any:
        name = coming.pop(0)
        mask: Any = lambda share, **_: (drawn[name].view(share.shape) < share).to(share.dtype)  # noqa: E731
        torch.bernoulli = mask
        return thin(*arguments, **more)

    arithmetic.get_task_vectors, arithmetic.sparsify = named_vectors, named_thin
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    for path in sorted(root.glob("*.yaml")):
        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        run_merge(config, str(root / "theirs" / path.stem), options)


def difference(root: Path, case: str) -> float:
    from safetensors.torch import load_file

    from trimtab.merge import run
    from trimtab.merge.mergekit import read_mergekit
    from trimtab.merge.recipe import read_yaml

    run(read_mergekit(read_yaml(root / f"{case}.yaml")).recipe, root / "ours" / case)
    ours, its = (load_file(root / who / case / "model.safetensors") for who in ("ours", "theirs"))
    if ours.keys() != its.keys():
        return math.inf
    found = [float((ours[name].double() - its[name].double()).abs().max()) for name in ours]
    return math.inf if any(map(math.isnan, found)) else max(found)


def compare(python: str, seed: int, root: Path) -> dict[str, float]:
    """case -> the largest difference."""
    import yaml

    make_folders(root, seed)
    draw(root)
    cases = []
    for method, settings in CASES.items():
        for number, (whole, each) in enumerate(settings):
            cases.append(f"{method}-{number}")
            (root / f"{cases[-1]}.yaml").write_text(yaml.safe_dump(configuration(root, method, whole, each)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, __file__, "--theirs", str(root)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mergekit failed:\n{done.stderr[-3000:]}")
    return {case: difference(root, case) for case in cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the python of an environment that has mergekit")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        theirs(args.theirs)
        return
    if not args.python:
        parser.error("--python is needed: the python of an environment that has mergekit")
    import torch

    asked = "import importlib.metadata as m, torch; print(m.version('mergekit'), torch.__version__)"
    version = subprocess.run([args.python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    print(f"{platform.machine()}, torch {torch.__version__}; mergekit {version[0]} with torch {version[1]}; float32")
    worst: dict[str, float] = {}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as root:
            for case, found in compare(args.python, seed, Path(root)).items():
                worst[case] = max(worst.get(case, 0.0), found)
    print("| method | settings | largest difference |\n|---|---|---|")
    for case, found in worst.items():
        method, number = case.rsplit("-", 1)
        whole, each = CASES[method][int(number)]
        shown = ", ".join(f"{key} {value}" for key, value in {**whole, **each}.items()) or "as they are"
        drawn = " (same random numbers)" if method in RANDOM else ""
        print(f"| {method}{drawn} | {shown} | {found:.1e}{'' if found <= GOAL else ' MISSED'} |")
    sys.exit(any(found > GOAL for found in worst.values()))


if __name__ == "__main__":
    main()
