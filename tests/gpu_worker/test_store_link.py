"""What a worker maps when it attaches again."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.arena import ArenaShape, OwnedArena
from common.errors import Unavailable
from gpu_worker.store_link import _map

SHAPE = ArenaShape("0" * 32, layers=1, experts=2, frames=1, stride=4096)


def test_an_arena_is_mapped_once_however_often_a_worker_attaches() -> None:
    """A lease that ends is no reason to map, and on a GPU to register, gigabytes again."""
    arena, successor = OwnedArena(SHAPE), OwnedArena(SHAPE)
    try:
        first = _map(arena.path, SHAPE.layout_digest, None)
        assert _map(arena.path, SHAPE.layout_digest, first) is first
        assert _map(successor.path, SHAPE.layout_digest, first) is not first
    finally:
        arena.close()
        successor.close()
    with pytest.raises(Unavailable, match="cannot map"):
        _map(Path("/dev/shm/there-is-none"), SHAPE.layout_digest, first)
