"""Log-probabilities of tokens in both of OpenAI's shapes. A token's own bytes may be part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.gateway.replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprobs


def chat_logprobs(tokens: Sequence[pb.Token], alternatives: int) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TopLogprobs(
                token=_shown(token.piece),
                logprob=token.logprob,
                bytes=list(token.piece),
                top_logprobs=[
                    TokenLogprob(token=_shown(other.piece), logprob=other.logprob, bytes=list(other.piece))
                    for other in token.alternatives[:alternatives]
                ],
            )
            for token in tokens
        ]
    )


class TextOffsets:
    """Where in a text each of its tokens begins, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, piece: bytes) -> int:
        at, self._characters = self._characters, self._characters + len(self._decoder.decode(piece))
        return at


def completion_logprobs(
    tokens: Sequence[pb.Token], alternatives: int, offsets: TextOffsets
) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[_named(token.piece) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_top(token, alternatives) for token in tokens] if alternatives else None,
        text_offset=[offsets.next(token.piece) for token in tokens],
    )


def _top(token: pb.Token, alternatives: int) -> dict[str, float]:
    """The likeliest ones and the token itself, wherever it ranks."""
    top = {_named(other.piece): other.logprob for other in token.alternatives[:alternatives]}
    return {**top, _named(token.piece): token.logprob}


def _shown(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")


def _named(piece: bytes) -> str:
    """A part of a character in escapes, so that no two look alike: here no list of bytes is beside it."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
