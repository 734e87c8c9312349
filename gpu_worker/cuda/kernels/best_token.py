"""The most probable token of each row of logits, as part of the step that makes them: for greedy decoding.

Two kernels: pieces of a row, then the pieces. PyTorch's log_softmax leaves a row of 131,072 to one
multiprocessor, and each of its operations is a launch that the device waits for. Not done here: any other way
of choosing (`gpu_worker.sampling`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 1024


def best_token_plain(logits: Tensor) -> Tensor:
    """logits (rows, vocab) float32 to (rows, 2) float64: the token and its log-probability.

    The first of equals. A log-probability that is no finite number says that the logits are not.
    """
    tokens = logits.argmax(1, keepdim=True)
    return torch.cat([tokens.double(), logits.log_softmax(1).gather(1, tokens).double()], 1)


def best_token(logits: Tensor) -> Tensor:
    """As `best_token_plain`, for contiguous logits."""
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, _PIECE)
    partial = logits.new_empty(rows, 3, pieces)
    best = torch.empty(rows, 2, dtype=torch.float64, device=logits.device)
    _piece_kernel[(rows, pieces)](logits, partial, vocab, PIECES=pieces, PIECE=_PIECE)
    _row_kernel[(rows,)](partial, best, PIECES=pieces, WIDTH=triton.next_power_of_2(pieces))
    return best


@triton.jit
def _finite(largest):
    """What exponents are taken less: the largest value, but that less itself must be a number."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def _piece_kernel(logits, partial, vocab, PIECES: tl.constexpr, PIECE: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    values = tl.load(logits + row * vocab + place, mask=place < vocab, other=float("-inf"))
    largest = tl.max(values, 0)
    total = tl.sum(tl.exp(values - _finite(largest)), 0)
    first = tl.min(tl.where(values == largest, place, vocab), 0)
    out = partial + row * (3 * PIECES) + piece
    tl.store(out, largest)
    tl.store(out + PIECES, total)
    # Places below 2^24 are exact in float32, and no vocabulary is larger.
    tl.store(out + 2 * PIECES, first.to(tl.float32))


@triton.jit
def _row_kernel(partial, best, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    exists = piece < PIECES
    source = partial + row * (3 * PIECES) + piece
    largest = tl.load(source, mask=exists, other=float("-inf"))
    totals = tl.load(source + PIECES, mask=exists, other=0.0)
    first = tl.load(source + 2 * PIECES, mask=exists, other=0.0)
    top = tl.max(largest, 0)
    shares = totals * tl.exp(_finite(largest) - _finite(top))
    total = tl.sum(tl.where(totals == 0.0, 0.0, shares), 0)
    token = tl.min(tl.where(largest == top, first, 1.0 * (1 << 24)), 0)
    tl.store(best + row * 2, token.to(tl.float64))
    logprob = tl.where(total > 0.0, -tl.log(tl.maximum(total, 1e-30)), float("nan"))
    tl.store(best + row * 2 + 1, logprob.to(tl.float64))
