"""What a result was made with: versions, machine, commit. Recorded in every run; it names no person and no host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")
# What may change the numbers of a run; the rest of the record is for the reader.
_MATTERS = ("trimtab", "commit", "torch", "transformers", "tokenizers", "machine", "device")


def environment() -> dict[str, Any]:
    """Versions by package metadata (torch is not imported for it); torch's own settings where torch is loaded."""
    import trimtab

    record: dict[str, Any] = {"trimtab": trimtab.__version__, "commit": _commit(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            record[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            record[name] = None
    record |= {"platform": platform.platform(), "machine": platform.machine(), "cpu_count": os.cpu_count()}
    torch = sys.modules.get("torch")
    record["torch_threads"] = torch.get_num_threads() if torch else None
    record["device"] = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "cpu"
    return record


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed that may change numbers, each as `name before -> now`."""
    return [f"{name} {before.get(name)} -> {now.get(name)}" for name in _MATTERS if before.get(name) != now.get(name)]


def _commit() -> str | None:
    """The commit this package's files are tracked in, if they are (an editable install); None otherwise."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") else None
