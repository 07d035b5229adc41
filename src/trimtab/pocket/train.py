"""Train the pocket models: `python -m trimtab.pocket.train` (= `make pocket`), or `--only base chat` for some of them.

    base    next-token training on the world's mixed dialogues
    chat    base, then good answers, then direct preference optimisation on pairs of its own samples, judged
    nano    a smaller model with another tokenizer, trained on good answers
    reward  base with a score head, Bradley-Terry on judged pairs

Every model is written when it is complete and replaces the one before; `--only` starts again at a model and uses those
already there. The same seed, machine, thread count and library versions give the same weights; elsewhere floating-point
sums may be ordered otherwise, and the figures of the cards are reproduced within their intervals instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.pocket import MODELS, judge, task_of, world

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from trimtab.pocket.preferences import Pair, Sampler

Stream = Iterator[tuple[list[int], list[int]]]

HERE = Path(__file__).parent / "models"
ROWS, LENGTH = 16, 128
BASE_STEPS, BASE_RATE = 3200, 3e-3
NANO_STEPS, NANO_RATE = 2600, 4e-3
SFT_STEPS, SFT_RATE = 250, 5e-4
DPO_PROMPTS, DPO_RATE, DPO_BETA = 1600, 1e-4, 0.1
REWARD_PROMPTS, REWARD_EPOCHS, REWARD_RATE = 3000, 1, 5e-4
CARD_PROMPTS, CARD_SEED = 800, 0
LEAST_GAP = 0.05  # of gold score between the two answers of a pair
PROMPT = "Q: {question}\nA:"


def encoded(tokenizer: PreTrainedTokenizerFast, seed: int, kind: str) -> Stream:
    """Endless (prompt ids, answer ids) of the training split."""
    from trimtab.pocket.training import answer_ids

    stream = world.dialogues(seed, kind)
    while True:
        drawn = [next(stream) for _ in range(512)]
        questions = tokenizer([task.prompt for task, _ in drawn])["input_ids"]
        yield from zip(questions, answer_ids(tokenizer, [a for _, a in drawn]), strict=True)


def train_base(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from trimtab.pocket import nets
    from trimtab.pocket.tokenizer import base_tokenizer

    tokenizer = base_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(nets.base_config())
    stream = encoded(tokenizer, seed, "mixed")

    def keep() -> None:
        nets.save(model, tokenizer, folder, {"kind": "base", "prompt": PROMPT, "seed": seed})

    pretrain(model, stream, BASE_STEPS, BASE_RATE, "base", keep)


def train_nano(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from trimtab.pocket import nets
    from trimtab.pocket.tokenizer import nano_tokenizer

    tokenizer = nano_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(nets.nano_config())
    stream = encoded(tokenizer, seed + 1, "good")

    def keep() -> None:
        nets.save(model, tokenizer, folder, {"kind": "nano", "prompt": PROMPT, "seed": seed})

    pretrain(model, stream, NANO_STEPS, NANO_RATE, "nano", keep)


def pretrain(
    model: PreTrainedModel, stream: Stream, steps: int, rate: float, name: str, keep: Callable[[], None]
) -> None:
    """Next-token training on everything, kept half-way and at the end."""
    from trimtab.pocket import training

    def loss(step: int) -> torch.Tensor:
        long = step % 8 == 0  # every eighth batch fills the whole context, so that all positions are trained
        rows, length = (ROWS // 2, 2 * LENGTH) if long else (ROWS, LENGTH)
        return training.next_token_loss(model, *training.windows(stream, rows, length, answers_only=False))

    training.fit(model, loss, steps, rate, name, [steps // 2], keep)
    keep()


def train_chat(folder: Path, seed: int) -> None:
    """Good answers first, then pairs of the model's own samples; the reference of the second is the first's result."""
    import torch

    from trimtab.pocket import nets, training
    from trimtab.pocket.preferences import candidates, pairs
    from trimtab.pocket.tokenizer import CHAT_TEMPLATE

    model, tokenizer = load(folder.parent / "base")
    tokenizer.chat_template = CHAT_TEMPLATE
    stream = encoded(tokenizer, seed + 2, "good")

    def good_answers(step: int) -> torch.Tensor:
        return training.next_token_loss(model, *training.windows(stream, ROWS, LENGTH, answers_only=True))

    training.fit(model, good_answers, SFT_STEPS, SFT_RATE, "chat, good answers")
    asked = world.tasks("train", DPO_PROMPTS, seed)
    answers = candidates(asked, [sampler(model, tokenizer)] * 4, 1, seed)
    judged = [p for p in pairs(asked, answers, 0.1, 2, seed) if (judge(p.prompt, p.chosen).score or 0.0) > 0.9]
    questions = tokenizer([p.prompt for p in judged])["input_ids"]
    chosen = training.answer_ids(tokenizer, [p.chosen for p in judged])
    rejected = training.answer_ids(tokenizer, [p.rejected for p in judged])

    def logprobs(rows: list[int]) -> torch.Tensor:
        answers = [chosen[i] for i in rows] + [rejected[i] for i in rows]
        return training.answer_logprob(model, [questions[i] for i in rows] * 2, answers).view(2, -1)  # [2, rows]

    steps = len(judged) // ROWS
    with torch.no_grad():
        batches = [list(range(k * ROWS, (k + 1) * ROWS)) for k in range(steps)]
        reference = [logprobs(rows) for rows in batches]

    def direct_preference(step: int) -> torch.Tensor:
        """DPO, and next-token loss on the chosen: alone, DPO made both answers unlikely and others took their place."""
        now = logprobs(batches[step])
        gain = now - reference[step]
        lengths = torch.tensor([len(chosen[i]) for i in batches[step]])
        preference = -torch.nn.functional.logsigmoid(DPO_BETA * (gain[0] - gain[1])).mean()
        return preference - (now[0] / lengths).mean()

    print(f"chat: {len(judged)} pairs", flush=True)
    training.fit(model, direct_preference, steps, DPO_RATE, "chat, preferences")
    nets.save(model, tokenizer, folder, {"kind": "chat", "prompt": PROMPT, "seed": seed})


def train_reward(folder: Path, seed: int) -> None:
    """A score head on the base's body, Bradley-Terry; the annotators are hasty (see `hasty`)."""
    import torch
    from transformers import LlamaForSequenceClassification

    from trimtab.pocket import nets, training
    from trimtab.pocket.preferences import hasty

    base, tokenizer = load(folder.parent / "base")
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(nets.base_config(num_labels=1))
    model.model.load_state_dict(base.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    judged = hasty(reward_pairs("train", folder.parent, REWARD_PROMPTS, seed), seed)
    steps = REWARD_EPOCHS * len(judged) // ROWS
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(judged), generator=order) for _ in range(REWARD_EPOCHS)]).tolist()

    def bradley_terry(step: int) -> torch.Tensor:
        batch = [judged[i] for i in rows[step * ROWS : (step + 1) * ROWS]]
        prompts = [p.prompt for p in batch] * 2
        scores = training.score(model, tokenizer, prompts, [p.chosen for p in batch] + [p.rejected for p in batch])
        return -torch.nn.functional.logsigmoid(scores[: len(batch)] - scores[len(batch) :]).mean()

    print(f"reward: {len(judged)} pairs", flush=True)
    training.fit(model, bradley_terry, steps, REWARD_RATE, "reward")
    tokenizer.padding_side = "right"
    extra = {"kind": "reward", "text": "{prompt} {answer}</s>", "prompt": PROMPT, "padding_side": "right", "seed": seed}
    nets.save(model, tokenizer, folder, extra)


def reward_pairs(split: str, models: Path, n: int, seed: int) -> list[Pair]:
    """Judged pairs of answers by base and by the world itself to `n` questions of a split."""
    from trimtab.pocket.preferences import candidates, pairs

    base = sampler(*load(models / "base"))
    asked = world.tasks(split, n, seed)
    return pairs(asked, candidates(asked, [base] * 3, 3, seed), LEAST_GAP, 3, seed)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def sampler(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float = 1.0) -> Sampler:
    from trimtab.pocket import training

    return lambda prompts, seed: training.sample(model, tokenizer, prompts, temperature, seed)


def card(folder: Path, name: str, seed: int, threads: int, minutes: float) -> None:
    """Measure the saved model as it will be loaded, and write its card."""
    from trimtab.pocket import cards, measure

    if name == "reward":
        measured, model, tokenizer = measure_reward(folder)
    else:
        model, tokenizer = load(folder)
        asked = world.tasks("test", CARD_PROMPTS, CARD_SEED)
        prompts = [task.prompt for task in asked]
        measured = {"prompts": CARD_PROMPTS, "seed": CARD_SEED, "max_new_tokens": 64}
        for key, temperature in (("temperature_1", 1.0), ("greedy", 0.0)):
            measured[key] = measure.judged(asked, sampler(model, tokenizer, temperature)(prompts, CARD_SEED))
            print(f"{name}, {key}:\n{measure.table(measured[key])}", flush=True)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "entries": len(tokenizer),
        "seed": seed,
        "threads": threads,
        "minutes": minutes,
    }
    cards.write(folder, name, facts, measured)


def measure_reward(folder: Path) -> tuple[dict[str, Any], PreTrainedModel, PreTrainedTokenizerFast]:
    """Held-out pair accuracy of the reward model, on all pairs and by where the answers come from and how far apart."""
    import torch
    from scipy.stats import spearmanr
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trimtab.pocket import measure, training

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = reward_pairs("test", folder.parent, CARD_PROMPTS, CARD_SEED)
    with torch.no_grad():
        chosen = training.score(model, tokenizer, [p.prompt for p in held], [p.chosen for p in held])
        rejected = training.score(model, tokenizer, [p.prompt for p in held], [p.rejected for p in held])
    right = (chosen > rejected).tolist()
    gold = [judge(p.prompt, text).score for p in held for text in (p.chosen, p.rejected)]
    proxy = torch.stack([chosen, rejected], 1).flatten().tolist()
    families = [task.family for p in held if (task := task_of(p.prompt))]
    groups = {"all": right}
    groups["gap under 0.3"] = [r for r, p in zip(right, held, strict=True) if p.gap < 0.3]
    groups["gap 0.3 and more"] = [r for r, p in zip(right, held, strict=True) if p.gap >= 0.3]
    for family in dict.fromkeys(families):
        groups[family] = [r for r, f in zip(right, families, strict=True) if f == family]
    measured = {
        "prompts": CARD_PROMPTS,
        "seed": CARD_SEED,
        "least_gap": LEAST_GAP,
        "held_out_pairs": {key: measure.accuracy(rows) for key, rows in groups.items()},
        "spearman": float(spearmanr(gold, proxy).statistic),
    }
    print(f"reward: {measured}", flush=True)
    return measured, model, tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trimtab.pocket.train", description="Train the pocket models.")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="which models (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="more is faster only on a machine that does nothing else"
    )
    given = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    trainers = {"base": train_base, "chat": train_chat, "nano": train_nano, "reward": train_reward}
    for name in [m for m in MODELS if m in given.only]:
        started = time.perf_counter()
        trainers[name](given.out / name, given.seed)
        minutes = (time.perf_counter() - started) / 60
        card(given.out / name, name, given.seed, given.threads, minutes)
        print(f"{name}: trained in {minutes:.1f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
