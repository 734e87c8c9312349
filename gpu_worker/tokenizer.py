"""Text to token ids and back, exactly as the checkpoint's own tokenizer and chat template define it.

Reads local files only and runs no code from a checkpoint. `TokenStream` turns tokens into text while they
arrive; what the text means (stop strings, endings) is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from common.errors import CheckpointError, InvalidRequest

# Any of these makes a directory one with a tokenizer, which must then load.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer in `directory`, None if it has none; CheckpointError if it will not load."""
        if not any((directory / name).exists() for name in _FILES):
            return None
        try:
            # tokenizers raises bare Exception for a file it cannot parse, so nothing narrower will do.
            return cls(
                AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            )
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around a text."""
        return list(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat ({"role", "content"} each), up to where the assistant's answer begins."""
        if not self.has_chat_template:
            raise InvalidRequest("this checkpoint has no chat template; send text or token ids")
        if not messages:
            raise InvalidRequest("the chat has no messages")
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
            )
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the chat template rejects these messages: {error}") from error
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Ids that the tokenizer does not know have no text."""
        # Cleaning up spaces would look across tokens, and a stream could not follow.
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def stream(self) -> TokenStream:
        return TokenStream(self)


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
