"""Counters layer by layer: what is copied stays as it was, and sums are those of the layers."""

from __future__ import annotations

import pytest

from gpu_worker.slots.counters import CacheCounters, LayerCounters


def test_a_copy_does_not_go_on_counting() -> None:
    counters = CacheCounters.of_layers(2)
    before = counters.copy()
    counters.layers[1].hits += 3
    counters.layers[0].misses += 1
    counters.staged += 1
    assert before == CacheCounters.of_layers(2)
    during = counters.since(before)
    assert during == CacheCounters([LayerCounters(0, 1), LayerCounters(3, 0)], staged=1)
    assert (during.hits, during.misses, during.hit_rate) == (3, 1, 0.75)
    assert during.plus(during).layers[1].hits == 6


def test_counters_of_different_models_do_not_mix() -> None:
    with pytest.raises(ValueError, match="zip"):
        CacheCounters.of_layers(2).plus(CacheCounters.of_layers(3))


def test_nothing_needed_is_no_hit() -> None:
    assert CacheCounters().hit_rate == 0.0
