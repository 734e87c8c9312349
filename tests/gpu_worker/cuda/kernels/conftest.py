"""What tests of all kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def empty_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    for owner, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **named: Any) -> Tensor:
        made = empty(*args, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return poisoned
