"""Whether the device copies experts ahead, and what that has brought: judged while serving.

A guess costs no time on the link that anybody else wants, but it takes a slot that would have been taken only
at the next miss. So with `auto` copying ahead goes on as long as enough guesses are right. Not done here:
guessing and copying (`step_experts`, `kernels.prefetch`), hints to the store (`gpu_worker.slots.hints`).
"""

from __future__ import annotations

from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.staging_ring import StagingRing
from gpu_worker.slots.hints import HintCounters

# With `auto`: judged over so many steps; off below the useful share, and tried again after so many more.
_JUDGED_STEPS = 256
_USEFUL_SHARE = 1 / 3
_RETRY_STEPS = 4096


class FetchAhead:
    """Switches it for one worker; `mode` is on, off or auto. For the engine's thread alone."""

    def __init__(self, mode: str, cache: DeviceSlots, ring: StagingRing, able: bool) -> None:
        """`ring`: what fetches ahead for prompts, which is told with the rest and not judged; `able`: whether
        steps can guess: the device drives them, and routers of a kind it knows."""
        self.mode, self._able = mode, able
        self._cache, self._ring = cache, ring
        self._steps = self._paused_until = 0
        self._judged = HintCounters()

    @property
    def counters(self) -> HintCounters:
        """Experts copied ahead of steps, and those of them that were chosen; bytes are of prompts as well.
        Waits for the device."""
        made, useful, copied = map(sum, zip(*self._cache.awaited.counters.tolist(), strict=True))
        needed = useful * self._cache.pool.shape[2]  # what was chosen is copied to its end
        wasted = copied - needed + self._ring.wasted_bytes
        return HintCounters(made, useful, needed + self._ring.useful_bytes, wasted)

    def describe(self) -> str:
        """What is in force, and why."""
        if self.mode == "off":
            return "off (asked for)"
        if self._cache.holds_all:
            return "off (every expert has its slot)"
        if not self._able:
            return "off (steps of this model, or so few slots, cannot guess)"
        if self._paused_until > self._steps:
            return f"off (fewer than {_USEFUL_SHARE:.0%} of the last guesses were right)"
        return f"on ({'experts are copied ahead' if self.mode == 'auto' else 'asked for'})"

    def before_step(self) -> None:
        """Before every step that the device drives, once the last one's results were looked at."""
        self._steps += 1
        if self.mode != "auto" or not self._able or self._steps % _JUDGED_STEPS:
            return
        now, before = self.counters, self._judged
        self._judged = now
        if self._paused_until == self._steps:
            self._cache.ahead.fill_(1)
        elif now.useful - before.useful < _USEFUL_SHARE * (now.sent - before.sent):
            self._paused_until = self._steps + _RETRY_STEPS
            self._cache.ahead.fill_(0)
