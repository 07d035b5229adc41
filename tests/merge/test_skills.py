"""What the skills became: likelihood of texts, the share of a gain that was kept, the table, and what is refused first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from merge_folders import two_tuned
from tiny import BOS, CONTEXT, WORDS, tiny_lm
from trimtab import LM
from trimtab.errors import UsageError
from trimtab.measure.diagnostic import paired_change
from trimtab.merge.engine import run
from trimtab.merge.recipe import Recipe
from trimtab.merge.skill_measures import text_nll
from trimtab.merge.skills import Skill, Subjects, evaluate, kept, measure_before, view
from trimtab.prompt.tuning import save


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a copy trained on each of two kinds of text."""
    return two_tuned(tmp_path_factory.mktemp("skills"))


def by_hand(lm: LM, text: str) -> float:
    """One prefix at a time, one forward each."""
    ids = [BOS, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    total = 0.0
    with torch.no_grad():
        for end in range(1, len(ids)):
            logits = lm.model(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[ids[end]])
    return total / len(text.encode())


def test_likelihood_of_texts_is_that_of_their_tokens_one_by_one() -> None:
    lm = tiny_lm(seed=3)
    texts = ["ba", "ba da fa ge", "me lo pu"]
    # 1e-5: float32 logits against double sums of the same, and rows padded to one length
    assert text_nll(lm, texts) == pytest.approx([by_hand(lm, text) for text in texts], rel=1e-5)


def test_a_text_longer_than_the_context_is_read_in_pieces() -> None:
    lm = tiny_lm(seed=3)
    words = (WORDS * 3)[: CONTEXT + 20]
    pieces = [" ".join(words[: CONTEXT - 1]), " ".join(words[CONTEXT - 1 :])]
    text = " ".join(words)
    sizes = [len(piece.encode()) for piece in pieces]
    expected = sum(by_hand(lm, piece) * size for piece, size in zip(pieces, sizes, strict=True)) / len(text.encode())
    assert text_nll(lm, [text])[0] == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_token_has_no_likelihood_without_a_beginning_of_sequence_token() -> None:
    lm = tiny_lm()
    lm.tokenizer.bos_token = None
    alone, pair = text_nll(lm, ["ba", "ba da"])
    assert alone is None and pair is not None


def test_the_share_kept_of_exact_mixtures_is_exact() -> None:
    rng = np.random.default_rng(0)
    base, gain = rng.normal(size=50), 1 + 0.3 * rng.normal(size=50)
    for share in (-0.5, 0.0, 0.5, 1.0, 1.7):
        found = kept(base + share * gain, base + gain, base)
        assert found is not None
        # 1e-6: the root of Fieller's quadratic is of a difference that is 0 up to rounding
        assert [found[key] for key in ("share", "low", "high")] == pytest.approx([share] * 3, abs=1e-6)


def test_the_share_kept_has_no_interval_where_the_parent_gained_nothing_clear() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=30)
    noise = kept(base + rng.normal(size=30), base + rng.normal(size=30), base)
    assert noise is not None and noise["low"] is None and noise["high"] is None
    assert kept(base + 1, base, base) is None
    assert kept([np.nan], [np.nan], [np.nan]) is None


def test_the_interval_of_the_share_kept_covers_it() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        base, parent = rng.normal(size=(2, 40))
        merge = base + 0.6 + 0.5 * (parent - base) + rng.normal(size=40)
        found = kept(merge, parent + 1.2, base)
        assert found is not None and found["low"] is not None and found["high"] is not None
        inside += found["low"] <= 0.5 <= found["high"]
    assert 0.92 < inside / 400 < 0.98  # 95 %, give or take three standard errors of 400 trials


def test_the_table_is_what_was_measured_pair_by_pair(models: Path, tmp_path: Path) -> None:
    parents = [str(models / "b"), str(models / "d")]
    base = str(models / "base")
    run(Recipe("linear", tuple(parents), base), tmp_path / "merged")
    skills = [Skill.parse(f"nll:texts={models / name}.txt") for name in "bd"]
    subjects = Subjects.of([*parents, parents[0]], base)
    measure_before(skills, subjects)
    found = evaluate(skills, subjects, tmp_path / "merged")
    assert [line["specialist"] for line in found["lines"]] == parents
    merged = LM.load(tmp_path / "merged")
    for number, line in enumerate(found["lines"]):
        names = [row["name"] for row in line["models"]]
        assert names == ["merge", *parents, base] and line["better"] == "lower" and line["n"] == 16
        texts = (models / f"{'bd'[number]}.txt").read_text().splitlines()
        means = [np.mean(text_nll(lm, texts)) for lm in (merged, *map(LM.load, [*parents, base]))]
        rows = line["models"]
        assert [row["value"] for row in rows] == pytest.approx(means)
        assert [row["difference"] for row in rows[1:]] == pytest.approx([means[0] - mean for mean in means[1:]])
        specialist = rows[1 + number]
        assert rows[3]["verdict"] == "better" and specialist["verdict"] == "worse"
        assert specialist["kept"]["share"] == pytest.approx((means[0] - means[3]) / (means[1 + number] - means[3]))
        assert specialist["kept"]["low"] < specialist["kept"]["share"] < specialist["kept"]["high"] < 1
        assert all(row["low"] < row["value"] < row["high"] for row in rows)


def test_differences_are_those_of_trimtab_measure(models: Path, tmp_path: Path) -> None:
    spec = f"refusal:texts={models / 'b.txt'}|{models / 'd.txt'},max_new_tokens=4,samples=2"
    skill = Skill.parse(spec)
    one, two = (skill.measure(str(models / name)) for name in "bd")
    assert skill.lines(one) == ["refusal", "over-refusal"]
    found = evaluate([skill], Subjects.of([str(models / "d")], None), models / "b")
    row = found["lines"][0]["models"][1]
    change = paired_change(one, two, "refusal")
    assert (row["difference"], row["verdict"]) == (change.difference, change.verdict)
    assert found["lines"][0]["specialist"] is None and row["gain"] is None  # without a base nothing is gained


def test_a_reward_as_a_skill(models: Path) -> None:
    skill = Skill.parse(
        f"reward:texts={models / 'b.txt'},reward=length:target=3\\,unit=words,samples=2,max_new_tokens=6"
    )
    found = skill.measure(str(models / "b"))
    assert found.row("reward").n == 16 and found.row("reward").better == "higher"


def test_measured_again_from_the_cache_whatever_lies_beside_the_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("linear", (str(models / "b"), str(models / "d")))
    run(recipe, tmp_path / "merged")
    spec, subjects = f"nll:texts={models / 'b.txt'}", Subjects.of(recipe.models, None)
    first = evaluate([Skill.parse(spec)], subjects, tmp_path / "merged")
    (tmp_path / "merged" / "skills.json").write_text("{}")
    run(recipe, tmp_path / "merged")  # the log grows
    monkeypatch.setattr(LM, "load", None)
    assert evaluate([Skill.parse(spec)], subjects, tmp_path / "merged") == first
    with view(tmp_path / "merged") as path:
        assert {one.name for one in Path(path).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert not {"events.jsonl", "run.json", "skills.json"} & {one.name for one in Path(path).iterdir()}
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nil:texts=b.txt", "nll"),
        ("nll:text=b.txt", "texts"),
        ("nll", "needs texts"),
        ("nll:texts=absent.txt", "no file absent.txt"),
        ("reward:texts=b.txt", "reward:reward=SPEC"),
        ("reward:texts=b.txt,reward=pocket/jugde", "pocket/judge"),
        ("reward:texts=b.txt,reward=sentiment,samples=0", "samples"),
        ("nll:texts=b.txt,weight=much", "weight"),
        ("nll:texts=b.txt,template=chat", "plain"),
        ("judge:texts=b.txt", "one at a time"),
        ("ties:texts=b.txt", "ties"),
    ],
)
def test_what_is_no_skill_is_refused(spec: str, said: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(UsageError, match=said):
        Skill.parse(spec)


def test_a_line_that_is_not_there_is_refused_with_those_that_are(models: Path) -> None:
    skill = Skill.parse(f"nll:texts={models / 'b.txt'},columns=accuracy")
    with pytest.raises(UsageError, match="NLL per byte"):
        measure_before([skill], Subjects.of([str(models / "b")], None))


def test_an_adapter_is_measured_folded_into_its_base(models: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which writes adapters")
    lm = LM.load(models / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    save(LM(made.merge_and_unload(), lm.tokenizer), tmp_path / "folded")
    skill = Skill.parse(f"nll:texts={models / 'b.txt'}")
    subjects = Subjects.of([str(tmp_path / "adapter")], str(models / "base"))
    measure_before([skill], subjects)
    values = [
        skill.measure(path).row("NLL per byte").value for path in (*subjects.all().values(), str(tmp_path / "folded"))
    ]
    assert (
        values[0] == pytest.approx(values[2], rel=1e-5) and abs(values[0] - values[1]) > 1e-3
    )  # one rounding of W + BA
