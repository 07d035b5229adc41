"""A sequence classifier as a reward: r = logits[:, column] at the last real token, in float32.

Any local folder that `AutoModelForSequenceClassification` loads, weights in safetensors. The text is the tokenizer's
chat template over prompt and answer, or a `template` such as "{prompt}{response}".

How this departs from calling the model:
- Hugging Face's decoder classifiers read the right-most token that differs from the pad id. Where pad == eos and the
  text ends with eos, that is the token *before* eos. Here the position comes from the length, and the head is applied
  to that one state, in float32 (bfloat16 logits near 6 move in steps of 0.03).
- Rows are padded on the right whatever the tokenizer says: under a causal mask real tokens never see the pads, so
  scores do not depend on the batch (to 1e-5 in float32). Encoders (BERT and kin) run whole, with their attention mask.
- A checkpoint without a trained head is refused; transformers would draw one at random.
- A row over the context loses the oldest tokens of its *prompt*, with a warning; the answer is never cut, and an answer
  that does not fit by itself is not judged (None).

Cost: one forward a row, no cache.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.policy import Prompt, prompt_text
from trimtab.rewards.base import Reward

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Classifier(Reward):
    """Scores of an `AutoModelForSequenceClassification` folder, which is loaded at construction and never changed."""

    slug = "classifier"
    on_prefixes = False

    path: Path  # a folder with config.json, safetensors and a tokenizer
    column: int | None = None  # which logit; needed where the head has more than one
    template: str | None = None  # text with {prompt} and {response}; none: the tokenizer's chat template
    append_eos: bool = False  # end the text with the end-of-sequence token and score there
    max_length: int | None = None  # tokens; none: the model's context
    batch_size: int = 32  # rows a forward
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"  # of the body; the head is always float32
    device: str | None = None  # as torch names it; none: a GPU where there is one, else the CPU

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 1):
            raise UsageError(f"reward {self.name!r}: batch_size and max_length must be 1 or more")
        if self.template is not None and not {"{prompt}", "{response}"} <= set(_SLOT.findall(self.template)):
            raise UsageError(f"reward {self.name!r}: template {self.template!r} must hold {{prompt}} and {{response}}")
        self._load()

    @property
    def name(self) -> str:
        column = "" if self.column is None else f":column={self.column}"
        return f"classifier/{Path(self.path).resolve().name}{column}"

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Hash of the options that can change a score and of every file of weights, configuration and tokenizer."""
        files = sorted(
            p for p in Path(self.path).iterdir() if p.suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"}
        )
        options = [self.column, self.template, self.append_eos, self.max_length, self.dtype]
        return fingerprint_of(self.slug, options, [(file.name, _hash_file(file)) for file in files])

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
        rows, cut = [], 0
        for prompt, text in zip(prompts, texts, strict=True):
            ids, shortened = self._encode(prompt, text)
            rows.append(ids or [])  # nothing to read is nothing to judge
            cut += shortened and ids is not None
        if cut:
            message = (
                f"reward {self.name!r}: {cut} of {len(rows)} prompts were cut on the left to fit {self._limit} tokens"
            )
            warnings.warn(message, stacklevel=4)
        self.tokens_forwarded += sum(map(len, rows))
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
        out: list[float | None] = [None] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, value in zip(batch, self._forward([rows[i] for i in batch]).tolist(), strict=True):
                out[i] = value
        return out

    # ------------------------------------------------------------------ for prefix scoring

    @property
    def causal(self) -> bool:
        """Whether a score depends on what stands before it alone: a decoder with a linear head on the last token."""
        return self._head is not None

    @property
    def model(self) -> Any:
        return self._model

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer that fit."""
        return self._limit

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, D] -> logits [B, labels], float32."""
        assert self._head is not None
        scores: torch.Tensor = self._head(hidden.float())
        return scores

    def shares_tokens(self, tokenizer: Any) -> bool:
        """Whether token ids of `tokenizer` mean the same text here."""
        same: bool = self._tokenizer.get_vocab() == tokenizer.get_vocab()
        return same

    def frame(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The token ids that stand before and after the answer to `prompt`."""
        before, after = self._whole(prompt, _MARK).split(_MARK)
        special = self.template is not None and not self._begins_itself(before)
        ids = self._tokenizer(before, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id):
            ids = ids[:-1]
        tail = self._tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        if self.append_eos and (not tail or tail[-1] != self._tokenizer.eos_token_id):
            tail = [*tail, self._tokenizer.eos_token_id]
        return ids, tail

    # ------------------------------------------------------------------ text to tokens

    def _encode(self, prompt: Prompt, text: str) -> tuple[list[int] | None, bool]:
        """Token ids of prompt and answer (None where the answer alone does not fit), and whether the prompt was cut."""
        ids, cut = self._tokenize(prompt, text), False
        while len(ids) > self._limit:
            shorter = self._without_oldest(prompt, len(ids) - self._limit)
            if prompt_text(shorter) == prompt_text(prompt):
                return None, cut
            prompt, cut = shorter, True
            ids = self._tokenize(prompt, text)
        return ids, cut

    def _tokenize(self, prompt: Prompt, text: str) -> list[int]:
        tokenizer, whole = self._tokenizer, self._whole(prompt, text)
        special = self.template is not None and not self._begins_itself(whole)
        ids: list[int] = tokenizer(whole, add_special_tokens=special)["input_ids"]
        if self.append_eos and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        return ids

    def _whole(self, prompt: Prompt, text: str) -> str:
        """Prompt and answer as one text: the template's, or the tokenizer's chat template."""
        if self.template is not None:
            slots = {"{prompt}": prompt_text(prompt), "{response}": text}
            return _SLOT.sub(lambda slot: slots[slot.group()], self.template)
        turns: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns = [*turns, {"role": "assistant", "content": text}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))

    def _begins_itself(self, whole: str) -> bool:
        """Whether the text already holds its special tokens: a template may write the first one."""
        return bool(self._tokenizer.bos_token and whole.startswith(self._tokenizer.bos_token))

    def _without_oldest(self, prompt: Prompt, count: int) -> Prompt:
        """The prompt without its first `count` tokens; of messages, the first that has text left is shortened."""
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return self._tokenizer.decode(ids[count:], skip_special_tokens=False) if len(ids) > count else ""
        for i, message in enumerate(prompt):
            if message["content"]:
                content = self._without_oldest(message["content"], count)
                return [*prompt[:i], {"role": message["role"], "content": prompt_text(content)}, *prompt[i + 1 :]]
        return prompt

    # ------------------------------------------------------------------ tokens to scores

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids of B rows -> scores [B], float32."""
        import torch

        lengths = torch.tensor([len(row) for row in rows])  # [B]
        pad = self._tokenizer.pad_token_id
        ids = torch.full((len(rows), int(lengths.max())), 0 if pad is None else pad)  # [B, T]
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()  # [B, T]
        with torch.inference_mode():
            logits = self._logits(ids.to(self._device), mask.to(self._device), lengths.to(self._device))  # [B, C]
        return logits[:, self.column or 0].cpu()

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        import torch

        if self._head is None:
            return self._model(input_ids=ids, attention_mask=mask).logits.float()  # type: ignore[no-any-return]
        hidden = self._model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, T, D]
        last = hidden[torch.arange(len(ids), device=hidden.device), lengths - 1].float()  # [B, D]
        return self._head(last)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ loading

    def _load(self) -> None:
        import copy

        import torch

        tokenizer, model = _pretrained(Path(self.path), self.dtype)
        self._check_labels(model.config)
        if self.template is None and not tokenizer.chat_template:
            raise UsageError(
                f"reward {self.name!r}: its tokenizer has no chat template; give template='{{prompt}}{{response}}'"
            )
        if self.append_eos and tokenizer.eos_token_id is None:
            raise UsageError(f"reward {self.name!r}: append_eos needs a tokenizer with an end-of-sequence token")
        self._device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer, self._model = tokenizer, model.eval().requires_grad_(False).to(self._device)
        score = getattr(model, "score", None)  # the head of every decoder classifier; encoders call theirs otherwise
        self._head = copy.deepcopy(score).float() if isinstance(score, torch.nn.Linear) else None
        config = model.config.get_text_config()
        bounds = [self.max_length, getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        self._limit = min(bound for bound in bounds if bound is not None)
        self._check_head(config.vocab_size)

    def _check_labels(self, config: Any) -> None:
        labels = config.num_labels
        if self.column is None and labels != 1:
            names = ", ".join(f"{i} {label}" for i, label in sorted(config.id2label.items()))
            raise UsageError(f"reward {self.name!r}: the head has {labels} outputs ({names}); say which with column=")
        if self.column is not None and not 0 <= self.column < labels:
            raise UsageError(f"reward {self.name!r}: column={self.column} is not in 0..{labels - 1}")

    def _check_head(self, vocab_size: int) -> None:
        """On one row without pads our pooling must equal the model's own, or its class uses `score` in another way."""
        import torch

        if self._head is None:
            return
        pad = self._model.config.get_text_config().pad_token_id
        token = next(i for i in range(vocab_size) if i != pad)
        ids = torch.tensor([[token, token]], device=self._device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            own = self._logits(ids, mask, mask.sum(1))
            theirs = self._model(input_ids=ids, attention_mask=mask).logits.float()
        if not torch.isfinite(theirs).all():
            raise UsageError(f"reward {self.name!r}: the model's scores are NaN or infinite; its weights are damaged")
        if not torch.allclose(own, theirs, rtol=0.05, atol=0.05 if self._model.dtype != torch.float32 else 1e-4):
            raise UsageError(
                f"reward {self.name!r}: {type(self._model).__name__} does not score the last token with a linear head"
            )


_SLOT = re.compile(r"\{prompt\}|\{response\}")
_MARK = "\x00answer\x00"  # stands for the answer while a template is split around it


def _pretrained(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model of a local folder. `UsageError` for anything but a whole safetensors checkpoint."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise UsageError(f"classifier: {str(folder)!r} is not a local model folder (it has no config.json)")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"classifier: no .safetensors in {str(folder)!r}; other formats of weights are not loaded")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"classifier: {str(folder)!r} does not load ({reason})") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UsageError(f"classifier: {str(folder)!r} lacks {missing}: it is not a trained sequence classifier")
    return tokenizer, model


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
