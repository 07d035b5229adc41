"""What every test runs under: no network, few threads, and the shared folders where they exist.

The environment is set before torch is first imported, so that it also holds in the processes that tests start.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread a process: pytest-xdist keeps the cores busy, and the models here are too small for a second one to help.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside a development checkout; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' beside the checkout (models and data for development)")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real language model of 260K parameters that nobody here trained."""
    folder = shared / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs the model stories260k in 'shared/models'")
    return folder
