"""The two tokenizers of the pocket models, trained on the world's own text, and the chat template.

`base_tokenizer`  byte-level BPE, 512 entries; any bytes can be encoded (base, chat and reward share it).
`nano_tokenizer`  BPE over characters with byte fallback as in Llama 2, digits split, other merges, 640 entries.

Both: `<pad>` is 0, `</s>` (end of sequence) is 1, and there is no beginning-of-sequence token. Neither adds or drops
spaces, so the text of a prompt and an answer is the concatenation of the two.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from trimtab.pocket import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
BASE_ENTRIES, NANO_ENTRIES = 512, 640
TRAINING_DIALOGUES = 20_000

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% set q = message['content'] | trim %}"
    "{% if q.startswith('Q:') %}{% set q = q[2:] %}{% endif %}"
    "{% if q.endswith('A:') %}{% set q = q[:-2] %}{% endif %}"
    "{{ 'Q: ' + q | trim + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'A: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def _texts(seed: int) -> list[str]:
    drawn = itertools.islice(world.dialogues(seed), TRAINING_DIALOGUES)
    return [f"{task.prompt} {answer}" for task, answer in drawn]


def base_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `BASE_ENTRIES` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_ENTRIES,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return _wrap(tokenizer)


def nano_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Character BPE with byte fallback, `NANO_ENTRIES` entries of which 256 are the bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
            pre_tokenizers.Split(Regex(r"[.,!?:]|\n"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="never"), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NANO_ENTRIES, special_tokens=[PAD, EOS, *bytes_], min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
