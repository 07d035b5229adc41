"""`Control`: an edit of hidden states, and the hooks that put it inside a model that is not ours.

An edit of the final hidden state (after the final norm, the input of the output embedding) is a forward pre-hook on
`model.get_output_embeddings()`, so it works on every architecture and inside any code that calls the model: `generate`,
a pipeline, an evaluation harness, a trainer. Controls that edit inside the blocks override `hooks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import UsageError
from trimtab.policy import Completions, Cost, Prompt
from trimtab.sampling import Sampling

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trimtab.session import Session

Positions = Literal["last", "all"]


class Control:
    """Edits the hidden state a token is drawn from.

    Subclasses implement `edit`. `final` says that the edit is a function of the final hidden state alone (so a session
    may call `edit` itself, and an edited distribution can be computed from a stored state); controls that work inside
    the blocks set it to False and implement `hooks`.
    """

    name: str = "control"
    final: bool = True

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., D] before the token is drawn -> [..., D]. `step` [B]: answer tokens drawn so far in each row."""
        raise UsageError(f"{self.name} does not edit the final hidden state")

    def check(self, model: nn.Module) -> None:
        """Raise `UsageError` where this control was not made for this model. Called before any edit."""

    def split(self) -> tuple[Control | None, Control | None]:
        """The part that edits inside the blocks, and the part that edits the final state."""
        return (None, self) if self.final else (self, None)

    def hooks(self, model: nn.Module, positions: Positions) -> Iterator[Any]:
        """Install the hooks and yield their handles. The default edits the input of the output embedding."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UsageError(f"{type(model).__name__} has no output embedding to edit the final hidden state at")
        fired = [False]

        def pre_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            fired[0] = True
            hidden = inputs[0]
            if positions == "all" or hidden.dim() == 2 or hidden.shape[1] == 1:
                return (self.edit(hidden).to(hidden.dtype), *inputs[1:])
            edited = hidden.clone()
            edited[:, -1] = self.edit(hidden[:, -1]).to(hidden.dtype)
            return (edited, *inputs[1:])

        def bypassed(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
            if not fired[0]:
                raise UsageError(
                    f"{type(model).__name__} does not call its output embedding: {self.name} cannot steer it"
                )

        yield head.register_forward_pre_hook(pre_hook)
        yield model.register_forward_hook(bypassed)

    @contextmanager
    def attached(self, model: Any, positions: Positions = "all") -> Iterator[Any]:
        """Steer every forward of `model` inside the `with` block; the hooks are gone afterwards, whatever happens.

        positions: "all" edits every position a call computes logits for, so that scoring given answers (an evaluation
        harness, a trainer) is steered as generation is; "last" edits the last position of each call alone, which is the
        same for generation. Contexts nest: edits apply in the order of attachment. Beam search, assisted decoding and
        compiled graphs are refused: they mix or skip edited states.
        """
        model = getattr(model, "model", model) if hasattr(model, "tokenizer") and hasattr(model, "model") else model
        refuse_unsteerable(model, self.name)
        self.check(model)
        with ExitStack() as stack:
            stack.enter_context(_generate_guarded(model, self.name))
            for handle in self.hooks(model, positions):
                stack.callback(handle.remove)
            yield model


class Controls(Control):
    """Several controls one after another."""

    def __init__(self, controls: Sequence[Control]):
        self.controls = list(controls)
        self.name = "+".join(control.name for control in controls)
        self.final = all(control.final for control in controls)

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        for control in self.controls:
            hidden = control.edit(hidden, step)
        return hidden

    def check(self, model: nn.Module) -> None:
        for control in self.controls:
            control.check(model)

    def split(self) -> tuple[Control | None, Control | None]:
        sides = zip(*(control.split() for control in self.controls), strict=True)
        parts = ([control for control in side if control is not None] for side in sides)
        inside, final = (Controls(part) if part else None for part in parts)
        return inside, final

    def hooks(self, model: nn.Module, positions: Positions) -> Iterator[Any]:
        for control in self.controls:
            yield from control.hooks(model, positions)


class FunctionControl(Control):
    """A control from a plain function hidden [..., D] -> [..., D]."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], name: str = "function"):
        self.function, self.name = function, name

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return self.function(hidden)


class Steered:
    """A policy whose hidden states are edited: `Steered(lm, control)`. It nests: `BestOfN(Steered(lm, c), reward)`."""

    def __init__(self, policy: Any, control: Control, name: str | None = None):
        if isinstance(policy, Steered):
            policy, control = policy.lm, Controls([policy.control, control])
        if not hasattr(policy, "session"):
            raise UsageError(f"Steered needs a local language model, not {type(policy).__name__}")
        self.lm: Any = policy
        self.control: Control = control
        self.name = name or control.name
        control.check(policy.model)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> Completions:
        return self.lm.generate(prompts, sampling, control=self.control)

    def open(self, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost) -> Session:
        """A session under the control after one prefill of the prompts, its cost on `meter`."""
        return self.lm.session(self.lm.encode(prompts), self.control, meter)

    def token_logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], sampling: Sampling = Sampling()
    ) -> Iterator[torch.Tensor]:
        """For each answer the whole steered distribution at each of its positions, [T_i, V] in nats."""
        return self.lm.token_logprobs(prompts, tokens, sampling, control=self.control)


def refuse_unsteerable(model: Any, name: str) -> None:
    """Refuse, by name, what hooks cannot steer correctly."""
    if hasattr(model, "_orig_mod"):
        raise UsageError(f"{name} cannot steer a torch.compile'd model: attach it to the model before compiling")
    if not hasattr(model, "get_output_embeddings"):
        raise UsageError(f"{name} needs a transformers causal language model, not {type(model).__name__}")
    _refuse_decoding(name, getattr(model, "generation_config", None), {})


def _refuse_decoding(name: str, config: Any, given: Mapping[str, Any]) -> None:
    """Refuse beam search and assisted decoding, set in a generation config or given to `generate`."""
    if (given.get("num_beams", getattr(config, "num_beams", None)) or 1) > 1:
        raise UsageError(
            f"{name} does not steer beam search (scores of edited and unedited beams mix): set num_beams=1"
        )
    if given.get("assistant_model") is not None or given.get("prompt_lookup_num_tokens"):
        raise UsageError(
            f"{name} does not steer assisted decoding (the drafts are not steered): leave the assistant out"
        )


@contextmanager
def _generate_guarded(model: Any, name: str) -> Iterator[None]:
    """While attached, `model.generate` refuses what cannot be steered before it draws a token."""
    plain = getattr(model, "generate", None)
    if plain is None:
        yield
        return
    before = model.__dict__.get("generate")

    @functools.wraps(plain)
    def generate(*arguments: Any, **given: Any) -> Any:
        _refuse_decoding(name, given.get("generation_config") or getattr(model, "generation_config", None), given)
        return plain(*arguments, **given)

    model.__dict__["generate"] = generate
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = before
