"""Where kernels of the GPU are tested: see the conftest of all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def empty_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated in a test holds NaN until a kernel writes it.

    Places of pairs that somebody else computes are never written, but computed with: what lay there before
    must not matter, nor be what the interpreter complains of. Not on a GPU, where filling is a launch, and
    would keep apart two kernels of which one begins beside the other.
    """
    for owner, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **named: Any) -> Tensor:
        made = empty(*args, **named)
        return made.fill_(torch.nan) if made.is_cpu and made.is_floating_point() else made

    return poisoned
