"""A step's experts brought into one layer's slots, in waves when it needs more of them than fit.

Decisions alone: which experts stand in which slots while the caller computes from them. What is resident is
used where it lies, and decode's working set outlives a step that needs more than fits. Filling slots is the
caller's, who knows where records come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.counters import LayerCounters

Places = list[tuple[int, int]]  # (expert, slot) pairs
# Fills the slots with the records of their experts, or raises.
Fill = Callable[[Places], None]


def waves(slots: LayerSlots, needed: list[int], counters: LayerCounters, fill: Fill) -> Iterator[Places]:
    """Experts in their slots, pinned while the caller computes from them; together all of `needed`."""
    slots.begin(needed)
    hits = [expert for expert in needed if slots.lookup(expert) is not None]
    misses = [expert for expert in needed if slots.lookup(expert) is None]
    counters.hits += len(hits)
    counters.misses += len(misses)
    for expert in hits:
        slots.touch(expert)
    if len(needed) <= slots.slots:
        yield from _wave(slots, hits, misses, fill)
        return
    # More than fit. What is resident is used in place first; a part of the misses then settles in free
    # slots, and the rest passes through a quarter of the slots, so the working set of decode survives.
    yield from _wave(slots, hits, [], fill)
    settling, passing = misses[: slots.free], misses[slots.free :]
    if settling:
        yield from _wave(slots, [], settling, fill)
    width = max(1, slots.slots // 4)
    for start in range(0, len(passing), width):
        group = passing[start : start + width]
        yield from _wave(slots, [], group, fill)
        for expert in group:
            slots.retire(expert)


def _wave(slots: LayerSlots, hits: list[int], misses: list[int], fill: Fill) -> Iterator[Places]:
    pinned = list(hits)
    for expert in hits:
        slots.pin(expert)
    try:
        _fill(slots, misses, fill)
        for expert in misses:
            slots.pin(expert)
        pinned += misses
        if pinned:
            yield [(expert, slots.place(expert)) for expert in pinned]
    finally:
        for expert in pinned:
            slots.unpin(expert)


def _fill(slots: LayerSlots, experts: list[int], fill: Fill) -> None:
    """Fill slots with `experts`; if that fails, none of them is resident."""
    if not experts:
        return
    places = [(expert, slots.reserve(expert)) for expert in experts]
    try:
        fill(places)
    except BaseException:
        for expert in experts:
            slots.abandon(expert)
        raise
    for expert in experts:
        slots.publish(expert)
