"""Retrievers: the loss against its formula, the ranking against brute force, recall on planted topics and on real text."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from trimtab.errors import UsageError
from trimtab.measure.coherence import Embedder, load_embedder
from trimtab.measure.stats import paired_difference
from trimtab.prompt.retrieval import (
    Embedded,
    Fixed,
    HashedWords,
    Lexical,
    Retriever,
    RetrieverFit,
    SentenceFeatures,
    Shuffled,
    Trained,
    TwoTower,
    contrastive_loss,
    false_negatives,
    search,
    train,
)

# the loss


Q = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.1]])
C = torch.tensor([[0.9, 0.1], [0.2, 1.5], [-0.4, -0.8], [1.2, 0.3]])  # the fourth is a negative given with the batch


def test_the_loss_is_the_formula() -> None:
    """float32 sums of four terms: 1e-6."""
    expected = 0.0
    for i in range(3):
        dots = [math.exp(sum(q * c for q, c in zip(Q[i].tolist(), C[j].tolist(), strict=True))) for j in range(4)]
        expected -= math.log(dots[i] / sum(dots)) / 3
    assert contrastive_loss(Q, C, torch.arange(3)).item() == pytest.approx(expected, abs=1e-6)


def test_its_gradient_is_that_of_the_formula() -> None:
    """dL/dq_i = (sum_j p_ij c_j - c_i) / B, dL/dc_j = sum_i (p_ij - [i = j]) q_i / B; float64, 1e-12."""
    q, c = Q.double().requires_grad_(), C.double().requires_grad_()
    contrastive_loss(q, c, torch.arange(3)).backward()
    p = (Q.double() @ C.double().T).softmax(-1)
    miss = p - torch.eye(3, 4, dtype=torch.float64)
    assert torch.allclose(q.grad, miss @ C.double() / 3, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(c.grad, miss.T @ Q.double() / 3, atol=1e-12)  # type: ignore[arg-type]


def test_masked_columns_are_removed() -> None:
    masked = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    rows = []
    for i in range(3):
        keep = (~masked[i]).nonzero()[:, 0]
        rows.append(contrastive_loss(Q[i : i + 1], C[keep], (keep == i).nonzero()[0]))
    found = contrastive_loss(Q, C, torch.arange(3), masked)
    assert found.item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-6)
    assert found.item() < contrastive_loss(Q, C, torch.arange(3)).item()
    q = Q.clone().requires_grad_()
    contrastive_loss(q, C, torch.arange(3), masked).backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


def test_one_pair_without_negatives_costs_nothing() -> None:
    assert contrastive_loss(Q[:1], C[:1], torch.tensor([0])).item() == 0.0


def test_the_mask_names_the_other_guidelines_of_an_input() -> None:
    # inputs 0, 0, 1; their guidelines 5, 6, 6 and a negative 5. Guidelines of 0: 5 and 6; of 1: 6.
    masked = false_negatives([0, 0, 1], [5, 6, 6, 5], {(0, 5), (0, 6), (1, 6)})
    assert masked.tolist() == [[False, True, True, True], [True, False, True, True], [False, True, False, False]]


# the ranking


class Given(Retriever):
    name = "given"

    def __init__(self, table: torch.Tensor):
        self.table = table

    def scores(self, queries: list[str]) -> torch.Tensor:  # type: ignore[override]
        return self.table[[int(query) for query in queries]]


def test_search_is_the_brute_force_ranking() -> None:
    table = torch.randn(600, 97, generator=torch.Generator().manual_seed(0))  # more queries than are scored together
    found = search(Given(table), [str(i) for i in range(600)], 20)
    expected = np.argsort(-table.numpy(), axis=1, kind="stable")[:, :20]
    assert [[row for row, _ in rows] for rows in found] == expected.tolist()
    assert found[3] == [(row, float(table[3, row])) for row in expected[3]]
    assert search(Given(table), ["5"], 20) == [found[5]]
    assert len(search(Given(table), ["5"], 500)[0]) == 97 and search(Given(table), [], 5) == []


def test_equal_scores_keep_the_order_and_minus_infinity_is_never_found() -> None:
    table = torch.tensor([[1.0, 2.0, -torch.inf, 2.0, 1.0], [-torch.inf] * 5])
    assert search(Given(table), ["0", "1"], 9) == [[(1, 2.0), (3, 2.0), (0, 1.0), (4, 1.0)], []]


LINES = [
    "Weapons: Do not explain how a weapon is made.",
    "Privacy: Do not give out addresses of people.",
    "Cooking: Give times and amounts.",
    "Poems: Mind metre and rhyme.",
    "Sums: Show each step of the sum.",
]
ASKED = ["How is a weapon made at home?", "Write a poem with rhyme", "the addresses of two people", "zzz"]


@pytest.mark.parametrize("kind", ["tfidf", "trained"])
def test_a_shuffled_library_gives_the_same_lines(kind: str) -> None:
    def made(lines: list[str]) -> Retriever:
        return Lexical(lines) if kind == "tfidf" else Trained(lines, TwoTower(HashedWords()))

    order = [3, 0, 4, 2, 1]
    plain, shuffled = (search(made(lines), ASKED[:3], 2) for lines in (LINES, [LINES[i] for i in order]))
    for ours, theirs in zip(plain, shuffled, strict=True):
        assert [row for row, _ in ours] == [order[row] for row, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)
    alone = [search(made(LINES), [query], 2)[0] for query in ASKED[:3]]
    assert [[row for row, _ in rows] for rows in alone] == [[row for row, _ in rows] for rows in plain]


def test_tfidf_finds_nothing_where_no_word_is_shared() -> None:
    found = search(Lexical(LINES), ASKED, 3)
    assert [rows[0][0] for rows in found[:3]] == [0, 3, 1] and found[3] == []
    assert all(0 < score <= 1.000001 for rows in found for _, score in rows)


def test_the_random_control_is_uniform_and_follows_its_seed() -> None:
    queries = [f"query {i}" for i in range(2000)]
    first = [rows[0][0] for rows in search(Shuffled(LINES, 1), queries, 1)]
    assert first == [rows[0][0] for rows in search(Shuffled(LINES, 1), queries, 1)]
    assert first != [rows[0][0] for rows in search(Shuffled(LINES, 2), queries, 1)]
    assert search(Shuffled(LINES, 1), ["query 7"], 1)[0][0][0] == first[7]  # whatever else is asked
    counts = np.bincount(first, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


def test_fixed_principles_are_the_first_lines() -> None:
    assert [[row for row, _ in rows] for rows in search(Fixed(LINES), ["a", "b"], 3)] == [[0, 1, 2]] * 2


# planted topics


def planted(seed: int, shared: int = 0) -> tuple[list[str], list[str], list[list[int]], list[int]]:
    """20 topics of 30 inputs and 5 guidelines; -> inputs, guidelines, guidelines of each topic, topic of each input.

    A topic's inputs and its guidelines have words of their own, different ones on the two sides, so that nothing can be
    found by words alone; half of every text is noise from a common pool. shared: of each topic's 5 guidelines the last
    ones belong to every topic.
    """
    rng = random.Random(seed)
    noise = [f"noise{i}" for i in range(200)]

    def text(own: list[str]) -> str:
        chosen = rng.sample(own, 4) + rng.sample(noise, 4)
        rng.shuffle(chosen)
        return " ".join(chosen)

    inputs = [text([f"ask{topic}x{i}" for i in range(10)]) for topic in range(20) for _ in range(30)]
    lines, own = [], []
    for topic in range(20):
        own.append(list(range(len(lines), len(lines) + 5 - shared)))
        lines += [text([f"rule{topic}x{i}" for i in range(10)]) for _ in range(5 - shared)]
    common = list(range(len(lines), len(lines) + shared))
    lines += [text([f"common{i}" for i in range(10)]) for _ in range(shared)]
    return inputs, lines, [rows + common for rows in own], [number // 30 for number in range(600)]


def recall(retriever: Retriever, inputs: list[str], truth: list[list[int]], n: int = 6) -> list[float]:
    found = search(retriever, inputs, n)
    return [len({row for row, _ in rows} & set(own)) / len(own) for rows, own in zip(found, truth, strict=True)]


def fitted(seed: int, shared: int, **options: object) -> tuple[TwoTower, list[str], list[str], list[list[int]]]:
    """Trained on 20 inputs a topic; the 10 others, never seen, are returned with the guidelines of each."""
    inputs, lines, own, topic = planted(seed, shared)
    seen = [i for i in range(600) if i % 30 < 20]
    unseen = [i for i in range(600) if i % 30 >= 20]
    pairs = [(row, line) for row, i in enumerate(seen) for line in own[topic[i]]]
    fit = RetrieverFit(dim=64, epochs=3, seed=seed, **options)  # type: ignore[arg-type]
    tower = train([inputs[i] for i in seen], lines, pairs, HashedWords(1024), fit)
    return tower, lines, [inputs[i] for i in unseen], [own[topic[i]] for i in unseen]


def test_planted_topics_are_found_for_unseen_inputs() -> None:
    tower, lines, unseen, truth = fitted(0, 0)
    assert len(lines) == 100
    trained = float(np.mean(recall(Trained(lines, tower), unseen, truth)))
    tfidf = float(np.mean(recall(Lexical(lines), unseen, truth)))
    chance = float(np.mean(recall(Shuffled(lines), unseen, truth)))
    assert trained >= 0.95
    assert chance == pytest.approx(0.06, abs=4 * 0.24 / math.sqrt(5 * 200))  # 6 of 100, four standard errors
    assert tfidf < 0.2  # only noise words are shared
    untrained = TwoTower(HashedWords(1024))
    assert float(np.mean(recall(Trained(lines, untrained), unseen, truth))) < 0.2


def test_masking_false_negatives_raises_recall_where_guidelines_are_shared() -> None:
    """2 of the 5 guidelines belong to all 20 topics; recall of unseen inputs, paired over 5 seeds."""
    means: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        for mask in (True, False):
            tower, lines, unseen, truth = fitted(seed, 2, mask=mask)
            means[mask].append(float(np.mean(recall(Trained(lines, tower), unseen, truth, 5))))
    difference = paired_difference(means[True], means[False])
    assert difference.low is not None and difference.low > 0, means
    assert all(on > off for on, off in zip(means[True], means[False], strict=True)), means


def test_hard_negatives_train_too() -> None:
    tower, lines, unseen, truth = fitted(0, 0, hard_negatives=True)
    assert float(np.mean(recall(Trained(lines, tower), unseen, truth))) >= 0.95


def test_training_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pairs = [(i, i % len(LINES)) for i in range(4)]
    one, same, other = (
        train(ASKED, LINES, pairs, HashedWords(64), RetrieverFit(dim=8, epochs=2, batch=2, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.query, same.query) and not torch.equal(one.query, other.query)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UsageError, match="none of these prompts is an input of this library"):
        train(ASKED, LINES, [], HashedWords(64))


def test_before_training_the_score_is_that_of_the_features() -> None:
    """E[q . c] = 20 cos; with 4096 random directions the standard deviation is about 20 / 64."""
    features = HashedWords(256)
    scores = Trained(LINES, TwoTower(features, dim=4096)).scores(ASKED)
    assert torch.allclose(scores, 20 * features(ASKED) @ features(LINES).T, atol=1.5)


# files


def test_a_retriever_survives_its_file(tmp_path: Path) -> None:
    tower = train(ASKED, LINES, [(0, 0), (1, 3)], HashedWords(64), RetrieverFit(dim=8, epochs=1))
    tower.save(tmp_path / "r.safetensors")
    read = TwoTower.load(tmp_path / "r.safetensors")
    assert torch.equal(Trained(LINES, read).scores(ASKED), Trained(LINES, tower).scores(ASKED))
    assert torch.equal(read.seen, tower.seen) and read.features.size == 64


def test_a_damaged_retriever_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "r.safetensors"
    TwoTower(HashedWords(64), 8).save(path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b'{"not": "tensors"}'):
        path.write_bytes(data)
        with pytest.raises(UsageError, match="is not a guideline retriever"):
            TwoTower.load(path)
    save_file({"query": torch.zeros(8, 64)}, path)
    with pytest.raises(UsageError, match="is not a guideline retriever"):
        TwoTower.load(path)
    tower = TwoTower(HashedWords(64), 8)
    with torch.no_grad():
        tower.query[0, 0] = torch.nan
    tower.save(path)
    with pytest.raises(UsageError, match="not finite"):
        TwoTower.load(path)
    with pytest.raises(UsageError, match="is not a guideline retriever"):
        TwoTower.load(tmp_path / "absent")


def test_words_never_trained_on_are_counted() -> None:
    tower = train(ASKED, LINES, [(0, 0)], HashedWords(64), RetrieverFit(dim=8, epochs=1))
    trained = Trained(LINES, tower)
    assert trained.unknown("How is a poem made?") == 0
    assert trained.unknown("wie macht man a poem") == pytest.approx(0.6)
    assert trained.unknown("?!") == 0 == Lexical(LINES).unknown("wie macht man")


# the installed embedder, and real requests


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    found = load_embedder()
    if found is None:
        pytest.skip("needs the sentence embedder of trimtab[text]")
    return found


SAFETY = [
    "Weapons and explosives: Decline to explain how weapons, bombs or poisons are made.",
    "Computer crime: Decline to help with hacking, malware, phishing or breaking into systems and accounts.",
    "Theft and fraud: Decline to help with stealing, forgery, scams, blackmail or identity theft.",
    "Violence: Decline to help anyone hurt, threaten, stalk or kill people.",
    "Manipulation: Decline to help with deceiving, exploiting or controlling other people.",
    "Hate: Do not write content that attacks people for their race, religion or sex.",
    "Drugs: Decline to explain how illegal drugs are made, smuggled or sold.",
    "Self-harm: Answer with care, give no method, and point to people who can help.",
]
QUALITY = [
    "Arithmetic: Work the problem out step by step and check the total at the end.",
    "Units and prices: Keep track of dollars, hours, miles and percentages.",
    "Cooking: Give the ingredients, amounts and times of a recipe in order.",
    "Travel: Name places, distances and opening hours and say when they may have changed.",
    "Code: Write a short program that runs, with an example of its use.",
    "Writing: Keep the tone and the length that were asked for.",
    "Science: Explain the cause first and then the evidence.",
    "Lists: Give as many items as were asked for, each on a line of its own.",
]


def test_real_risky_requests_find_safety_guidelines(shared: Path, embedder: Embedder) -> None:
    """First guideline found, of 8 on safety and 8 on quality, for 80 harmful requests and 30 word problems.

    By chance half would be on safety. TF-IDF is compared and not asked to work: a library this small shares few words
    with requests (its function words decide), and the embedder has to beat it.
    """
    data = shared / "data"
    if not (data / "redteam").is_dir() or not (data / "gsm8k").is_dir():
        pytest.skip("needs the real requests in 'shared/data'")
    harmful = (data / "redteam" / "advbench.txt").read_text().splitlines()[:40]
    harmful += (data / "redteam" / "malicious-instruct.txt").read_text().splitlines()[:40]
    with (data / "gsm8k" / "test.jsonl").open() as file:
        harmless = [json.loads(next(file))["question"] for _ in range(30)]

    def right(retriever: Retriever) -> list[bool]:
        found = search(retriever, harmful + harmless, 1)
        return [bool(rows) and (rows[0][0] < len(SAFETY)) == (i < 80) for i, rows in enumerate(found)]

    ours, lexical = right(Embedded(SAFETY + QUALITY, embedder)), right(Lexical(SAFETY + QUALITY))
    for name, rows in (("embedder", ours), ("tfidf", lexical)):
        print(f"{name}: right kind first for {np.mean(rows[:80]):.3f} of harmful, {np.mean(rows[80:]):.3f} of harmless")
    for rows in (ours[:80], ours[80:]):
        assert binomtest(sum(rows), len(rows), 0.5, alternative="greater").pvalue < 1e-3
    difference = paired_difference(np.array(ours, float), np.array(lexical, float))
    assert difference.low is not None and difference.low > 0


def test_a_retriever_trained_on_the_embedder_beats_it(shared: Path, embedder: Embedder) -> None:
    """Real opening turns of red-team dialogues; the right guideline by a subject word, a third of them held out."""
    path = shared / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs hh-rlhf in 'shared/data'")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        opened = [json.loads(line)["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman: ") for line in file]
    subjects = {3: r"kill|murder|hurt|beat", 2: r"steal|rob|shoplift|fraud", 6: r"drug|cocaine|heroin|meth|weed"}
    inputs, truth = (rows[:120] for rows in _by_subject(opened, subjects))
    held = set(range(0, len(inputs), 3))
    train_rows = [i for i in range(len(inputs)) if i not in held]
    pairs = [(row, truth[i]) for row, i in enumerate(train_rows)]
    tower = train([inputs[i] for i in train_rows], SAFETY, pairs, SentenceFeatures(embedder))
    asked = [inputs[i] for i in sorted(held)]
    own = [[truth[i]] for i in sorted(held)]
    trained = recall(Trained(SAFETY, tower), asked, own, 1)
    frozen = recall(Embedded(SAFETY, embedder), asked, own, 1)
    print(f"first of 8, {len(asked)} held-out requests: trained {np.mean(trained):.3f}, frozen {np.mean(frozen):.3f}")
    difference = paired_difference(trained, frozen)
    assert difference.low is not None and difference.low > 0


def _by_subject(texts: list[str], subjects: dict[int, str]) -> tuple[list[str], list[int]]:
    inputs, truth = [], []
    for text in dict.fromkeys(texts):
        found = [line for line, words in subjects.items() if re.search(rf"\b(?:{words})", text.lower())]
        if len(found) == 1 and len(text) < 200:
            inputs.append(text)
            truth.append(found[0])
    return inputs, truth
