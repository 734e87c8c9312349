"""The name of a routed expert, as every room uses it."""

from __future__ import annotations

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Its layer (MoE block, counted from 0) and its number in that layer."""

    layer: int
    expert: int
