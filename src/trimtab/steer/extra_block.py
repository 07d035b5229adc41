"""Natural control as one more transformer block: the result is a plain checkpoint that any server runs.

The control moves before the final norm. A block of the model's own architecture is appended whose attention output
projection is zero, so it computes h' = h + MLP(norm_b(h)) from the residual stream h [.., D]; the edit of the final hidden
state is then Delta(h) = norm_f(h') - norm_f(h), and the regression of `natural_control` fits the block's MLP:

    min mean_t (A^_t - c_t . Delta(h_t) / s)^2       s = block_strength, the strength it is to run at

The down projection starts at zero and norm_b at the final norm's weights. Scaling the down projection by x scales the edit
by x to first order: that is the dial. (Gemma 2 and 3 normalise the MLP's output, so there the post-norm's gain starts at
zero and is scaled instead.)

While it is fitted and tuned the block is a hook on the base model's final norm (`attached`, `Steered`: the same numbers).
`save_pretrained` and `as_policy` make the model of L + 1 layers. Cost: one block in L + 1, and its attention runs for
nothing. The attention weights of the new layer are those of the last one, of which only the output projection is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from trimtab.control import Positions
from trimtab.errors import UsageError
from trimtab.files import dump_json, write_atomic
from trimtab.lm import LM
from trimtab.policy import Cost, Policy, Prompt
from trimtab.rewards.base import Reward
from trimtab.sampling import Sampling, derive_seed
from trimtab.steer.block import Block, BlockSignal, anatomy_of, read_tensors
from trimtab.steer.controller import Origin, folder_to_fill, model_card, origin_of, read_record, record_of
from trimtab.steer.natural_control import (
    NaturalControl,
    NaturalControlConfig,
    advantages,
    curvature,
    regress,
    value_of_round,
)
from trimtab.steer.rollouts import Progress, Rollouts, collect
from trimtab.steer.value import ValueNetwork


class NaturalBlock(NaturalControl):
    """`NaturalControl` with form=block. As a control it hooks the final norm; `extended(model)` is the plain model."""

    final = False

    def __init__(
        self,
        block: Block,
        config: NaturalControlConfig,
        origin: Origin | None = None,
        value: ValueNetwork | None = None,
        lm: LM | None = None,
        learnt: bool = True,
    ):
        super().__init__([block] if learnt else [], config=config, origin=origin, value=value)
        self.block, self.lm = block, lm

    @classmethod
    def learn(
        cls,
        lm: LM,
        prompts: Sequence[Prompt],
        reward: Reward,
        sampling: Sampling,
        config: Any,
        rollouts: Rollouts | None = None,
        progress: Progress | None = None,
    ) -> Self:
        names = anatomy_of(lm.model)
        drawn = rollouts or collect(lm, prompts, reward, sampling, config.rollouts, progress=progress)
        start = time.perf_counter()
        seed = derive_seed(config.seed, "natural", 0)
        value, metrics = value_of_round(drawn, config, seed, progress)
        final = copy.deepcopy(lm.model.base_model.get_submodule(names.final)).float()
        block = Block.fresh(lm.model, seed)
        residual, forwarded = residuals(lm, prompts, drawn)
        advantage = advantages(drawn, value, config.lambda_advantage)
        signal = BlockSignal(block, final, config.block_strength)
        metrics["explained"] = regress(drawn, advantage, signal, residual, config, seed, progress)
        metrics["curvature"] = curvature(drawn, signal, residual)
        cost = drawn.cost + Cost({lm.name: forwarded}, 0, time.perf_counter() - start)
        found = {f"round1_{key}": amount for key, amount in metrics.items()}
        origin = origin_of(lm, reward, prompts, drawn, sampling, cost, found)
        learnt = metrics["explained"] > 0
        if not learnt:
            origin.warnings.append("the block learnt nothing (its held-out error is above that of no control)")
        return cls(block.eval().requires_grad_(False), config, origin, value, lm, learnt)

    @property
    def scale(self) -> float:
        """What the down projection is multiplied by."""
        return self.strength / self.config.block_strength if self.networks else 0.0

    def edit(self, hidden: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        raise UsageError(
            "form=block edits before the final norm: the final hidden state alone does not determine the edit"
        )

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def hooks(self, model: Any, positions: Positions) -> Iterator[Any]:
        scale = self.scale
        if scale == 0:
            return
        weight = model.get_output_embeddings().weight
        self.block.to(weight.device)

        def pre_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = inputs[0]
            with torch.no_grad():
                if positions == "all" or hidden.dim() == 2 or hidden.shape[1] == 1:
                    return (self.block(hidden.float(), scale).to(hidden.dtype), *inputs[1:])
                edited = hidden.clone()
                edited[:, -1] = self.block(hidden[:, -1].float(), scale).to(hidden.dtype)
                return (edited, *inputs[1:])

        yield model.base_model.get_submodule(anatomy_of(model).final).register_forward_pre_hook(pre_hook)

    def check(self, model: nn.Module) -> None:
        anatomy_of(model)
        super().check(model)

    def as_policy(self, lm: LM) -> Policy:
        """The model of L + 1 layers as a policy of its own: what a server would run, at what it costs."""
        self.check(lm.model)
        return LM(self.extended(lm.model), lm.tokenizer, f"{lm.name}+block", lm.batch_rows)

    @torch.no_grad()
    def extended(self, model: Any) -> Any:
        """A new model with one more layer; `model` stays as it is. Needs memory for both."""
        names, config = anatomy_of(model), copy.deepcopy(model.config)
        number = config.num_hidden_layers
        config.num_hidden_layers = number + 1
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, config.layer_types[-1]]
        with torch.random.fork_rng(devices=[]):
            big = type(model)(config)
        big = big.to(device=model.device, dtype=model.dtype).eval()
        layers = f"{model.base_model_prefix}.layers."
        state = dict(model.state_dict())
        added = {
            key.replace(f"{layers}{number - 1}.", f"{layers}{number}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"{layers}{number - 1}.")
        }
        for key in added:
            if key.startswith(f"{layers}{number}.{names.attention_out}."):
                added[key] = torch.zeros_like(added[key])
        own = self.block.scaled_state(names, self.scale)
        big.load_state_dict({**state, **added, **{f"{layers}{number}.{key}": tensor for key, tensor in own.items()}})
        big.generation_config = copy.deepcopy(model.generation_config)
        return big

    def save_pretrained(self, folder: str | Path, lm: LM | None = None) -> Path:
        """Write the checkpoint (config, safetensors, tokenizer), a model card and controller.json; returns the folder.

        lm: the base model, needed where this controller was loaded and not fitted here. controller.json is written last.
        """
        base = lm or self.lm
        if base is None:
            raise UsageError("a loaded block does not hold its base model: save_pretrained(folder, lm=...)")
        self.check(base.model)
        strength, longer = self.strength, self.extended(base.model)
        where = folder_to_fill(folder)
        longer.save_pretrained(where)
        base.tokenizer.save_pretrained(where)
        # the dial is folded into the weights, so from here on the block is one made for this strength
        config = dataclasses.replace(self.config, block_strength=strength or self.config.block_strength)
        write_atomic(where / "README.md", card_of(self))
        write_atomic(where / "controller.json", dump_json(record_of(self, config)))
        return where

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The block of a saved checkpoint, to attach to its base model or to scale."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if not holds_block(folder):
            raise UsageError(f"{str(folder)!r} does not hold a natural-control block")
        record = read_record(folder)
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"the checkpoint in {str(folder)!r} is damaged: {str(error).splitlines()[0]}") from error
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        names = anatomy_of(shell)
        block = Block.within(shell).to_empty(device="cpu")
        prefix = f"{shell.base_model_prefix}.layers.{config.num_hidden_layers - 1}."
        own = read_tensors(Path(folder), [prefix + key for key in block.scaled_state(names, 1.0)])
        with torch.no_grad():
            for part, module in (("norm", names.norm), ("mlp", "mlp"), ("post", names.post)):
                if module is not None:
                    start = f"{prefix}{module}."
                    block.get_submodule(part).load_state_dict(
                        {key.removeprefix(start): tensor for key, tensor in own.items() if key.startswith(start)}
                    )
        known = {field.name for field in dataclasses.fields(cls.Config)}
        settings = cls.Config(**{key: value for key, value in record["config"].items() if key in known})
        return cls(block.float().eval().requires_grad_(False), settings, Origin(**record["origin"]))


@torch.no_grad()
def residuals(lm: LM, prompts: Sequence[Prompt], rollouts: Rollouts) -> tuple[torch.Tensor, int]:
    """The residual stream before the final norm at every step of the rollouts [M, D] float32, and tokens forwarded.

    By teacher forcing: answers are padded on the right, where a causal model does not look.
    """
    encoded = lm.encode(prompts)
    starts = [encoded[number] for number in rollouts.prompt_index.tolist()]
    norm = lm.backbone.get_submodule(anatomy_of(lm.model).final)
    out, seen, forwarded = [], [], 0
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        for first in range(0, len(rollouts), 64):
            part = list(zip(starts[first : first + 64], rollouts.tokens[first : first + 64], strict=True))
            rows = [[*prompt, *answer[:-1]] for prompt, answer in part]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=lm.device)
            lm.backbone(input_ids=ids, use_cache=False)
            hidden = seen.pop().float().cpu()
            out += [hidden[i, len(row) - len(part[i][1]) : len(row)] for i, row in enumerate(rows)]
            forwarded += sum(map(len, rows))
    finally:
        handle.remove()
    return torch.cat(out), forwarded


def holds_block(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint that `NaturalBlock.save_pretrained` wrote."""
    try:
        record = json.loads((Path(folder) / "controller.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and (record.get("config") or {}).get("form") == "block"


def card_of(controller: NaturalBlock) -> str:
    """README.md of the checkpoint."""
    text = model_card(controller)
    usage = [
        f"A plain checkpoint: `{controller.origin.model}` with one more layer, whose MLP is the control and whose attention",
        "does nothing. Load it like any model; nothing of trimtab is needed.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
    ]
    before, after = text.split("```python")[0], text.split("```")[2]
    return before + "\n".join(usage) + after
