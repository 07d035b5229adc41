"""V(x, y): the reward to expect of an answer that begins with y and that the model goes on to finish.

What controlled decoding (Mudgal et al., arXiv 2310.17022) reads. Learned from answers of the model, in units of the
reward, in one of two forms that differ in which final hidden state o they tap:

    after   V(o), o the state after the last token of y. k candidates for the next token are k forwards. A second
            network gives V of a y that ends: no state follows the end token, so it reads the one before. (Nor do
            rollouts have a state after the token at which the limit cut an answer: V is extrapolated there)
    before  Q(o, z) = v(o) + m(o) . W[z] = V(x, y + z), o the state before z and W [V, D] the model's own output
            embedding: the values of every next token, the end token too, for one product with W and no forward

Targets, for the answer's token t = 1..T and its reward r:
    mc      r                                   (CD-FUDGE: a regression on returns, unbiased on the model's own answers)
    td0     sum_z p(z | x, y^t) Q(o_{t+1}, z), and r at T      (CD-Q: exact over the vocabulary, right on any answers)

The sum over z is v(o) + m(o) . E_p[W]: E_p[W] is computed once, so the vocabulary costs a fit nothing further. The paper
does not say what its scorer looks like inside; it is a small language model of its own there. A vocabulary-sized output
layer in place of W was as good on pocket/base (held-out error 0.44 against 0.44 with `mc`) and grows with the vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from trimtab.branches import look
from trimtab.errors import UsageError
from trimtab.files import dump_json, write_atomic
from trimtab.guided import bottom
from trimtab.policy import Cost
from trimtab.steer.rollouts import Progress, Rollouts
from trimtab.steer.value import ValueFit, ValueNetwork, fit_value, targets

if TYPE_CHECKING:
    from trimtab.lm import LM

Tap = Literal["after", "before"]
FORMAT = "trimtab.prefix-value/1"
TRAIL = 0.9  # share of the old weights that the target network keeps at each step; 0.95 and none at all fitted worse


class Values(Protocol):
    """What controlled decoding asks of a value, in units of the reward. Sessions may be guided ones."""

    def check(self, lm: LM) -> None:
        """Raise `UsageError` where it was not made for this model."""

    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        """V after each candidate for the next token: tokens [B, k] -> [B, k]. An end token ends the answer."""

    def reached(self, session: Any) -> torch.Tensor:
        """V of what each row holds now, [B]."""


@dataclass(frozen=True)
class Fitted:
    """What a value was fitted on."""

    model: str = ""
    fingerprint: str = ""  # empty (built by hand): not checked
    reward: str = ""
    rollouts: int = 0
    temperature: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)


class PrefixValue(nn.Module, ABC):
    """A learned V. tap: the state that its networks read. Subclasses are `AfterToken` and `BeforeToken`."""

    tap: Tap
    fitted = Fitted()

    def check(self, lm: LM) -> None:
        made = self.fitted
        if made.fingerprint and made.fingerprint != lm.fingerprint:
            raise UsageError(
                f"this value was fitted on {made.model} (weights {made.fingerprint}); {lm.name} has weights "
                f"{lm.fingerprint}: fit one on it"
            )

    @abstractmethod
    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        """See `Values`."""

    @abstractmethod
    def reached(self, session: Any) -> torch.Tensor:
        """See `Values`."""


class AfterToken(PrefixValue):
    """value: V of the state after a text's last token. end: V of a text that ends, from the state before its end."""

    tap = "after"

    def __init__(self, value: ValueNetwork, end: ValueNetwork):
        super().__init__()
        self.value, self.end = value, end

    @torch.no_grad()
    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        own = bottom(session)
        ends = torch.isin(tokens.cpu(), torch.tensor(sorted(own.lm.eos_ids), dtype=torch.long))
        ended = self.end.in_reward_units(self.end(own.hidden.float()))  # [B]
        out = ended[:, None].repeat(1, tokens.shape[1])
        rows, columns = (~ends).nonzero().T.tolist()
        if rows:
            seen = look(own, rows, tokens[rows, columns, None].tolist())
            out[rows, columns] = self.value.in_reward_units(self.value(seen.hidden.float()))
        return out

    @torch.no_grad()
    def reached(self, session: Any) -> torch.Tensor:
        return self.value.in_reward_units(self.value(bottom(session).hidden.float()))


class BeforeToken(PrefixValue):
    """Q(o, z) = v(o) + m(o) . W[z] in standardised reward units; m starts at 0, so unseen tokens get v(o)."""

    tap = "before"
    reward_mean: torch.Tensor
    reward_std: torch.Tensor

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.trunk = nn.Linear(hidden_size, width)
        self.value = nn.Linear(width, 1)
        self.push = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.push.weight)
        nn.init.zeros_(self.push.bias)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Q of states [..., D] and (mean) embeddings [..., D] of the next token -> [...], standardised."""
        value, push = self.parts(hidden)
        return value + (push * embedding).sum(-1)

    def parts(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v [...] and m [..., D]."""
        x = torch.relu(self.trunk(hidden))
        return self.value(x)[..., 0], self.push(x)

    @torch.no_grad()
    def following(self, session: Any, tokens: torch.Tensor) -> torch.Tensor:
        own = bottom(session)
        value, push = self.parts(own.hidden.float())  # [B], [B, D]
        weight = own.lm.unembedding
        if tokens.shape[1] < weight.shape[0]:
            along = (weight[tokens].float() @ push[:, :, None])[..., 0]
        else:
            along = (push.to(weight.dtype) @ weight.T).float().gather(-1, tokens)
        return (value[:, None] + along) * self.reward_std + self.reward_mean

    @torch.no_grad()
    def reached(self, session: Any) -> torch.Tensor:
        own = bottom(session)
        hidden = own.hidden
        q = self(hidden.float(), mean_embedding(own.lm, hidden, self.fitted.temperature))
        return q * self.reward_std + self.reward_mean


def mean_embedding(lm: LM, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """E_p[W[z]], z drawn from the model at states [n, D] -> [n, D] float32."""
    weight = lm.unembedding
    rows = hidden.split(1024)  # so many rows of the vocabulary at a time
    return torch.cat([((lm.head(part) / temperature).softmax(-1).to(weight.dtype) @ weight).float() for part in rows])


def fit_prefix_value(
    lm: LM,
    rollouts: Rollouts,
    tap: Tap,
    fit: ValueFit,
    reward: str = "",
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> tuple[PrefixValue, Cost]:
    """Fit V to rollouts of `lm`. fit.target: "mc" is CD-FUDGE; "td0", with tap="before", is CD-Q.

    temperature: that of the model whose value is meant (td0 alone needs it). The cost includes the rollouts'.
    """
    start = time.perf_counter()
    if tap == "before":
        value, metrics = _fit_before(lm, rollouts, fit, temperature, progress)
    elif fit.target != "mc":
        raise UsageError("a value of the state after a token is fitted to returns (target=mc): CD-Q needs tap=before")
    else:
        value, metrics = _fit_after(rollouts, fit, progress)
    value.fitted = Fitted(lm.name, lm.fingerprint, reward, len(rollouts), temperature, metrics)
    return value.eval().requires_grad_(False), rollouts.cost + Cost(seconds=time.perf_counter() - start)


def _fit_after(rollouts: Rollouts, fit: ValueFit, progress: Progress | None) -> tuple[PrefixValue, dict[str, float]]:
    value, metrics = fit_value(rollouts, fit, progress=progress)
    ended = rollouts.ended.nonzero()[:, 0]
    if len(ended) < 2 or not float(rollouts.rewards[ended].std()) > 0:
        return AfterToken(value, copy.deepcopy(value)), metrics  # nothing says what ending is worth: V before it
    last = (rollouts.offsets + rollouts.lengths - 1)[ended]
    ends = dataclasses.replace(
        rollouts, states=rollouts.states[last], scores=rollouts.scores[last], lengths=torch.ones_like(ended),
        rewards=rollouts.rewards[ended], prompt_index=rollouts.prompt_index[ended], ended=rollouts.ended[ended],
        tokens=[rollouts.tokens[row][-1:] for row in ended.tolist()],
    )  # fmt: skip
    end, found = fit_value(ends, fit)
    return AfterToken(value, end), {**metrics, "held_out_error_end": found["held_out_error"]}


def _fit_before(
    lm: LM, rollouts: Rollouts, fit: ValueFit, temperature: float, progress: Progress | None
) -> tuple[PrefixValue, dict[str, float]]:
    """Adam on (Q(o_t, y_t) - target_t)^2, the mean over steps.

    mc keeps the epoch that is nearest to r on held-out answers; td0 the last one: its answers may be another's, whose
    returns are not its aim.
    """
    generator = torch.Generator().manual_seed(fit.seed)
    states, z = rollouts.states, rollouts.standardised
    drawn = lm.unembedding[torch.tensor([token for row in rollouts.tokens for token in row])].float().cpu()  # [M, D]
    mean = torch.empty(0) if fit.target == "mc" else mean_embedding(lm, states.to(lm.device), temperature).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        value = BeforeToken(states.shape[1], fit.width or max(128, states.shape[1]))
    value.reward_mean.fill_(float(rollouts.rewards.mean()))
    value.reward_std.fill_(float(rollouts.rewards.std()))
    trail = copy.deepcopy(value)  # the network that td0 bootstraps from
    lam = {"mc": 1.0, "td0": 0.0, "td_lambda": fit.td_lambda}[fit.target]
    train, held = rollouts.split(0.1, generator)
    optimiser = torch.optim.Adam(value.parameters(), lr=fit.lr)

    def errors(rows: torch.Tensor, lam: float) -> torch.Tensor:
        index, mask = rollouts.padded(rows)
        ahead = torch.zeros(index.shape)
        if lam < 1:
            with torch.no_grad():
                ahead = trail(states[index], mean[index])
        aims = targets(ahead, rollouts.lengths[rows], z[rows], lam)
        steps = index[mask]
        return (value(states[steps], drawn[steps]) - aims[mask]) ** 2

    best, best_error = copy.deepcopy(value.state_dict()), float("inf")
    for epoch in range(fit.epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(fit.batch):
            loss = errors(rows, lam).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if lam < 1:
                for old, new in zip(trail.parameters(), value.parameters(), strict=True):
                    old.data.lerp_(new.data, 1 - TRAIL)
        with torch.no_grad():
            error = float(errors(held, 1.0).mean())
        if lam < 1 or error < best_error:
            best, best_error = copy.deepcopy(value.state_dict()), error
        if progress is not None:
            progress(f"prefix value, epoch {epoch + 1}/{fit.epochs}: held-out error {error:.4f}")
    value.load_state_dict(best)
    return value, {"held_out_error": best_error}


# on disk


def save_value(value: PrefixValue, folder: Path) -> None:
    """value.safetensors, and value.json, which is written last."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in value.state_dict().items()}
    write_atomic(folder / "value.safetensors", save(tensors, metadata={"format": "pt"}))
    record = {"format": FORMAT, "tap": value.tap, "fitted": dataclasses.asdict(value.fitted)}
    write_atomic(folder / "value.json", dump_json(record))


def load_value(folder: Path, lm: LM, tap: Tap) -> PrefixValue:
    """A saved value. `UsageError` for another model's, another tap (its values would be one token off), or damage."""
    try:
        record = json.loads((folder / "value.json").read_text())
        tensors = load_file(folder / "value.safetensors")
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {FORMAT}")
        found, fitted = record["tap"], Fitted(**record["fitted"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UsageError(f"there is no whole prefix value in {str(folder)!r}: {error}") from error
    if found != tap:
        raise UsageError(
            f"the value in {str(folder)!r} taps the state {found} the token and {tap} is meant: it would be one off"
        )
    value = _empty(found, tensors, folder)
    value.fitted = fitted
    value.check(lm)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UsageError(f"the value in {str(folder)!r} holds numbers that are not finite")
    return value.eval().requires_grad_(False)


def _empty(tap: Tap, tensors: dict[str, torch.Tensor], folder: Path) -> PrefixValue:
    """A value of the form that the tensors have, with them."""
    try:
        value: PrefixValue
        if tap == "before":
            width, hidden_size = tensors["trunk.weight"].shape
            value = BeforeToken(hidden_size, width)
        else:
            value = AfterToken(_network(tensors, "value."), _network(tensors, "end."))
        value.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"the tensors in {str(folder)!r} do not fit: {' '.join(str(error).split())}") from error
    return value


def _network(tensors: dict[str, torch.Tensor], prefix: str) -> ValueNetwork:
    width, hidden_size = tensors[f"{prefix}hidden.0.weight"].shape
    return ValueNetwork(hidden_size, width, sum(name.startswith(f"{prefix}hidden.") for name in tensors) // 2)
