"""The pocket world: a tiny world with a judge that knows the truth, and four tiny models trained on it.

    from trimtab import pocket
    pocket.prompts("test", 4, seed=0)                     # held-out questions
    pocket.judge("Q: Where does Anna live?\\nA:", " ...")   # Verdict(helpful=..., honest=..., ..., score=...)
    pocket.path("base")                                   # a folder that plain transformers loads

Importing this imports no torch. `python -m trimtab.pocket.train` made the models.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import UsageError, unknown
from trimtab.pocket.judge import Verdict, judge, task_of
from trimtab.pocket.task import Task
from trimtab.pocket.world import answer, kinds, prompts, tasks

MODELS = ("base", "chat", "nano", "reward")

__all__ = ["MODELS", "Task", "Verdict", "answer", "judge", "kinds", "path", "prompts", "task_of", "tasks"]


def path(name: str) -> Path:
    """The folder of a shipped model (`base`, `chat`, `nano`, `reward`). UsageError for another name, or no weights."""
    if name not in MODELS:
        raise unknown("pocket model", name, MODELS)
    folder = Path(__file__).parent / "models" / name
    if not (folder / "config.json").is_file():
        raise UsageError(f"the weights of pocket/{name} are not in this installation: run `make pocket` to train them")
    return folder
