"""Which frame holds which expert: the arena's book-keeping, and the choice of what leaves when RAM is short.

    FREE --reserve--> STAGING --publish--> READY --(evicted by reserve)--> FREE
                         '----abandon----> FREE, or out of use for good (retire)

A READY frame may be pinned by leases; a pinned frame is never evicted. A lease pins an expert or does not,
however often it asks, so that a message which comes twice changes nothing; and no pin lasts longer than
`PIN_LIMIT`, so that one whose release never comes is not for ever. This file neither reads disks nor talks to
workers: `staging` moves the bytes, `miss_loop` and `control` speak.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable

from common.arena import Entry, OwnedArena, State
from common.expert_key import ExpertKey

# Seconds; far more than a worker takes to make use of a frame, and less than another waits for one. Ending a
# pin early is safe: a reader checks the generation of what it has read (see `common.arena`).
PIN_LIMIT = 10.0


class FrameTable:
    """Owns the arena's directory. Invariant: every frame is free, staging or ready, and in one place only."""

    def __init__(self, arena: OwnedArena, clock: Callable[[], float] = time.monotonic) -> None:
        self.arena = arena
        self._clock = clock
        self.evictions = 0
        self._free = list(range(arena.shape.frames - 1, -1, -1))  # popped from the end: frame 0 first
        self._staging: dict[ExpertKey, int] = {}
        self._ready: OrderedDict[ExpertKey, int] = OrderedDict()  # least recently used first
        self._retired: list[int] = []
        self._pins: dict[ExpertKey, dict[int, float]] = {}  # since when, by lease
        self._held: defaultdict[int, set[ExpertKey]] = defaultdict(set)  # the same by lease
        self._generation = 0

    @property
    def frames(self) -> int:
        return self.arena.shape.frames

    @property
    def ready_count(self) -> int:
        return len(self._ready)

    @property
    def pinned_count(self) -> int:
        return len(self._pins)

    @property
    def usable(self) -> int:
        """Frames that have memory behind them, or may get it."""
        return self.frames - len(self._retired)

    def pinned_by(self, lease: int) -> int:
        return len(self._held.get(lease, ()))

    def pins(self, key: ExpertKey, lease: int) -> bool:
        return lease in self._pins.get(key, ())

    def is_ready(self, key: ExpertKey) -> bool:
        return key in self._ready

    def is_staging(self, key: ExpertKey) -> bool:
        return key in self._staging

    def is_absent(self, key: ExpertKey) -> bool:
        return key not in self._ready and key not in self._staging

    def reserve(self, key: ExpertKey, evict: bool = True) -> int | None:
        """A frame to stage `key` into, or None when all are staging or pinned (or full, without `evict`)."""
        assert self.is_absent(key), f"{key} has a frame already"
        if not self._free and (not evict or not self._evict_one()):
            return None
        frame = self._free.pop()
        self._staging[key] = frame
        self._publish(key, State.STAGING, frame)
        return frame

    def publish(self, key: ExpertKey) -> None:
        """The record lies in its frame, whole."""
        frame = self._staging.pop(key)
        self._ready[key] = frame
        self._publish(key, State.READY, frame)

    def abandon(self, key: ExpertKey) -> None:
        """Staging failed; the frame is free again."""
        self._free.append(self._staging.pop(key))
        self._publish(key, State.ABSENT, 0)

    def retire(self, key: ExpertKey) -> None:
        """The frame has no memory behind it: no other expert is sent there."""
        self._retired.append(self._staging.pop(key))
        self._publish(key, State.ABSENT, 0)

    def reinstate(self) -> None:
        """Try retired frames again: there may be memory for them by now."""
        self._free += self._retired
        self._retired = []

    def touch(self, key: ExpertKey) -> None:
        """Note a use; unknown or staging experts are ignored."""
        if key in self._ready:
            self._ready.move_to_end(key)

    def pin(self, key: ExpertKey, lease: int) -> None:
        assert key in self._ready, f"{key} is not ready"
        self._pins.setdefault(key, {})[lease] = self._clock()
        self._held[lease].add(key)
        self._ready.move_to_end(key)

    def unpin(self, key: ExpertKey, lease: int) -> bool:
        """False if this lease does not pin it (its lease was renewed, or it never did)."""
        pins = self._pins.get(key)
        if not pins or lease not in pins:
            return False
        del pins[lease]
        if not pins:
            del self._pins[key]
        self._held[lease].discard(key)
        if not self._held[lease]:
            del self._held[lease]
        return True

    def unpin_all(self, lease: int) -> None:
        """The lease ended, or its worker says that it makes use of nothing."""
        for key in list(self._held.get(lease, ())):
            self.unpin(key, lease)

    def end_old_pins(self) -> int:
        """End the pins that have lasted `PIN_LIMIT`; returns how many."""
        latest = self._clock() - PIN_LIMIT
        old = [(key, lease) for key, pins in self._pins.items() for lease in pins if pins[lease] < latest]
        for key, lease in old:
            self.unpin(key, lease)
        return len(old)

    def check_integrity(self) -> None:
        """Conservation: free, retired, staging and ready are all frames, each once; only ready are pinned."""
        held = [*self._free, *self._retired, *self._staging.values(), *self._ready.values()]
        assert sorted(held) == list(range(self.frames)), "a frame is lost or held twice"
        assert self._pins.keys() <= self._ready.keys(), "a pinned frame is not ready"
        by_key = {(key, lease) for key, pins in self._pins.items() for lease in pins}
        assert by_key == {(key, lease) for lease, keys in self._held.items() for key in keys}, "a lost pin"
        assert all(self._pins.values()) and all(self._held.values()), "an empty pin"
        for state, table in ((State.STAGING, self._staging), (State.READY, self._ready)):
            for key, frame in table.items():
                entry = self.arena.entry(key)
                assert (entry.state, entry.frame) == (state, frame), f"directory disagrees about {key}"

    def _evict_one(self) -> bool:
        key = next((key for key in self._ready if key not in self._pins), None)
        if key is None:
            return False
        self._free.append(self._ready.pop(key))
        self._publish(key, State.ABSENT, 0)  # withdrawn before anyone writes to the frame
        self.evictions += 1
        return True

    def _publish(self, key: ExpertKey, state: State, frame: int) -> None:
        self._generation += 1
        self.arena.publish(key, Entry(state, frame, self._generation))
