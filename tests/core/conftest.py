"""Shared by the core's tests: every architecture as a fixture."""

from __future__ import annotations

from typing import Any

import pytest

from tiny import ARCHITECTURES, tiny_lm
from trimtab import LM


@pytest.fixture(scope="session")
def models() -> dict[tuple[str, bool], LM]:
    return {}


@pytest.fixture
def lm_of(models: dict[tuple[str, bool], LM]) -> Any:
    """`lm_of(arch, tied)`: built once a session, shared by tests that do not change it."""

    def get(arch: str, tied: bool = True) -> LM:
        if (arch, tied) not in models:
            models[arch, tied] = tiny_lm(arch, tied=tied)
        return models[arch, tied]

    return get


@pytest.fixture(params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, lm_of: Any) -> LM:
    """Every architecture, embeddings tied (untied ones: `test_generate.py`)."""
    return lm_of(request.param)


@pytest.fixture
def llama(lm_of: Any) -> LM:
    return lm_of("llama")
