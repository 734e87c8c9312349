"""One layer's slots: which expert lies where, and which of them must stay.

    FREE --reserve--> FILLING --publish--> RESIDENT --(evicted by reserve)--> FREE
                         '---abandon---> FREE

A RESIDENT slot may be pinned while a wave computes from it; a pinned slot is never evicted. Book-keeping
only: bytes are moved by `fetch`, victims chosen by `policies`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gpu_worker.slots.policies import FADING, RETIRED, Policy, Usage


class LayerState(NamedTuple):
    """What there is to know of one layer's slots between steps; lists by slot unless said."""

    clock: int
    experts: list[int]  # -1 when free
    last_used: list[int]  # the clock at the last use
    uses: list[int]  # by expert: steps that chose it, those longer ago for less


class LayerSlots:
    """Owns the slots of one layer. Invariant: every slot is free, filling or resident, in one place only."""

    def __init__(self, slots: int, experts: int, policy: Policy) -> None:
        assert slots >= 1
        self.slots = slots
        self._policy = policy
        self._clock = 0
        self._last_used = [0] * slots
        self._uses = [0] * experts
        self._free = list(range(slots - 1, -1, -1))  # popped from the end: slot 0 first
        self._filling: dict[int, int] = {}  # expert -> slot
        self._resident: dict[int, int] = {}  # expert -> slot
        self._pins: set[int] = set()  # experts

    @classmethod
    def resumed(cls, state: LayerState, policy: Policy) -> LayerSlots:
        """Slots that go on from `state`."""
        slots = cls(len(state.experts), len(state.uses), policy)
        slots._clock, slots._last_used, slots._uses = state.clock, [*state.last_used], [*state.uses]
        slots._resident = {expert: slot for slot, expert in enumerate(state.experts) if expert >= 0}
        slots._free = [slot for slot in range(slots.slots - 1, -1, -1) if state.experts[slot] < 0]
        return slots

    def state(self) -> LayerState:
        """For others to go on from; nothing may be filling."""
        assert not self._filling
        experts = [-1] * self.slots
        for expert, slot in self._resident.items():
            experts[slot] = expert
        return LayerState(self._clock, experts, [*self._last_used], [*self._uses])

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def pinned(self) -> int:
        return len(self._pins)

    def lookup(self, expert: int) -> int | None:
        """The slot of a resident expert; no use is noted."""
        return self._resident.get(expert)

    def place(self, expert: int) -> int:
        """The slot of an expert that must be resident."""
        return self._resident[expert]

    def begin(self, chosen: Iterable[int]) -> None:
        """A new step of this layer begins, and will use these experts."""
        self._clock += 1
        if self._clock % FADING == 0:
            self._uses = [(uses + 1) // 2 for uses in self._uses]
        for expert in chosen:
            self._uses[expert] += 1

    def touch(self, expert: int) -> None:
        """This step uses a resident expert."""
        self._last_used[self._resident[expert]] = self._clock

    def retire(self, expert: int) -> None:
        """Let a resident expert be the next victim: it only passed through."""
        self._last_used[self._resident[expert]] = RETIRED

    def reserve(self, expert: int) -> int:
        """A slot to fill with `expert`; evicts by policy when none is free. One must be unpinned."""
        assert expert not in self._resident and expert not in self._filling, f"expert {expert} has a slot"
        if not self._free:
            self._evict_one()
        slot = self._free.pop()
        self._filling[expert] = slot
        return slot

    def publish(self, expert: int) -> None:
        """The record lies in its slot, whole."""
        slot = self._filling.pop(expert)
        self._resident[expert] = slot
        self._last_used[slot] = self._clock

    def abandon(self, expert: int) -> None:
        """The fetch failed; the slot is free again."""
        self._free.append(self._filling.pop(expert))

    def pin(self, expert: int) -> None:
        assert expert in self._resident and expert not in self._pins
        self._pins.add(expert)

    def unpin(self, expert: int) -> None:
        self._pins.remove(expert)

    def check_integrity(self) -> None:
        """Conservation: free + filling + resident = all slots, each once; only resident ones are pinned."""
        held = [*self._free, *self._filling.values(), *self._resident.values()]
        assert sorted(held) == list(range(self.slots)), "a slot is lost or held twice"
        assert not self._filling.keys() & self._resident.keys(), "an expert is filling and resident"
        assert self._pins <= self._resident.keys(), "a pinned expert is not resident"

    def _evict_one(self) -> None:
        evictable = {slot: expert for expert, slot in self._resident.items() if expert not in self._pins}
        assert evictable, "every slot is pinned or filling"
        usage = [
            (slot, Usage(self._last_used[slot], self._uses[evictable[slot]])) for slot in sorted(evictable)
        ]
        victim = self._policy(self._clock, usage)
        self._free.append(self._resident.pop(evictable[victim]))
