"""`Follower`: a model that follows an answer somebody else writes, as text.

Models of different tokenizers meet at the text of the answer. A follower tokenizes it anew after its own form of the
prompt (its chat template), keeps the longest common prefix of tokens in its cache and forwards the rest, so following
costs about the tokens that were added.

    other = Follower(policy, prompts, sampling, meter)
    other.follow([" Sure, the", " It"])     # one text a row: the answers so far
    other.session.logits                    # what it would say next
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from trimtab.policy import Cost, Prompt
from trimtab.sampling import Sampling
from trimtab.stepping import Steppable


class Follower:
    """See the module. session: one row a prompt, at the text given last. starts [B]: tokens of each row's prompt."""

    def __init__(self, policy: Steppable, prompts: Sequence[Prompt], sampling: Sampling, meter: Cost):
        self.lm = policy.lm
        self.session: Any = policy.open(prompts, sampling, meter)
        self.starts = self.session.lengths.tolist()
        self.rendered = [self.lm.render(prompt) for prompt in prompts]

    def follow(self, texts: Sequence[str], rows: Sequence[int] | None = None) -> None:
        """Bring rows (default: all) to the given answers so far. The others stay where they are."""
        chosen = list(range(self.session.rows)) if rows is None else list(rows)
        tokens, lengths = self.session.tokens, self.session.lengths.clone()
        new: list[list[int]] = [[] for _ in tokens]
        for row, text in zip(chosen, texts, strict=True):
            start = self.starts[row]
            wanted = answer_tokens(self.lm, self.rendered[row], tokens[row][:start], text)
            held = tokens[row][start:]
            same = 0
            while same < min(len(wanted), len(held)) and wanted[same] == held[same]:
                same += 1
            lengths[row] = start + same
            new[row] = wanted[same:]
        prompts = self.session.prompts.clone()
        self.session.rewind(lengths)
        self.session.append(new)
        assert bool((prompts == self.session.prompts).all())  # an answer never reaches into the prompt

    def append(self, tokens: Any) -> None:
        """As a companion of the session that writes: nothing to do, the text is read when it is asked for."""

    def rewind(self, lengths: Any) -> None:
        """As `append`."""

    @property
    def lengths(self) -> Any:
        return self.session.lengths

    def fork(self, rows: Sequence[int]) -> Self:
        new = object.__new__(type(self))
        new.lm, new.session = self.lm, self.session.fork(rows)
        new.starts, new.rendered = [self.starts[row] for row in rows], [self.rendered[row] for row in rows]
        return new

    def drop(self, rows: Sequence[int]) -> list[int]:
        order: list[int] = self.session.drop(rows)
        self.starts, self.rendered = [self.starts[row] for row in order], [self.rendered[row] for row in order]
        return order


def answer_tokens(lm: Any, rendered: str, prompt: Sequence[int], text: str) -> list[int]:
    """The token ids of an answer's text after a prompt.

    Prompt and answer are tokenized together, as the model would read them; where a token would span both, the answer
    is tokenized alone, behind a line break so that a tokenizer that begins every text with a space does not do it here.
    """
    if not text:
        return []
    special = not getattr(lm.tokenizer, "chat_template", None)
    whole = list(lm.tokenizer(rendered + text, add_special_tokens=special)["input_ids"])
    if whole and special and whole[-1] in lm.eos_ids:
        whole = whole[:-1]
    if whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    lead = list(lm.tokenizer("\n", add_special_tokens=False)["input_ids"])
    alone = list(lm.tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    if alone[: len(lead)] == lead:
        return alone[len(lead) :]
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
