"""QAlign as a policy: what it costs to the token, what it keeps, resumes, chooses, and refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from oracles.toy import Toy
from tiny import byte_tokenizer, tiny_lm, tiny_tokenizer
from trimtab import LM, Completions, Cost, Sampling, pocket
from trimtab.decode.args import Args
from trimtab.decode.chains import Chain, Chains, State
from trimtab.decode.metropolis import Walk
from trimtab.decode.qalign import PoorMixing, QAlign, beta_for
from trimtab.decode.rows import can_take, take
from trimtab.errors import UsageError
from trimtab.guided import Guided
from trimtab.parts import Parts, make
from trimtab.rewards.prefix import CachedScorer, TextScorer, UnfinishedText
from trimtab.stepping import answer_steps

PROMPTS = ["ba da fa la", "ma na", "pe"]
PLAIN = Sampling(max_new_tokens=12)


def vowels(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [float(text.count("a") - text.count("u")) for text in texts]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


class Sharper(Guided):
    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return 2 * logits


class Stateful(Sharper):
    """The same with state of its own, which `take` cannot know."""

    def reindex(self, rows: Sequence[int]) -> None:
        pass


class Certain(Guided):
    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)


class Over:
    """The policy of sessions of a class over the model's own."""

    name = "over"

    def __init__(self, lm: LM, session: type[Guided]):
        self.lm, self.session = lm, session

    def open(self, prompts: Sequence[Any], sampling: Sampling, meter: Cost) -> Guided:
        return self.session(self.lm.open(prompts, sampling, meter), prompts)

    def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
        return answer_steps(self, prompts, sampling)


def walked(method: QAlign, prompts: Sequence[Any], sampling: Sampling, steps: int) -> Chains:
    return method.run(method.start(prompts, sampling), steps)


def same(one: Chain, other: Chain) -> bool:
    """Paths and tokens: what batching may change is the last bits of log-probabilities."""
    tokens = [[state.tokens for state in chain.visited] for chain in (one, other)]
    return one.path == other.path and one.fresh == other.fresh and tokens[0] == tokens[1]


# what is forwarded, and what is not


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Filled with (cut, tokens of the proposal, tokens of the state) of every proposal that is made from here on."""
    made: list[tuple[int, int, int]] = []
    original = Walk.propose

    def propose(self: Walk) -> tuple[list[State], torch.Tensor]:
        old = [len(chain.state.tokens) for chain in self.chains]
        proposed, cut = original(self)
        made.extend(zip(cut.tolist(), (len(state.tokens) for state in proposed), old, strict=True))
        return proposed, cut

    monkeypatch.setattr(Walk, "propose", propose)
    return made


def test_a_step_forwards_the_new_suffix_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the token; no more than 0.6 of a full answer a step, whatever is accepted. A last token is never forwarded."""
    lm, made = tiny_lm(), recorded(monkeypatch)
    for beta in (1e-3, 0.3, 1e6):
        made.clear()
        method = QAlign(lm, lambda prompts, texts: [float(text.count("a")) for text in texts], beta=beta)
        chains = method.start(PROMPTS, Sampling(max_new_tokens=24, samples=8, seed=1))
        method.run(chains, 10)
        first = sum(len(chain.visited[0].tokens) - 1 for chain in chains.chains)
        prompts = sum(map(len, lm.encode(PROMPTS)))
        suffixes = sum(new - 1 - cut for cut, new, _ in made)
        assert len(made) == 24 * 10
        assert chains.cost.tokens == {"tiny": prompts + first + suffixes}
        answers = sum(len(state.tokens) - 1 for chain in chains.chains for state in chain.draws) / (24 * 11)
        assert suffixes / len(made) <= 0.6 * answers
    calls = chains.fresh + 24
    assert chains.cost.reward_calls == calls < 24 * 11


def test_on_the_toy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, made = Toy(), recorded(monkeypatch)
    chains = walked(QAlign(toy.lm, toy.reward, beta=0.7), [toy.prompt], toy.sampling.but(samples=64, seed=3), 30)
    prompt = len(toy.lm.encode([toy.prompt])[0])
    first = sum(len(chain.visited[0].tokens) - 1 for chain in chains.chains)
    assert chains.cost.tokens == {"toy": prompt + first + sum(new - 1 - cut for cut, new, _ in made)}
    full = sum(len(state.tokens) - 1 for chain in chains.chains for state in chain.draws) / (64 * 31)
    assert sum(new - 1 - cut for cut, new, _ in made) / len(made) <= 0.6 * full


def test_where_rows_cannot_be_taken_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()

    def run(session: type[Guided]) -> Chains:
        method = QAlign(Over(lm, session), lambda prompts, texts: [float(len(text)) for text in texts], beta=4.0)
        return method.run(method.start(PROMPTS, Sampling(max_new_tokens=16, samples=4, seed=7)), 20)

    kept, again = run(Sharper), run(Stateful)
    assert [chain.path for chain in kept.chains] == [chain.path for chain in again.chains]
    assert [[s.tokens for s in chain.visited] for chain in kept.chains] == [
        [s.tokens for s in chain.visited] for chain in again.chains
    ]
    assert kept.cost.tokens_forwarded < again.cost.tokens_forwarded < 1.6 * kept.cost.tokens_forwarded


def test_taken_rows_are_what_a_fresh_prefill_is() -> None:
    """Longer and shorter than what they replace, from sessions that dropped rows: logits to 1e-5 (other shapes of sums)."""
    lm = tiny_lm("gemma2")
    start = lm.encode(["ba da fa la", "ma", "pe ba"])
    session = lm.session(start)
    session.append([[10, 11], [12], [13, 14, 15]])
    branch = session.fork([0, 1, 2])
    branch.rewind([3, 2, 4])
    branch.append([[20, 21, 22, 23, 24, 25], [], [26]])
    branch.drop([2])
    assert can_take(session)
    before = session.tokens
    take(session, [1, 2], branch, [0, 1])
    assert session.tokens == [before[0], branch.tokens[0], branch.tokens[1]]
    assert session.lengths.tolist() == list(map(len, session.tokens))
    for _ in range(2):  # now, and after more tokens
        fresh = lm.session(session.tokens)
        assert torch.allclose(session.logits, fresh.logits, atol=1e-5)
        session.append([[30], [31, 32], []])
    session.rewind(session.lengths - 1)
    assert torch.allclose(session.logits, lm.session(session.tokens).logits, atol=1e-5)


@pytest.mark.parametrize("cache", [True, False])
def test_taken_rows_bring_their_companions(cache: bool) -> None:
    """A reward-guided session: the reward model's own cache, or the text it reads, comes along."""
    lm = LM.load("pocket/base")
    with pytest.warns(UnfinishedText):
        args = Args(lm, "pocket/reward", select="sample", cache=cache)
    prompts, sampling = pocket.prompts("test", 2, seed=0), Sampling(max_new_tokens=8)
    session, fresh = (args.open(prompts, sampling, Cost()) for _ in range(2))
    assert type(session.companions["scorer"]) is (CachedScorer if cache else TextScorer) and can_take(session)
    branch = session.fork([0, 1])
    branch.append([[10, 11], [12]])
    unmoved = session.logits
    take(session, [1], branch, [1])
    fresh.append([[], [12]])
    assert torch.allclose(session.logits, fresh.logits, atol=1e-4) and not torch.equal(unmoved, session.logits)
    session.rewind(session.lengths - torch.tensor([0, 1]))
    assert torch.allclose(session.logits, unmoved, atol=1e-4)


# chains are each other's strangers


def test_a_batch_of_chains_is_its_chains_one_by_one(lm: LM) -> None:
    """Also in batches of 5 rows: a chain's stream is named by seed, prompt, chain and step."""
    sampling = PLAIN.but(samples=2, seed=3)
    method, small = (QAlign(one, vowels, beta=0.5, chains=2) for one in (lm, tiny_lm(batch_rows=5)))
    together, apart = (walked(one, PROMPTS, sampling, 12) for one in (method, small))
    for number, chain in enumerate(together.chains):
        alone = method.start(PROMPTS, sampling)
        alone.chains = [Chain(chain.prompt, chain.number)]
        assert same(chain, method.run(alone, 12).chains[0]) and same(chain, apart.chains[number])
    assert len({tuple(chain.state.tokens) for chain in together.chains}) == 12


def test_t_steps_and_then_more_are_all_of_them(lm: LM, tmp_path: Path) -> None:
    """Also through a file: there the caches are gone and what the next cuts keep is forwarded again."""
    method, sampling = QAlign(lm, vowels, beta=0.5), PLAIN.but(samples=3, seed=6)
    whole = walked(method, PROMPTS, sampling, 20)
    halves = walked(method, PROMPTS, sampling, 8)
    halves.save(tmp_path / "chains.json")
    halves = Chains.load(tmp_path / "chains.json")
    method.run(halves, 12)
    assert all(map(same, whole.chains, halves.chains))
    assert whole.cost.reward_calls == halves.cost.reward_calls
    assert whole.cost.tokens_forwarded < halves.cost.tokens_forwarded
    done, again = method.choose(whole), method.choose(halves)
    assert done.tokens == again.tokens and done.texts == again.texts
    assert done.tokens == QAlign(lm, vowels, beta=0.5, steps=20).generate(PROMPTS, sampling).tokens
    assert walked(method, PROMPTS, sampling.but(seed=7), 20).chains[0].state != whole.chains[0].state


def test_chains_go_on_with_what_they_were_begun_with(lm: LM) -> None:
    chains = walked(QAlign(lm, vowels, beta=0.5), PROMPTS, PLAIN, 2)
    with pytest.raises(UsageError, match="begun with tiny, vowels and target posterior.*this is tiny, length"):
        QAlign(lm, "length:target=3", beta=0.5).run(chains, 2)
    with pytest.raises(UsageError, match="target quest"):
        QAlign(lm, vowels, beta=0.5, target="quest").run(chains, 2)
    with pytest.raises(UsageError, match="have drawn nothing yet"):
        QAlign(lm, vowels, beta=0.5).choose(QAlign(lm, vowels, beta=0.5).start(PROMPTS))


# what it gives


def made(*answers: tuple[str, float, int]) -> Chain:
    """A chain that held each (text, reward) for so many draws; the tokens are the letters'."""
    chain = Chain(0, 0)
    for text, reward, times in answers:
        state = State(list(map(ord, text)), [-0.5] * len(text), True, text, reward)
        for repeat in range(times):
            chain.stand(state, repeat == 0)
    return chain


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"select": "vote"}, "xyz"),  # held longest
        ({"select": "mbr"}, "abc"),  # shares most letters with all, each as often as it was held
        ({"select": "best"}, "zzz"),
        ({"select": "last"}, "abd"),
        ({"select": "vote", "burn_in": 4}, "abc"),
        ({"select": "vote", "burn_in": 99}, "abd"),  # the last one is always left
        ({"select": "vote", "thin": 3}, "zzz"),  # draws 0, 3, 6, 9 tie; the earliest of the tie wins
    ],
)
def test_the_choice_counts_repeats(lm: LM, options: dict[str, Any], text: str) -> None:
    chain = made(("zzz", 9.0, 1), ("xyz", 1.0, 4), ("abc", 2.0, 3), ("abd", 0.0, 3))
    chains = Chains("tiny", "vowels", ["x"], PLAIN, 0.5, "posterior", 1, [chain])
    method = QAlign(lm, vowels, beta=0.5, **options)
    assert method.choose(chains).texts == [text]


def test_a_vote_may_be_on_a_number_and_pools_chains(lm: LM) -> None:
    first, second = made(("= 12", 0.0, 1), ("it is 7", 0.0, 2)), made(("12, I think 12", 0.0, 2))
    chains = Chains("tiny", "vowels", ["x"], PLAIN, 0.5, "posterior", 2, [first, second])
    done = QAlign(lm, vowels, beta=0.5, select="vote", extract="number", chains=2).choose(chains)
    assert done.texts == ["= 12"] and done.telemetry[0]["rewards"] == [[0, 0, 0], [0, 0]]


def test_rows_are_prompts_times_samples(lm: LM) -> None:
    sampling = PLAIN.but(samples=2, seed=3)
    done = QAlign(lm, vowels, beta=0.5, steps=6, chains=2, select="last").generate(PROMPTS, sampling)
    assert done.prompts == [prompt for prompt in PROMPTS for _ in range(2)] and done.kl is None
    scores = vowels(done.prompts, done.texts)
    for row, told in enumerate(done.telemetry):
        assert [len(part) for part in told["rewards"]] == [7, 7] and told["rewards"][0][-1] == scores[row]
        assert set(told) == {"beta", "kl_bound", "acceptance", "rewards", "unique", "r_hat", "effective_size"}
        flat = [one for part in told["rewards"] for one in part]
        first = sum(part[0] for part in told["rewards"]) / 2
        assert told["kl_bound"] == pytest.approx((sum(flat) / 14 - first) / 0.5, abs=1e-9)
        own = lm.score([done.prompts[row]], [done.tokens[row]])[0]
        assert torch.allclose(own, torch.tensor(done.logprobs[row]), atol=1e-5)
    assert done.texts == [lm.decode(tokens) for tokens in done.tokens] and done.cost.seconds > 0


def test_strength_is_one_over_beta_and_0_is_the_policy(lm: LM) -> None:
    sampling = PLAIN.but(samples=2, seed=4)
    plain = lm.generate(PROMPTS, sampling)

    def never(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        raise RuntimeError("called")

    for options in ({"strength": 0.0}, {"steps": 0}):
        done = QAlign(lm, never, **options).generate(PROMPTS, sampling)
        assert (done.tokens, done.logprobs, done.cost.tokens) == (plain.tokens, plain.logprobs, plain.cost.tokens)
    one = QAlign(lm, vowels, strength=4.0, steps=5).generate(PROMPTS, sampling)
    assert one.tokens == QAlign(lm, vowels, beta=0.25, steps=5).generate(PROMPTS, sampling).tokens
    assert QAlign(lm, vowels).generate([], sampling).texts == []


def test_stop_strings_end_answers_as_they_end_the_models(lm: LM) -> None:
    """Every state ends where its first stop string is complete, also where that lies across a cut."""
    stop = "a d"
    chains = walked(QAlign(lm, vowels, beta=1.0), PROMPTS, Sampling(max_new_tokens=24, stop=(stop,), samples=6), 20)
    ended = 0
    for chain in chains.chains:
        for state in chain.visited:
            assert stop not in lm.decode(state.tokens[:-1]) and stop not in state.text
            ended += stop in lm.decode(state.tokens)
    assert ended > 20


def test_text_that_would_be_tokenized_otherwise_changes_nothing() -> None:
    """Ids are kept: in random answers of a byte-level model many pieces would be merged when read again."""
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    method = QAlign(lm, lambda prompts, texts: [float(len(text)) for text in texts], beta=2.0)
    chains = walked(method, ["ba mo", "tu"], Sampling(max_new_tokens=30, samples=16, seed=1), 10)
    otherwise = 0
    for chain in chains.chains:
        for before, after in zip(chain.visited, chain.visited[1:], strict=False):
            shared = next((at for at, (a, b) in enumerate(zip(before.tokens, after.tokens, strict=False)) if a != b), 0)
            assert before.logprobs[:shared] == after.logprobs[:shared] or shared == 0
        again = lm.tokenizer(chain.state.text, add_special_tokens=False)["input_ids"]
        otherwise += again != [token for token in chain.state.tokens if token not in lm.eos_ids]
    assert otherwise > 5
    assert byte_tokenizer().get_vocab_size() == 264


# beta


def test_beta_is_where_two_states_accept_a_third() -> None:
    """One jump d: 1 - tanh(d / (2 beta)) = 0.35 at beta = d / (2 atanh(0.65)). Scale: as the jumps. No jump: 1."""
    assert beta_for(torch.tensor([3.0, 0.0])) == pytest.approx(3 / (2 * math.atanh(0.65)), rel=1e-9)
    jumps = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert beta_for(100 * jumps) == pytest.approx(100 * beta_for(jumps), rel=1e-6)
    assert beta_for(jumps, 0.2) < beta_for(jumps, 0.5)
    assert beta_for(torch.zeros(4)) == 1.0 == beta_for(torch.zeros(0))


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_chosen_beta_accepts_a_fifth_to_a_half(scale: float, seed: int) -> None:
    toy = Toy(lambda tokens: scale * (tokens.count(3) - 0.5 * tokens.count(4)), seed=seed)
    method = QAlign(toy.lm, toy.reward)
    chains = walked(method, [toy.prompt], toy.sampling.but(samples=64, seed=seed), 25)
    before = chains.fresh, chains.moves
    method.run(chains, 15)
    assert 0.2 <= (chains.moves - before[1]) / (chains.fresh - before[0]) <= 0.5
    assert chains.cost.reward_calls == chains.fresh + 64 + 32 + sum(  # the pilot asks 32 answers and what differs
        [method.choose_beta([toy.prompt], toy.sampling.but(seed=seed))[1].reward_calls - 32]
    )


def test_the_command_line_chooses_beta_once(lm: LM) -> None:
    kept: dict[str, Any] = {}

    def store(key: str, fit: Any, save: Any, load: Any) -> Any:
        if key not in kept:
            kept[key] = fit()
        return kept[key]

    def parts() -> Parts:
        return Parts(lm, lm, vowels, PROMPTS, PLAIN, lambda path: lm, lambda count: None, store)  # type: ignore

    one, two = parts(), parts()
    first, second = make(QAlign, one, QAlign.Config()), make(QAlign, two, QAlign.Config(steps=64))
    assert first.beta == second.beta == QAlign(lm, vowels).choose_beta(PROMPTS, PLAIN)[0]
    assert one.cost.tokens_forwarded == two.cost.tokens_forwarded > 0 and one.cost.reward_calls >= 32
    given = parts()
    assert make(QAlign, given, QAlign.Config(beta=0.3)).beta == 0.3 and given.cost.tokens_forwarded == 0
    assert make(QAlign, given, QAlign.Config(strength=0.0)).beta is None


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number above 0 .small is strong., not 0.0"),
        ({"beta": -1.0}, "not -1.0"),
        ({"beta": math.inf}, "not inf"),
        ({"beta": math.nan}, "not nan"),
        ({"strength": -0.1}, "strength must be a finite number of 0 or more, not -0.1"),
        ({"beta": 1.0, "strength": 1.0}, "strength is 1 / beta: give one of them"),
        ({"steps": -1}, "steps and burn_in must be 0 or more, not -1 and 0"),
        ({"chains": 0}, "chains and thin must be 1 or more, not 0 and 1"),
        ({"thin": 0}, "not 1 and 0"),
        ({"select": "vote", "extract": "("}, "is not a regular expression"),
    ],
)
def test_options_that_cannot_be(lm: LM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QAlign(lm, vowels, **options)


@pytest.mark.parametrize("still", [{"temperature": 0.0}, {"top_k": 1}])
def test_a_sampler_that_never_moves_is_refused(lm: LM, still: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a proposal never differs; give a temperature above 0"):
        QAlign(lm, vowels, beta=1.0).generate(PROMPTS, PLAIN.but(**still))
    with pytest.raises(UsageError, match="a proposal never differs"):
        QAlign(lm, vowels).choose_beta(PROMPTS, PLAIN.but(**still))


def test_empty_answers_are_refused(lm: LM) -> None:
    with pytest.raises(UsageError, match="max_new_tokens=0 leaves nothing to cut"):
        QAlign(lm, vowels, beta=1.0).generate(PROMPTS, PLAIN.but(max_new_tokens=0))
    assert lm.context_length is not None
    with pytest.raises(UsageError, match="prompt 1 fills the context"):
        QAlign(lm, vowels, beta=1.0).generate(["ba", "ba " * lm.context_length], PLAIN)
    nearly = QAlign(lm, vowels, beta=1.0, steps=5).generate(["ba " * (lm.context_length - 2)], PLAIN)
    assert 1 <= len(nearly.tokens[0]) <= 2


def test_an_answer_that_is_only_its_end_has_one_token() -> None:
    toy = Toy(vocab=3, horizon=4)
    chains = walked(QAlign(toy.lm, toy.reward, beta=1.0), [toy.prompt], toy.sampling.but(samples=16), 5)
    ends = [state for chain in chains.chains for state in chain.visited if state.tokens == [0]]
    assert ends and all((state.text, state.stopped, state.reward) == ("", True, 0.0) for state in ends)


def test_whole_answers_are_not_enough() -> None:
    class Remote:
        name = "remote"

        def generate(self, prompts: Sequence[Any], sampling: Sampling = PLAIN) -> Completions:
            raise RuntimeError("called")

    with pytest.raises(UsageError, match="qalign chooses token by token and remote gives whole answers only"):
        QAlign(Remote(), vowels)


def test_chains_that_hardly_move_are_warned_about(lm: LM) -> None:
    with pytest.warns(PoorMixing, match="no proposal differed from its answer"):
        QAlign(Over(lm, Certain), vowels, beta=1.0, steps=30).generate(PROMPTS, PLAIN)

    asked = iter(range(99))

    def first_is_best(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [9.0 - next(asked)] * len(texts)

    with pytest.warns(
        PoorMixing, match=r"0.0% of proposals were accepted, the chains hardly move: raise beta .now 0.01"
    ):
        QAlign(lm, first_is_best, beta=0.01, steps=60).generate(PROMPTS, PLAIN)
    with pytest.warns(PoorMixing, match="the reward hardly counts: lower beta"):
        QAlign(lm, vowels, beta=1e9, steps=60).generate(PROMPTS, PLAIN.but(max_new_tokens=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QAlign(lm, vowels, beta=1.0, steps=60).generate(PROMPTS, PLAIN)


def test_a_reward_that_raises_is_named(lm: LM) -> None:
    def broken(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [1 / 0 for _ in texts]

    with pytest.raises(UsageError, match="'broken' raised ZeroDivisionError"):
        QAlign(lm, broken, beta=1.0).generate(PROMPTS, PLAIN)
