"""`LM`: a Hugging Face causal language model and its tokenizer, as a policy.

Besides answering it scores given answers, hands out hidden states, and opens sessions. It calls the model's backbone
and its head separately (so an edit can sit between them) and checks once, on a few tokens, that this equals the model's
own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from trimtab import attention
from trimtab.checkpoint import load_pretrained, local_folder
from trimtab.control import Control
from trimtab.errors import UsageError
from trimtab.fingerprint import fingerprint
from trimtab.generation import Observer
from trimtab.head import Head
from trimtab.policy import Completions, Cost, Prompt
from trimtab.sampling import Sampling
from trimtab.session import Session
from trimtab.stepping import answer as answer_prompts


class LM:
    """A local causal language model.

    name            how it was asked for ("pocket/base", a folder's name)
    head            final hidden states [..., D] -> float32 logits [..., V]
    hidden_size     D, width of the final hidden state (the input of the output embedding)
    unembedding     W [V, D]
    eos_ids         tokens that end an answer
    context_length  most tokens a row may have, or None
    batch_rows      rows forwarded together; part of what "the same bytes" depends on
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model", batch_rows: int | None = None):
        self.head = Head(model)
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.backbone = model.base_model
        self.takes_position_ids = "position_ids" in inspect.signature(self.backbone.forward).parameters
        config = model.config.get_text_config(decoder=True)
        limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
        self.context_length = next((int(limit) for limit in limits if limit), None)
        size = sum(parameter.numel() for parameter in model.parameters())
        self.batch_rows = batch_rows or (320 if size < 2e7 else 64 if size < 2e9 else 16)
        self.takes_ready_mask = attention.takes_ready_mask(model)
        self._checked = False

    @classmethod
    def load(
        cls, path: str | Path, device: str | None = None, dtype: Any = None, trust_remote_code: bool = False
    ) -> LM:
        """Load `pocket/NAME`, a local folder or a Hub id. Weights must be safetensors, and whole.

        device: "cuda" where there is one, else "cpu". dtype: float32 on a CPU, bfloat16 on an accelerator.
        """
        name = str(path)
        folder = local_folder(name)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        model, tokenizer = load_pretrained(folder or name, name, dtype, trust_remote_code, local=folder is not None)
        short = name if folder is None or name.startswith("pocket/") else folder.name
        model = model.to(device)
        attention.adopt(model)
        return cls(model, tokenizer, short)

    @property
    def device(self) -> torch.device:
        return self.unembedding.device

    @property
    def unembedding(self) -> torch.Tensor:
        return self.head.weight

    @property
    def hidden_size(self) -> int:
        return self.unembedding.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.unembedding.shape[0]

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        own = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset(int(token) for token in [*ids, own] if token is not None)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    # text

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt, ready to be continued.

        With a chat template a string is one user message; without one it is taken as it is, and messages are refused
        unless there is a single user message. Errors name the prompt: empty, or longer than the context.
        """
        rows = []
        for number, prompt in enumerate(prompts):
            ids = self._encode_one(prompt, number)
            if not ids:
                raise UsageError(f"prompt {number} is empty")
            if self.context_length is not None and len(ids) > self.context_length:
                raise UsageError(
                    f"prompt {number} has {len(ids)} tokens; "
                    f"{self.name} has a context of {self.context_length}: shorten it"
                )
            rows.append(ids)
        return rows

    def _encode_one(self, prompt: Prompt, number: int) -> list[int]:
        text = self.render(prompt, number)
        if getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text)["input_ids"])
        if len(ids) > 1 and ids[0] == ids[1] == getattr(self.tokenizer, "bos_token_id", None):
            del ids[0]  # the text already began with it
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.eos_ids else ids

    def render(self, prompt: Prompt, number: int = 0) -> str:
        """The text of a prompt as this model reads it: its chat template applied, where it has one."""
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise UsageError(f"prompt {number} is empty")
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            except TemplateError as error:
                raise UsageError(f"the chat template of {self.name} refuses prompt {number}: {error}") from error
        if isinstance(prompt, str):
            return prompt
        if len(prompt) != 1 or prompt[0]["role"] != "user":
            raise UsageError(f"prompt {number} is a conversation and {self.name} has no chat template: give plain text")
        return prompt[0]["content"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    # numbers

    def session(
        self, prompts: Sequence[Sequence[int]], control: Control | None = None, meter: Cost | None = None
    ) -> Session:
        """A `Session` after one prefill of the given token ids; what it forwards is charged to `meter`."""
        if control is not None:
            control.check(self.model)
        session = Session(self, prompts, control, meter)
        self._check_head(list(prompts[0]))
        return session

    @torch.no_grad()
    def _check_head(self, ids: list[int]) -> None:
        """Once: the model's own forward must equal head(backbone), or edits would land in the wrong place."""
        if self._checked:
            return
        tokens = torch.tensor([ids[:8]], device=self.device)
        own = self.model(tokens).logits[:, -1].float()
        ours = self.head(self.backbone(tokens).last_hidden_state[:, -1])
        if bool(own.isnan().any()):
            raise UsageError(f"{self.name} gives logits that are not numbers: its weights hold NaN or infinite values")
        if not torch.allclose(own, ours, atol=1e-3 * max(1.0, float(own.abs().max()))):
            raise UsageError(f"{type(self.model).__name__} transforms its logits in a way trimtab does not know")
        self._checked = True

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        control: Control | None = None,
        observer: Observer | None = None,
    ) -> Completions:
        """Answer every prompt `sampling.samples` times; the prefill of a prompt is forwarded once for all of them.

        observer sees every step (see `generation.Step`; its rows number the rows of the result).
        """
        if control is not None:
            control.check(self.model)
        encoded, meter = self.encode(prompts), Cost()
        return answer_prompts(
            self, lambda part: self.session(encoded[part], control, meter), prompts, sampling, meter, observer
        )

    @property
    def lm(self) -> LM:
        """Whose tokens this policy draws: its own."""
        return self

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Session:
        """A session after one prefill of the prompts, its cost on `meter`: what makes a policy steppable."""
        return self.session(self.encode(prompts), None, meter)

    @torch.no_grad()
    def hidden_states(
        self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], control: Control | None = None
    ) -> Iterator[torch.Tensor]:
        """For each answer the final hidden states o_t its tokens were drawn from, [T_i, D], by teacher forcing.

        o_1 is the state at the prompt's last position; the answer's last token is never forwarded. `control` matters
        only if it edits inside the blocks: the states are returned before any final edit.
        """
        encoded = self.encode(prompts)
        if len(encoded) != len(tokens):
            raise UsageError(
                f"there are {len(encoded)} prompts and {len(tokens)} answers: one answer a prompt is needed"
            )
        for first in range(0, len(encoded), 64):
            part = zip(encoded[first : first + 64], tokens[first : first + 64], strict=True)
            if control is None or control.final:
                session = self.session([[*prompt, *answer[:-1]] for prompt, answer in part])
            else:  # two calls, so that a control that tells prompt from answer sees the boundary
                session = self.session(encoded[first : first + 64], control)
                session.append([list(answer[:-1]) for _, answer in part])
            for row, answer in enumerate(tokens[first : first + 64]):
                states = session.states(row)
                yield states[len(states) - len(answer) :]

    @torch.no_grad()
    def token_logprobs(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Sequence[int]],
        sampling: Sampling = Sampling(),
        control: Control | None = None,
    ) -> Iterator[torch.Tensor]:
        """For each answer the whole next-token distribution at each of its positions, [T_i, V] in nats.

        Only softmax sampling at a temperature is meant: cuts and penalties in `sampling` are refused.
        """
        if not sampling.is_softmax:
            raise UsageError("distributions are compared at a temperature above 0, without top-k, top-p or penalties")
        if control is not None:
            control.check(self.model)
        final = None if control is None else control.split()[1]
        for states in self.hidden_states(prompts, tokens, control):
            if final is not None and len(states):
                states = final.edit(states, torch.arange(len(states))).to(states.dtype)
            yield sampling.logprobs(self.head(states))

    def score(
        self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], control: Control | None = None
    ) -> list[torch.Tensor]:
        """Log-probability in nats of each given answer token at temperature 1, [T_i] per answer."""
        rows = self.token_logprobs(prompts, tokens, Sampling(), control)
        return [
            logprobs.gather(-1, torch.tensor(answer, dtype=torch.long, device=logprobs.device)[:, None])[:, 0].cpu()
            for logprobs, answer in zip(rows, tokens, strict=True)
        ]
