"""A small tokenizer for models that were never trained: byte-level BPE, special tokens, a chat template.

Merges are learned from the demo model's card, so the same installation always gives the same tokenizer. What
is left of the vocabulary is filled with words that no text encodes to: every id that a model may produce has
a text, and a stream of random tokens can be seen.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_PAD, _BOS, _EOS, _TURN_START, _TURN_END = _SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PAD_ID, BOS_ID, EOS_ID, TURN_END_ID = (_SPECIAL.index(word) for word in (_PAD, _BOS, _EOS, _TURN_END))
LEAST_VOCABULARY = 256 + len(_SPECIAL)
_SPACE = "Ġ"  # how byte-level BPE writes the space in front of a word


def write_tokenizer(directory: Path, vocab_size: int, max_length: int) -> None:
    """Write the tokenizer's files, the chat template and generation_config.json into `directory`."""
    demo = files("expert_store") / "demo"
    tokenizer = _train(demo.joinpath("README.md").read_text(), vocab_size)
    (directory / "tokenizer.json").write_text(_filled(tokenizer, vocab_size))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
        "clean_up_tokenization_spaces": False, "pad_token": _PAD, "bos_token": _BOS, "eos_token": _EOS,
        "extra_special_tokens": [_TURN_START, _TURN_END],
    }  # fmt: skip
    generation = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, TURN_END_ID]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    template = demo.joinpath("chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)


def _train(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def _filled(tokenizer: Tokenizer, vocab_size: int) -> str:
    """tokenizer.json with a word for each id that training left over."""
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for token in range(len(vocabulary), vocab_size):
        vocabulary[f"{_SPACE}w{token}"] = token
    return json.dumps(described, ensure_ascii=False, separators=(",", ":"))
