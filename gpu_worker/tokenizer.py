"""Text to token ids and back, exactly as the checkpoint's own tokenizer and chat template define it.

Reads local files only and runs no code from a checkpoint. transformers is the authority, but takes more than
a second to import: a `tokenizer.json` that it would use unchanged is used without it, and it is imported at
the first chat. `TokenStream` turns tokens into text while they arrive; what the text means (stop strings,
endings) is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import CheckpointError, InvalidRequest

# Any of these makes a directory one with a tokenizer, which must then load.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# transformers' classes that take tokenizer.json as it is, and the options that make them change it.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_CHANGING_OPTIONS = ("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, directory: Path, backend: tokenizers.Tokenizer) -> None:
        self._directory, self._backend = directory, backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, word in added.items() if word.special)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer in `directory`, None if it has none; CheckpointError if it will not load."""
        if not any((directory / name).exists() for name in _FILES):
            return None
        try:
            # tokenizers raises bare Exception for a file it cannot parse, so nothing narrower will do.
            backend = _load_unchanged(directory) or _load_by_transformers(directory).backend_tokenizer
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
        return cls(directory, backend)

    @property
    def has_chat_template(self) -> bool:
        config = _config(self._directory)
        return "chat_template" in config or (self._directory / "chat_template.jinja").exists()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around a text."""
        return list(self._backend.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat ({"role", "content"} each), up to where the assistant's answer begins."""
        if not self.has_chat_template:
            raise InvalidRequest("this checkpoint has no chat template; send text or token ids")
        if not messages:
            raise InvalidRequest("the chat has no messages")
        try:
            ids = self._by_transformers.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever the caller's text makes the checkpoint's template do
            raise InvalidRequest(f"the chat template rejects these messages: {error}") from error
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Ids that the tokenizer does not know have no text."""
        # Without transformers' clean-up of spaces: it looks across tokens, and a stream could not follow.
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TokenStream:
        return TokenStream(self)

    @cached_property
    def _by_transformers(self) -> Any:
        return _load_by_transformers(self._directory)


class TokenStream:
    """Text of a growing list of ids: the pieces together are `decode` of all ids.

    A tokenizer may decode an id differently at the beginning of a text than within it, so the ids of the last
    piece stay in front of the new ones as context. A piece is held back while it ends in U+FFFD, which is
    what a part of a character decodes to.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""  # what the first of these ids, those already shown, decode to
        self._context = 0  # how many those are

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        if token in self._tokenizer.special_ids:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED) or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        piece = self._tokenizer.decode(self._ids)[len(self._shown) :]
        self._ids, self._shown, self._context = [], "", 0
        return piece


def _load_unchanged(directory: Path) -> tokenizers.Tokenizer | None:
    """tokenizer.json itself, if transformers would not change it; else None."""
    config = _config(directory)
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or any(
        name in config for name in _CHANGING_OPTIONS
    ):
        return None
    if not (directory / "tokenizer.json").exists():
        return None
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = {word.content for word in backend.get_added_tokens_decoder().values() if word.special}
    named = [config[name] for name in _SPECIAL_TOKENS if config.get(name)]
    named += config.get("extra_special_tokens") or []
    if any(not isinstance(word, str) or word not in special for word in named):
        return None  # transformers would add it, or knows its other forms
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_by_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
