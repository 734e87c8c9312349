"""The most probable token against PyTorch's."""

import math

import pytest
import torch

from gpu_worker.cuda.kernels.best_token import best_token, best_token_plain


@pytest.mark.parametrize("vocab", [1, 96, 1024, 5000])
def test_equals_its_twin(vocab: int, device: torch.device) -> None:
    logits = torch.randn(3, vocab, device=device) * 4
    found, expected = best_token(logits), best_token_plain(logits)
    assert torch.equal(found[:, 0], expected[:, 0])
    assert (found[:, 1] - expected[:, 1]).abs().max() < 1e-5


def test_the_first_of_equals(device: torch.device) -> None:
    """Within a piece of the row and beyond it; pieces without any weight take no part."""
    logits = torch.full((1, 4096), -torch.inf, device=device)
    for place in (3000, 1500, 1400):
        logits[0, place] = 2.5
    token, logprob = best_token(logits)[0].tolist()
    assert token == 1400 and abs(logprob + math.log(3)) < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_told(value: float, device: torch.device) -> None:
    logits = torch.randn(2, 3000, device=device)
    logits[1, 2100] = value
    (_, good), (_, bad) = best_token(logits).tolist()
    assert math.isfinite(good) and not math.isfinite(bad)
    assert not math.isfinite(best_token(torch.full((1, 50), -torch.inf, device=device))[0, 1])
