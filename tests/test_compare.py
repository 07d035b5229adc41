"""`compare` from Python, and `run_compare` interrupted: tiny models, every row and every key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kill_harness import tree
from tiny import SPECIAL, WORDS, tiny_lm, tiny_tokenizer
from trimtab import LM, Sampling, Steered, compare
from trimtab.compare import CHUNK, TRACED, pieces, run_compare
from trimtab.control import FunctionControl
from trimtab.decode import BestOfN
from trimtab.divergence import divergences
from trimtab.errors import UsageError
from trimtab.run import RunDirectory
from trimtab.sampling import derive_seed
from trimtab.steer import StaticRE

PROMPTS = [f"{a} {b} {c}" for a, b, c in zip(WORDS, WORDS[20:], WORDS[40:], strict=False)]
PROMPTS += [f"{prompt} ba" for prompt in PROMPTS[:5]]
SAMPLING = Sampling(max_new_tokens=6, seed=4)
POLICY_KEYS = [
    *("name", "reward", "gold", "win_rate", "verdict", "kl_per_token", "kl_bound", "nll_base_per_token", "diversity"),
    *("coherence", "length_tokens", "cost", "settings"),
]
COST_KEYS = [
    *("tokens_forwarded_per_answer", "reward_calls_per_answer", "seconds_per_answer", "peak_memory_bytes"),
    *("fit_seconds", "fit_tokens"),
]
RESULT_KEYS = [
    "schema",
    "model",
    "reward",
    "gold",
    "prompts",
    "samples",
    "seed",
    "policies",
    "side_effects",
    "environment",
]
ROW_KEYS = [
    *("policy", "prompt_index", "sample", "prompt", "family", "text", "reward", "gold", "kl", "nll_base"),
    *("entropy", "unrepeated", "refuses", "length", "finish", "trace"),
]
# Figures that are times or memory.
MEASURED = ("seconds_per_answer", "fit_seconds", "peak_memory_bytes")


def variety(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [len(set(text.split())) + 0.1 * text.count("a") for text in texts]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


def still() -> FunctionControl:
    return FunctionControl(lambda hidden: hidden, "still")


def push(size: float = 1.0) -> FunctionControl:
    vector = size * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return FunctionControl(lambda hidden: hidden + vector, f"push {size:g}")


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what a clock or the memory measured."""
    for policy in result["policies"]:
        policy["cost"] = {key: value for key, value in policy["cost"].items() if key not in MEASURED}
    for one in result["side_effects"]["comparisons"]:
        one["changes"] = [change for change in one["changes"] if change["label"] != "seconds per answer"]
    return result


# from Python


@pytest.fixture(scope="module")
def result(lm: LM) -> dict[str, Any]:
    policies = [lm, Steered(lm, push()), BestOfN(lm, variety, 4), Steered(lm, still())]
    return compare(policies, PROMPTS, variety, gold="keyword:words=ba|da|fa|la|ma|na|ra|sa|ta", sampling=SAMPLING)


def test_the_keys_are_those_promised(result: dict[str, Any]) -> None:
    assert list(result) == RESULT_KEYS
    assert [list(policy) for policy in result["policies"]] == [POLICY_KEYS] * 4
    assert [list(policy["cost"]) for policy in result["policies"]] == [COST_KEYS] * 4
    json.dumps(result, allow_nan=False)
    expected = [1, "tiny", "variety", "keyword:words=ba|da|fa|la|ma|na|ra|sa|ta", len(PROMPTS), 1, 4]
    assert [result[key] for key in RESULT_KEYS[:-3]] == expected
    assert [policy["name"] for policy in result["policies"]] == ["base", "push 1", "best-of-4", "still"]


def test_the_figures_are_those_of_the_answers(lm: LM, result: dict[str, Any]) -> None:
    """Rewards, lengths, KL, NLL and cost again, from answers drawn chunk by chunk as the table's were."""
    drawn: dict[str, list[Any]] = {"push 1": [], "best-of-4": []}
    steered, best = Steered(lm, push()), BestOfN(lm, variety, 4)
    for first in range(0, len(PROMPTS), CHUNK):
        sampling = SAMPLING.but(seed=derive_seed(SAMPLING.seed, "answers", first // CHUNK))
        drawn["push 1"].append(steered.generate(PROMPTS[first : first + CHUNK], sampling))
        drawn["best-of-4"].append(best.generate(PROMPTS[first : first + CHUNK], sampling))
    for record in result["policies"][1:3]:
        parts = drawn[record["name"]]
        texts = [text for part in parts for text in part.texts]
        tokens = [row for part in parts for row in part.tokens]
        assert record["reward"]["mean"] == pytest.approx(sum(variety(PROMPTS, texts)) / len(texts))
        assert record["length_tokens"] == pytest.approx(sum(map(len, tokens)) / len(tokens))
        assert record["nll_base_per_token"] == pytest.approx(
            -float(torch.cat(lm.score(PROMPTS, tokens)).mean()), abs=1e-6
        )
        forwarded = sum(part.cost.tokens_forwarded for part in parts)
        assert record["cost"]["tokens_forwarded_per_answer"] == pytest.approx(forwarded / len(PROMPTS))
    found = [x for part in drawn["push 1"] for x in divergences(steered, lm, part.prompts, part.tokens, SAMPLING)]
    kl = float(torch.cat([one.kl for one in found]).mean())
    assert result["policies"][1]["kl_per_token"]["mean"] == pytest.approx(kl, abs=1e-6) and kl > 0.01


def test_best_of_n_is_better_and_has_only_a_bound(result: dict[str, Any]) -> None:
    base, _, best, _ = result["policies"]
    assert best["reward"]["low"] > base["reward"]["mean"] and best["kl_per_token"] is None
    assert best["kl_bound"] == pytest.approx((torch.tensor(4.0).log().item() - 3 / 4) / best["length_tokens"])
    assert best["cost"]["reward_calls_per_answer"] == 4 and base["cost"]["reward_calls_per_answer"] == 0
    assert best["settings"] == {"n": 4}


def test_two_identical_policies_are_undecided(result: dict[str, Any]) -> None:
    base, *_, same = result["policies"]
    assert same["verdict"] == "undecided" and same["win_rate"] == {"mean": 0.5, "low": None, "high": None}
    assert same["kl_per_token"] == {"mean": 0.0, "low": None, "high": None}
    assert [same[key] for key in ("reward", "gold", "diversity", "nll_base_per_token")] == [
        base[key] for key in ("reward", "gold", "diversity", "nll_base_per_token")
    ]


def test_the_same_seed_gives_the_same_table_and_another_seed_another(lm: LM) -> None:
    policies = [lm, Steered(lm, push())]
    one, two, three = (
        figures(compare(policies, PROMPTS[:6], variety, sampling=SAMPLING.but(seed=seed))) for seed in (1, 1, 2)
    )
    assert one == two and one["policies"] != three["policies"]


def test_the_verdict_is_by_gold_where_there_is_gold(lm: LM) -> None:
    """The policy gains on the reward, and its gold is the opposite."""

    def opposite(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        return [-score for score in variety(prompts, texts)]

    best = BestOfN(lm, variety, 8)
    verdicts = [compare([lm, best], PROMPTS, variety, gold=gold, sampling=SAMPLING)["policies"][1]["verdict"]
                for gold in (None, opposite)]  # fmt: skip
    assert verdicts == ["better", "worse"]


def test_scores_that_could_not_be_judged(lm: LM) -> None:
    def nothing(prompts: Sequence[Any], texts: Sequence[str]) -> list[None]:
        return [None] * len(texts)

    found = compare([lm, Steered(lm, push())], PROMPTS[:5], variety, gold=nothing, sampling=SAMPLING)["policies"]
    assert [policy["gold"]["mean"] for policy in found] == [None, None]
    assert (found[1]["verdict"], found[1]["win_rate"]["mean"]) == ("undecided", None)
    assert found[1]["reward"]["mean"] > 0
    without = compare([lm], PROMPTS[:5], variety, sampling=SAMPLING)
    assert without["gold"] is None and without["policies"][0]["gold"] is None


def test_one_prompt_has_no_intervals(lm: LM) -> None:
    found = compare([lm, BestOfN(lm, variety, 4)], PROMPTS[:1], variety, sampling=SAMPLING.but(samples=3))
    best = found["policies"][1]
    assert best["verdict"] == "undecided" and (best["reward"]["low"], best["reward"]["high"]) == (None, None)


def test_no_new_tokens_leave_nothing_to_measure(lm: LM) -> None:
    found = compare([lm, Steered(lm, push())], PROMPTS[:4], variety, sampling=Sampling(max_new_tokens=0))["policies"]
    for policy in found:
        assert (policy["length_tokens"], policy["nll_base_per_token"], policy["diversity"]) == (0.0, None, None)
    assert found[1]["kl_per_token"] is None and found[1]["verdict"] == "undecided"


# which policies


def test_a_bound_from_another_policy_is_no_bound_from_the_base(lm: LM) -> None:
    """The bound of best-of-n is on the KL from what it draws from; here that is itself far from the base."""
    found = compare([lm, BestOfN(Steered(lm, push()), variety, 2)], PROMPTS[:5], variety, sampling=SAMPLING)
    assert found["policies"][1]["kl_bound"] is None and found["policies"][1]["kl_per_token"] is None


@pytest.mark.parametrize("kind", ["another size", "the same size"])
@pytest.mark.parametrize("wrap", ["alone", "steered", "best-of-n"])
def test_another_tokenizer_is_judged_as_text_alone(lm: LM, kind: str, wrap: str) -> None:
    tokenizer = tiny_tokenizer("byte")
    if kind == "the same size":  # the same words under other numbers
        tokenizer = tiny_tokenizer()
        raw, turned = tokenizer.backend_tokenizer, dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))
        vocab = {turned.get(word, word): number for word, number in tokenizer.get_vocab().items()}
        raw.model = models.WordLevel(vocab, unk_token="<unk>")
    other = tiny_lm(tokenizer=tokenizer, name="other", seed=3)
    wraps = {"alone": other, "steered": Steered(other, push()), "best-of-n": BestOfN(other, variety, 2)}
    found = compare([lm, wraps[wrap]], PROMPTS[:5], variety, sampling=SAMPLING)["policies"][1]
    assert (found["kl_per_token"], found["kl_bound"], found["nll_base_per_token"]) == (None, None, None)
    assert found["reward"]["mean"] is not None and found["win_rate"] is not None


def test_a_fitted_control_is_shown_with_what_it_took(lm: LM) -> None:
    controller = StaticRE.fit(lm, PROMPTS, variety, sampling=SAMPLING, rollouts=64, strength=1.0)  # type: ignore[arg-type]
    steered = Steered(lm, controller)
    found = compare([lm, steered, BestOfN(steered, variety, 2)], PROMPTS[:4], variety, sampling=SAMPLING)["policies"]
    for policy in found[1:]:
        assert policy["cost"]["fit_tokens"] == controller.origin.fit_tokens > 0
        assert policy["cost"]["fit_seconds"] == controller.origin.fit_seconds > 0
    assert found[0]["cost"]["fit_tokens"] == 0
    assert found[1]["settings"]["strength"] == 1.0 and found[2]["settings"] == {"n": 2}


def test_the_base_may_be_given_and_is_measured_once(lm: LM) -> None:
    steered = Steered(lm, push())
    rows = [compare(policies, PROMPTS[:4], variety, base=lm, sampling=SAMPLING)["policies"]
            for policies in ([steered], [steered, lm])]  # fmt: skip
    assert [[policy["name"] for policy in found] for found in rows] == [["base", "push 1"]] * 2


def test_what_cannot_be_compared_is_refused(lm: LM) -> None:
    other = tiny_lm(seed=1, name="base")
    twice = [lm, Steered(lm, push()), Steered(lm, push())]
    for policies, message in (
        ([], "at least one policy"),
        ([Steered(lm, push())], "the first policy must be the base"),
        (twice, "different names"),
        ([lm, other], "different names"),  # a folder called base is not the base of this table
    ):
        with pytest.raises(UsageError, match=message):
            compare(policies, PROMPTS[:2], variety)
    with pytest.raises(UsageError, match="one prompt"):
        compare([lm], [], variety)
    with pytest.raises(UsageError, match="unknown reward 'lenght'"):
        compare([lm], PROMPTS[:2], "lenght:target=3")


# a run and its resumption

SPECS = ["best-of-n:n=2", "static-re:rollouts=64,strength=1", "static-re:rollouts=64,strength=3"]


def run(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options = {"gold": "keyword:words=ba", "max_new_tokens": 6, "samples": 2, "seed": 1, "coherence": False, **changes}
    words = "|".join(WORDS[::3])
    policies = options.pop("policies", SPECS)
    return run_compare(str(model), f"keyword:mode=count,words={words}", PROMPTS[:20], policies, out=out, **options)


@pytest.fixture(scope="module")
def model(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    run(model, out, sweep=True)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_every_answer_is_kept(finished: Path) -> None:
    rows = rows_of(finished)
    assert [(row["policy"], row["prompt_index"], row["sample"]) for row in rows] == [
        (name, prompt, sample) for name in ("base", *SPECS) for prompt in range(20) for sample in range(2)
    ]
    assert all(list(row) == ROW_KEYS and row["prompt"] == PROMPTS[row["prompt_index"]] for row in rows)
    of = {name: [row for row in rows if row["policy"] == name] for name in ("base", *SPECS)}
    assert {row["kl"] for row in of["base"]} == {0.0} and {row["kl"] for row in of[SPECS[0]]} == {None}
    assert all(row["kl"] > 0 for name in SPECS[1:] for row in of[name])
    assert all(row["nll_base"] > 0 and row["family"] is None for row in rows)


def test_the_first_answer_to_a_few_prompts_is_traced(finished: Path) -> None:
    rows = rows_of(finished)
    traced = [(row["policy"], row["prompt_index"], row["sample"]) for row in rows if row["trace"] is not None]
    assert traced == [(name, prompt, 0) for name in SPECS[1:] for prompt in range(TRACED)]
    for row in rows:
        if (trace := row["trace"]) is not None:
            strength = 1.0 if row["policy"] == SPECS[1] else 3.0
            assert list(trace) == ["pieces", "value_before", "value_after", "edit_norm", "kl"]
            assert "".join(trace["pieces"]) == row["text"] and len(trace["pieces"]) == row["length"]
            assert trace["edit_norm"] == pytest.approx([strength] * row["length"], abs=1e-4)
            assert sum(trace["kl"]) / row["length"] == pytest.approx(row["kl"], abs=1e-5)
            assert trace["value_before"] is None  # static-re has no value function


def test_the_sweep_goes_through_the_policy_itself(finished: Path) -> None:
    sweep = json.loads((finished / "sweep.json").read_text())
    (family,) = sweep["families"]  # one for both policies of the method
    points = family["policies"]
    assert family["family"] == "static-re"
    assert [point["strength_multiplier"] for point in points] == [0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
    assert [point["strength"] for point in points] == [0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
    kl = [point["kl_per_token"]["mean"] for point in points]
    assert kl == sorted(kl) and kl[0] > 0
    own = json.loads((finished / "compare.json").read_text())["policies"][2]
    assert points[2]["reward"] == own["reward"] and points[2]["kl_per_token"] == own["kl_per_token"]


def chunks(out: Path) -> list[Path]:
    return sorted((out / "chunks").glob("*.json"))


@pytest.mark.parametrize("keep_fits", [True, False])
def test_a_run_that_was_cut_short_ends_with_the_same_rows(
    model: Path, finished: Path, tmp_path: Path, keep_fits: bool
) -> None:
    """As a kill leaves it: no table, every other chunk missing; and, killed earlier still, the fits too."""
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    for path in (*chunks(out)[::2], *(out / name for name in ("compare.json", "samples.jsonl", "sweep.json"))):
        path.unlink()
    if not keep_fits:
        shutil.rmtree(out / "fits")
    result = run(model, out, sweep=True)
    assert (out / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert figures(result) == figures(json.loads((finished / "compare.json").read_text()))
    for one, two in zip(chunks(out), chunks(finished), strict=True):
        assert json.loads(one.read_text())["rows"] == json.loads(two.read_text())["rows"]


def test_a_finished_run_answers_nothing_again(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an answer was drawn")

    out = tmp_path / "again"
    shutil.copytree(finished, out)
    before = (out / "compare.json").read_bytes()
    monkeypatch.setattr(LM, "generate", never)
    run(model, out, sweep=True)
    assert (out / "compare.json").read_bytes() == before


def test_a_policy_does_not_depend_on_the_others(model: Path, finished: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "alone", policies=SPECS[2:])
    alone, all_rows = rows_of(tmp_path / "alone"), rows_of(finished)
    assert alone == [row for row in all_rows if row["policy"] in ("base", SPECS[2])]


def test_a_controller_changed_since_the_run_began_is_noticed(model: Path, finished: Path, tmp_path: Path) -> None:
    fits = {}
    for path in (finished / "fits").iterdir():
        fits[json.loads((path / "controller.json").read_text())["config"]["strength"]] = path
    shutil.copytree(fits[1.0], tmp_path / "mine")
    policies = [f"static-re:controller={tmp_path / 'mine'}"]
    run(model, tmp_path / "out", policies=policies)
    run(model, tmp_path / "out", policies=policies)
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(fits[3.0], tmp_path / "mine")
    with pytest.raises(UsageError, match="begun with other inputs"):
        run(model, tmp_path / "out", policies=policies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": [*SPECS, "model:path=./absent"]}, "there is no model folder"),
        ({"policies": [*SPECS, "base:n=1"]}, "unknown key of policy 'base'"),
        ({"policies": [*SPECS, "static-re:controller=absent"]}, "is not a controller"),
        ({"gold": "pocket/juge"}, "did you mean 'pocket/judge'"),
        ({"fit_prompts": ["ba", " "]}, "prompt 1 is empty"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(model, tmp_path / "out", **changes)
    assert not tree(tmp_path)


def test_a_folder_of_another_run_is_left_as_it_is(model: Path, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "out", "fit", {}):
        pass
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="holds a fit run"):
        run(model, tmp_path / "out")
    assert tree(tmp_path) == before


# what each token adds


def metaspace_lm() -> LM:
    """A tokenizer as sentencepiece's: a word's leading space is part of it, and lost where it is decoded alone."""
    words = [f"\u2581{word}" for word in WORDS[:-2]] + ["s", "t"]
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tiny_lm(tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>"))


def test_pieces_keep_their_spaces() -> None:
    lm = metaspace_lm()
    tokens = lm.tokenizer.convert_tokens_to_ids(["\u2581ba", "\u2581da", "s", "\u2581fo", "</s>"])
    assert lm.decode(tokens) == "ba das fo" and [lm.decode([token]) for token in tokens[:2]] == ["ba", "da"]
    assert pieces(lm, tokens) == ["ba", " da", "s", " fo", ""]


def test_half_a_character_goes_to_the_token_that_completes_it() -> None:
    lm = tiny_lm(tokenizer=tiny_tokenizer("byte"))
    tokens = lm.tokenizer("a\u00e9\u20ac!", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 7
    assert pieces(lm, tokens) == ["a", "", "\u00e9", "", "", "\u20ac", "!"]
    cut = tokens[:5]  # in the middle of the last character, as max_new_tokens may
    assert "".join(pieces(lm, cut)) == lm.decode(cut)
    assert pieces(lm, []) == [] and pieces(lm, tokens[:1]) == ["a"]
