"""What tests of all kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def empty_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    empty = Tensor.new_empty

    def poisoned(*args: Any, **named: Any) -> Tensor:
        made = empty(*args, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
