"""How many frames: what was asked for, what fits, and the refusals in between."""

import pytest

from common.errors import ConfigError
from expert_store import sizing
from expert_store.sizing import choose_frames

RECORD = 1 << 20


def test_a_budget_is_kept() -> None:
    assert choose_frames(10 * RECORD + 5, RECORD, 100).frames == 10
    assert choose_frames(1000 * RECORD, RECORD, 100).frames == 100
    with pytest.raises(ConfigError, match="cannot hold one record"):
        choose_frames(RECORD - 1, RECORD, 100)


def test_without_a_budget_all_if_they_fit_else_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 100 * RECORD)
    assert choose_frames(None, RECORD, 85).frames == 85
    assert choose_frames(None, RECORD, 86).frames == 85  # a headroom of 15 % is left alone
    with pytest.raises(ConfigError, match="not even one record"):
        choose_frames(None, 200 * RECORD, 4)


def test_available_memory_is_read_from_this_machine() -> None:
    assert 1 << 20 < sizing.available_memory() < 1 << 50
