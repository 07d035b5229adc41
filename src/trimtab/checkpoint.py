"""Loading a causal language model and its tokenizer: whole, or refused by name.

transformers draws a tensor that a checkpoint lacks at random, follows an index to files outside the folder, and loads
a classifier's body as a language model. Each of these would answer, and wrongly, so each is a `UsageError` here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trimtab.errors import UsageError

INDEX = "model.safetensors.index.json"


def load_pretrained(
    source: str | Path, name: str, dtype: Any, trust_remote_code: bool = False, local: bool = True
) -> tuple[Any, Any]:
    """The model and the tokenizer in `source` (a folder, or a Hub id if not `local`); `name` is for messages.

    Raises `UsageError`: no safetensors, a truncated file, missing, misshapen or non-finite tensors, another kind of model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if local:
        check_index(Path(source), name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        kinds = config.architectures or []
        if kinds and all("Classification" in kind for kind in kinds):
            raise UsageError(f"{name!r} is a {kinds[0]}, which scores text: it is no model that writes any")
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, where they can be named
            output_loading_info=True,
        )
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot load the model {name!r}: {_first_sentence(error)}") from error
    _check_tensors(model, info, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(f"the model {name!r} has no tokenizer that loads: {_first_sentence(error)}") from error
    return model, tokenizer


def check_index(folder: Path, name: str) -> None:
    """UsageError if the index of a sharded checkpoint names a file that is not in its own folder."""
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the model {name!r}: {INDEX} is damaged ({error})") from error
    for shard in sorted(map(str, shards)):
        if Path(shard).name != shard:
            raise UsageError(f"the model {name!r}: {INDEX} names {shard!r}, which is not a file of its folder")
        if not (folder / shard).is_file():
            raise UsageError(f"the model {name!r} lacks the file {shard!r} that its {INDEX} names")


def _check_tensors(model: Any, info: dict[str, Any], name: str) -> None:
    missing: Collection[str] = info["missing_keys"]
    if missing:
        raise UsageError(
            f"the weights of {name!r} lack {len(missing)} of its tensors, among them {min(missing)!r}: "
            "the files are incomplete, or of another kind of model"
        )
    misshapen = sorted(info.get("mismatched_keys") or ())
    if misshapen:
        key, found, needed = misshapen[0]
        raise UsageError(
            f"the model {name!r}: {key!r} has the shape {tuple(found)} in its file and {tuple(needed)} by its config"
        )
    broken = [key for key, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UsageError(f"the model {name!r} has weights that are not finite numbers, first in {broken[0]!r}")


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(":") if str(error).strip() else type(error).__name__


def local_folder(name: str) -> Path | None:
    """The folder a model name means, or None for a Hub id. `pocket/NAME` is a model that ships with trimtab."""
    if name.startswith("pocket/"):
        from trimtab import pocket

        return pocket.path(name.removeprefix("pocket/"))
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UsageError(f"{name!r} is a folder without config.json: not a Hugging Face model")
        return folder
    if name.count("/") > 1 or name.startswith((".", "~", os.sep)):
        raise UsageError(f"there is no model folder {name!r}")
    return None
