"""A language model small enough to enumerate: every prefix, every answer, every expectation exact.

A random two-layer Llama with 6 tokens (token 0 ends an answer) and answers of at most 5 tokens after one prompt has
N = 781 prefixes that ask for a next token and 3,906 answers. What is estimated from samples elsewhere is a sum here:
E[r], the KL of a whole answer, V(prefix), Q(prefix, token), the policy that is optimal at a given KL.

    from oracles.toy import Toy
    toy = Toy()
    toy.evaluate(toy.logprobs(controller.edit(toy.states)))      # exact reward and KL of an edited model
    toy.evaluate(toy.soft_optimal(1.0))                          # nothing beats this at its KL
    toy.rollouts(2048, seed=0)                                   # samples, for `fit(..., rollouts=...)`

Tensors: N prefixes in order of length (the empty one first), V tokens, D the hidden size. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from trimtab import LM, Sampling
from trimtab.rewards import Function
from trimtab.steer.rollouts import Rollouts

EOS = 0
Score = Callable[[tuple[int, ...]], float]


def mixed_reward(tokens: tuple[int, ...]) -> float:
    """Tokens 3 (good) and 4 (bad) wherever they stand, and 5 right after 1."""
    pairs = zip(tokens, tokens[1:], strict=False)
    return tokens.count(3) - 0.5 * tokens.count(4) + 0.8 * sum(pair == (1, 5) for pair in pairs)


def free_reward(tokens: tuple[int, ...]) -> float:
    """Good and bad tokens wherever they stand: the same push is right in every state."""
    return tokens.count(3) - 0.5 * tokens.count(4)


def context_reward(tokens: tuple[int, ...]) -> float:
    """3 is good after 1 and bad after 2, 4 the other way round: no constant push can know."""
    sign = {(1, 3): 1, (2, 3): -1, (1, 4): -1, (2, 4): 1}
    return float(sum(sign.get(pair, 0) for pair in zip(tokens, tokens[1:], strict=False)))


@dataclass(frozen=True)
class Outcome:
    """A policy, exactly: expected reward, KL of whole answers from the base in nats, expected number of tokens."""

    reward: float
    kl: float
    tokens: float

    @property
    def kl_per_token(self) -> float:
        return self.kl / self.tokens


class Toy:
    """See the module. `score` maps an answer's tokens (without the end token) to its reward.

    lm            the model as an `LM`; `prompt` its one prompt, `sampling` the horizon
    reward        the same score as a trimtab reward on text
    states        [N, D] float32, the final hidden state at each prefix
    base          [N, V] log-probabilities; child [N, V] number of the longer prefix, -1 where the answer ends
    end_reward    [N, V] reward of the answer that ends there, 0 elsewhere
    levels        the rows of each length, as slices
    """

    def __init__(
        self,
        score: Score = mixed_reward,
        seed: int = 0,
        hidden_size: int = 16,
        vocab: int = 6,
        horizon: int = 5,
        prompt: Sequence[int] = (1, 2),
        spread: float = 0.35,
    ):
        self.score, self.vocab, self.horizon = score, vocab, horizon
        self.lm = toy_lm(vocab, hidden_size, seed, spread)
        self.prompt = " ".join(map(str, prompt))
        self.sampling = Sampling(max_new_tokens=horizon)
        self.reward = Function(lambda _, texts: [score(tuple(map(int, text.split()))) for text in texts], name="toy")
        sizes = [(vocab - 1) ** length for length in range(horizon)]
        starts = [sum(sizes[:length]) for length in range(horizon + 1)]
        self.levels = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        self.prefixes: list[tuple[int, ...]] = [()]
        for level in self.levels[:-1]:
            self.prefixes += [(*prefix, token) for prefix in self.prefixes[level] for token in range(1, vocab)]
        count = len(self.prefixes)
        self.child = torch.full((count, vocab), -1)
        inner = starts[-2]
        self.child[:inner, 1:] = torch.arange(1, count).view(inner, vocab - 1)
        self.end_reward = torch.zeros(count, vocab, dtype=torch.float64)
        for row, token in (self.child < 0).nonzero().tolist():
            answer = self.prefixes[row] if token == EOS else (*self.prefixes[row], token)
            self.end_reward[row, token] = score(answer)
        self.states = self._states(list(prompt))
        self.base = self.logprobs(self.states)

    @torch.no_grad()
    def _states(self, prompt: list[int]) -> torch.Tensor:
        """One forward over the longest prefixes: a shorter one's state is read in the first row that begins with it."""
        longest = self.prefixes[self.levels[-1]]
        hidden = self.lm.backbone(torch.tensor([[*prompt, *prefix] for prefix in longest])).last_hidden_state
        strides = [(self.vocab - 1) ** (self.horizon - 1 - length) for length in range(self.horizon)]
        return torch.cat([hidden[::stride, len(prompt) - 1 + length] for length, stride in enumerate(strides)])

    @property
    def unembedding(self) -> torch.Tensor:
        """W [V, D] float64."""
        return self.lm.unembedding.double()

    def logprobs(self, states: torch.Tensor) -> torch.Tensor:
        """The next-token distribution of (edited) states [N, D] -> [N, V]."""
        return (states.detach().double() @ self.unembedding.T).log_softmax(-1)

    # exact expectations

    def visits(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Probability that a policy's answer passes through each prefix, [N]."""
        out = torch.zeros(len(logprobs), dtype=torch.float64)
        out[0] = 1
        steps = logprobs.double().exp()
        for level in self.levels[:-1]:
            out[self.child[level, 1:].flatten()] = (out[level, None] * steps[level, 1:]).flatten()
        return out

    def evaluate(self, logprobs: torch.Tensor) -> Outcome:
        """Expected reward, KL and length of a policy [N, V]."""
        p, visits = logprobs.double().exp(), self.visits(logprobs)
        kl = (torch.where(p > 0, p * (logprobs.double() - self.base), 0)).sum(-1)
        return Outcome(
            reward=float((visits[:, None] * p * self.end_reward).sum()),
            kl=float((visits * kl).sum()),
            tokens=float(visits.sum()),
        )

    def backup(self, aggregate: Callable[[slice, torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Q [N, V] and V [N] from the last token backwards; aggregate(rows, Q [n, V]) -> V [n]."""
        q, v = self.end_reward.clone(), torch.zeros(len(self.end_reward), dtype=torch.float64)
        for level in reversed(self.levels):
            child = self.child[level]
            q[level] += torch.where(child >= 0, v[child], 0)
            v[level] = aggregate(level, q[level])
        return q, v

    def values(self, logprobs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Q [N, V] and V [N] of a policy (default: the base): expected reward of its answer from there on."""
        p = (self.base if logprobs is None else logprobs.double()).exp()
        return self.backup(lambda level, q: (p[level] * q).sum(-1))

    # reference policies

    def soft_optimal(self, lam: float) -> torch.Tensor:
        """The policy [N, V] that maximises E[r] - KL / lam: no policy has more reward at its KL."""
        q, _ = self.backup(lambda level, q: torch.logsumexp(self.base[level] + lam * q, -1) / lam)
        return (self.base + lam * q).log_softmax(-1)

    def controlled_decoding(self, lam: float) -> torch.Tensor:
        """Token-wise p exp(lam Q) with the exact Q of the base [N, V]."""
        return (self.base + lam * self.values()[0]).log_softmax(-1)

    def most_reward(self, kl: float) -> float:
        """The exact frontier: the most expected reward at a KL of whole answers in nats (bisection on lam, 1e-6)."""
        low, high = 1e-6, 1e3
        for _ in range(60):
            middle = (low * high) ** 0.5
            found = self.evaluate(self.soft_optimal(middle))
            low, high = (middle, high) if found.kl < kl else (low, middle)
        return found.reward

    def share_of_optimum(self, outcome: Outcome) -> float:
        """Gain over the base as a share of the largest gain at the same KL; at most 1."""
        start = self.evaluate(self.base).reward
        return (outcome.reward - start) / (self.most_reward(outcome.kl) - start)

    # answers

    @cached_property
    def answers(self) -> list[list[int]]:
        """Every answer's tokens, the end token included; in order of length."""
        rows, last = self._ends
        return [[*self.prefixes[row], token] for row, token in zip(rows.tolist(), last.tolist(), strict=True)]

    @cached_property
    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last prefix [A] and the last token [A] of every answer."""
        rows, last = (self.child < 0).nonzero().T
        return rows, last

    @cached_property
    def _paths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of every answer the prefix each token is drawn at [A, horizon], the tokens [A, horizon], the length [A]."""
        lengths = torch.tensor([len(answer) for answer in self.answers])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in self.answers], batch_first=True)
        rows = torch.zeros_like(tokens)
        for step in range(1, self.horizon):
            rows[:, step] = self.child[rows[:, step - 1], tokens[:, step - 1]].clamp(min=0)
        return rows, tokens, lengths

    def answer_probabilities(self, logprobs: torch.Tensor | None = None) -> torch.Tensor:
        """Probability of every answer under a policy (default: the base), [A] float64."""
        policy = self.base if logprobs is None else logprobs.double()
        rows, last = self._ends
        return self.visits(policy)[rows] * policy[rows, last].exp()

    def rollouts_of(
        self, answers: torch.Tensor, states: torch.Tensor | None = None, logprobs: torch.Tensor | None = None
    ) -> Rollouts:
        """`Rollouts` of the given answers ([n] numbers into `answers`).

        states [N, any]: other features of a prefix, such as `torch.eye(N)`. logprobs: the policy that drew them.
        """
        features = self.states if states is None else states
        p = (self.base if logprobs is None else logprobs.double()).exp()
        score_of = self.unembedding[None] - (p @ self.unembedding)[:, None]  # [N, V, D]
        paths, tokens, lengths = (column[answers] for column in self._paths)
        real = torch.arange(self.horizon) < lengths[:, None]
        rows, drawn = paths[real], tokens[real]
        last_rows, last_tokens = (column[answers] for column in self._ends)
        return Rollouts(
            states=features[rows],
            scores=score_of[rows, drawn].float(),
            lengths=lengths,
            rewards=self.end_reward[last_rows, last_tokens].float(),
            prompt_index=torch.zeros(len(lengths), dtype=torch.long),
            ended=last_tokens == EOS,
            tokens=[self.answers[number] for number in answers.tolist()],
        )

    def rollouts(self, count: int, seed: int = 0, logprobs: torch.Tensor | None = None) -> Rollouts:
        """Independent samples of a policy (default: the base), without running the model."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.answer_probabilities(logprobs), count, True, generator=generator)
        return self.rollouts_of(drawn, logprobs=logprobs)


def toy_lm(vocab: int = 6, hidden_size: int = 16, seed: int = 0, spread: float = 0.35) -> LM:
    """The model alone: words are the token numbers, "0" ends an answer and is the pad."""
    raw = Tokenizer(models.WordLevel({str(token): token for token in range(vocab)}, unk_token="1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="0", pad_token="0", padding_side="left")
    config = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, dtype="float32",
        eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return LM(model, tokenizer, "toy")
