"""Tiny checkpoints on disk for tests of merging: `from merge_folders import save, tensors, merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import WORDS, tiny_lm, tiny_model, tiny_tokenizer
from trimtab import cli
from trimtab.prompt import tuning


def save(
    folder: Path,
    seed: int = 0,
    arch: str = "llama",
    tokenizer: Any = None,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random model of `arch` and its tokenizer (59 words) in `folder`; rows: of its embeddings (the tokenizer's tokens)."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    model = tiny_model(arch, seed=seed, vocab_size=len(tokenizer) if rows is None else rows, **config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint's tensors (from one file)."""
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replaces tensors (None: removes them) in a checkpoint of one file; '__' in a key stands for '.'."""
    found: dict[str, Tensor | None] = {**tensors(folder)}
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value.contiguous() for key, value in found.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    """Changes values of config.json."""
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def merge(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """`trimtab merge ...`: its exit code and what it said on stderr."""
    code = cli.main(["merge", *map(str, words)])
    return code, capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str | Path) -> str:
    """A merge that must end with exit code 2 and one line, with nothing written; returns the line."""
    code, said = merge(capsys, *words, "--out", out)
    lines = [line for line in said.splitlines() if line.startswith("trimtab: ")]
    assert code == 2, said
    assert len(lines) == 1 and "Traceback" not in said, said
    assert not out.exists(), "a refused merge wrote something"
    return lines[0]


def two_tuned(folder: Path, drawn: int = 40, shown: int = 16, test: int = 0) -> Path:
    """base; b and d: copies tuned on texts of a kind each; b.txt, d.txt: `shown` other texts; -test.txt: `test` more."""
    base = tiny_lm()
    tuning.save(base, folder / "base")
    rng = np.random.default_rng(0)
    for name, words in (("b", WORDS[:5]), ("d", WORDS[5:10])):
        texts = [" ".join(rng.choice(words, 6)) for _ in range(drawn)]
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts[:shown]))
        if test:
            (folder / f"{name}-test.txt").write_text("".join(f"{text}\n" for text in texts[shown : shown + test]))
        tuning.save(
            tuning.sft(base, [("fa", text) for text in texts[shown + test :]], epochs=2, lr=3e-3), folder / name
        )
    return folder
