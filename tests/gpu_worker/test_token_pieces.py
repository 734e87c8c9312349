"""The bytes of tokens: together they are the text, whatever characters they cut."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from expert_store.config import DEMO
from expert_store.models import locate_model
from gpu_worker.token_pieces import TokenPieces
from gpu_worker.tokenizer import Tokenizer


def demo() -> Tokenizer:
    tokenizer = Tokenizer.from_directory(locate_model(DEMO).directory)
    assert tokenizer is not None
    return tokenizer


DEMO_TOKENIZER = demo()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_pieces_of_a_byte_level_vocabulary(text: str) -> None:
    ids = DEMO_TOKENIZER.encode(text)
    assert b"".join(DEMO_TOKENIZER.piece(token) for token in ids) == text.encode()


def test_special_tokens_have_their_names_and_unknown_ones_have_nothing() -> None:
    assert DEMO_TOKENIZER.piece(2) == b"<|im_end|>"
    assert DEMO_TOKENIZER.piece(1 << 20) == b""


def test_pieces_of_words_and_bytes() -> None:
    """As SentencePiece has them: a mark for the space, and words for bytes that no other token has."""
    words = ["<unk>", "\N{LOWER ONE EIGHTH BLOCK}", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    piece = TokenPieces(backend)
    for text in ("a a", "a\N{SNOWMAN} a"):
        assert b"".join(piece(token) for token in backend.encode(text).ids) == text.encode()
