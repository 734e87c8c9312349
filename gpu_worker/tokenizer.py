"""Text to token ids and back, exactly as the checkpoint's own tokenizer and chat template define it.

Reads local files only and runs no code from a checkpoint. transformers is the authority, but takes more than
a second to import: a `tokenizer.json` that it would use unchanged is used without it, and it is imported at
the first chat. `TokenStream` turns tokens into text while they arrive; what the text means (stop strings,
endings) is not known here.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from common.errors import CheckpointError, InvalidRequest
from gpu_worker.chat_template import THINK, ChatTemplate
from gpu_worker.token_pieces import TokenPieces

# Any of these makes a directory one with a tokenizer, which must then load.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# transformers' classes that take tokenizer.json as it is, and the options that make them change it.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_CHANGING_OPTIONS = ("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SLICE = 1 << 18  # characters
_FEW = 8  # tokens at the end of a prompt, among which the one that opens reasoning is


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, directory: Path, backend: tokenizers.Tokenizer) -> None:
        self._directory, self._backend = directory, backend
        self.chat_template = _chat_template(directory)
        marks = self.chat_template.marks if self.chat_template else ()
        added = backend.get_added_tokens_decoder()
        special = (token for token, word in added.items() if word.special and word.content not in marks)
        self.special_ids = frozenset(special)  # those without a text

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer in `directory`, None if it has none; CheckpointError if it will not load."""
        if not any((directory / name).exists() for name in _FILES):
            return None
        try:
            # tokenizers raises bare Exception for a file it cannot parse, so nothing narrower will do.
            backend = _load_unchanged(directory) or _load_by_transformers(directory).backend_tokenizer
            return cls(directory, backend)
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around a text.

        InvalidRequest for far more than `most` tokens; whoever sets a limit has to look at the rest.
        """
        self._check_not_far_more(text, most)
        # A batch of one: `encode` would hold the interpreter's lock, and with it all else of the process.
        return list(self._backend.encode_batch([text])[0].ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins.

        Messages have role and content, and may have what else the template reads (tool_calls, name, ...);
        tools are objects as OpenAI defines them; `arguments` are further variables of the template; `most` as
        for `encode`.
        """
        if self.chat_template is None:
            raise InvalidRequest("this checkpoint has no chat template; send text or token ids")
        if not messages:
            raise InvalidRequest("the chat has no messages")
        self.chat_template.check(tools, arguments or {})
        try:
            text = self._by_transformers.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                **(arguments or {}),
            )
            self._check_not_far_more(text, most)
            return list(self._by_transformers(text, add_special_tokens=False)["input_ids"])
        except InvalidRequest:
            raise
        except Exception as error:  # whatever the caller's text makes the checkpoint's template do
            raise InvalidRequest(f"the chat template rejects these messages: {error}") from error

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to `prompt` begins within reasoning, because the prompt ends with `<think>`."""
        return self.decode(prompt[-_FEW:]).rstrip().endswith(THINK)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Ids that the tokenizer does not know have no text."""
        # Without transformers' clean-up of spaces: it looks across tokens, and a stream could not follow.
        shown = [token for token in ids if token not in self.special_ids]
        return self._backend.decode(shown, skip_special_tokens=False)

    def piece(self, token: int) -> bytes:
        """The token's own bytes, which may be a part of a character."""
        return self._pieces(token)

    def stream(self) -> TokenStream:
        return TokenStream(self)

    def _check_not_far_more(self, text: str, most: int | None) -> None:
        """Counts in slices, and no further than twice what is too many: the whole of a text of ten million
        tokens would take a minute and gigabytes."""
        if most is None or len(text) <= 4 * most:  # no more than is taken, as a rule
            return
        counted = 0
        for start in range(0, len(text), _SLICE):
            counted += len(self._backend.encode_batch([text[start : start + _SLICE]])[0])
            if counted > 2 * most:
                raise InvalidRequest(
                    f"the text has more than {counted} tokens, of which at most {most} are taken: shorten it"
                )

    @cached_property
    def _pieces(self) -> TokenPieces:
        return TokenPieces(self._backend)

    @cached_property
    def _by_transformers(self) -> Any:
        return _load_by_transformers(self._directory)


class TokenStream:
    """Text of a growing list of ids: the pieces together are `decode` of all ids.

    A tokenizer may decode an id differently at the beginning of a text than within it, so the ids of the last
    piece stay in front of the new ones as context. A piece is held back while the bytes of its last character
    are not all there; the text cannot tell, since U+FFFD is also a character, and what wrong bytes decode to.
    Where a tokenizer takes back what it decoded before wrong bytes (byte fallback), what was shown stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""  # what the first of these ids, those already shown, decode to
        self._context = 0  # how many those are
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")  # knows what a character lacks

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        if token in self._tokenizer.special_ids or not (added := self._tokenizer.piece(token)):
            return ""
        self._ids.append(token)
        self._bytes.decode(added)
        unfinished, _ = self._bytes.getstate()
        if unfinished:
            return ""
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(self._shown):
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
        self._bytes.reset()
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
    from transformers.utils import logging as notices

    notices.set_verbosity_error()  # it writes its own lines among the logs, of prompts that we refuse
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _chat_template(directory: Path) -> ChatTemplate | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return ChatTemplate([path.read_text(encoding="utf-8")])
    given = _config(directory).get("chat_template")
    if isinstance(given, list):  # several, each with its name
        return ChatTemplate([entry["template"] for entry in given])
    return ChatTemplate([given]) if given else None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
