"""The bytes that a token stands for, which may be a part of a character: text alone cannot tell them.

Vocabularies write bytes in one of two ways: each as a printable letter (GPT-2's byte-level BPE), or as words
like <0xE2> beside plain text, with a mark where a space is (SentencePiece).
"""

from __future__ import annotations

import re

import tokenizers

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_WORD = re.compile("<0x([0-9A-F]{2})>")


def _letters() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


class TokenPieces:
    """Looks up one tokenizer's tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {token: word.content for token, word in backend.get_added_tokens_decoder().items()}
        self._letters = _letters()
        space = next(letter for letter, byte in self._letters.items() if byte == 0x20)
        self._byte_level = backend.decoder is not None and backend.decoder.decode([space]) == " "

    def __call__(self, token: int) -> bytes:
        """Empty if the tokenizer does not know it."""
        if token in self._added:
            return self._added[token].encode()
        word = self._backend.id_to_token(token)
        if word is None:
            return b""
        if self._byte_level and all(letter in self._letters for letter in word):
            return bytes(self._letters[letter] for letter in word)
        byte = _BYTE_WORD.fullmatch(word)
        return bytes([int(byte[1], 16)]) if byte else word.replace(_SPACE, " ").encode()
