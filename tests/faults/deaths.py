"""Processes that die or stand still."""

from __future__ import annotations

import random
import signal
import time

from common.errors import Unavailable
from tests.faults.case import Case
from tests.faults.rig import Rig

EVERYBODY = {0, 1}
STILL = 5.0


class KillWorker(Case):
    name = "kill -9 worker"
    expected = "its requests end Unavailable; the other worker's are right; a new one serves"
    errors = (Unavailable,)

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        victim = draw.randrange(len(rig.workers))
        rig.workers[victim].kill()
        rig.restart_worker(victim)
        return {victim}


class StopWorker(Case):
    expected = "the other worker's requests are right, none takes over 5 s; its own are right, late"
    bystanders = 5.0  # as ever, or once the lease of the one that stands still has ended

    def __init__(self, seconds: float = STILL) -> None:
        self.name = f"SIGSTOP worker, {seconds:g} s"
        self._seconds = seconds

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        victim = draw.randrange(len(rig.workers))
        rig.workers[victim].signal(signal.SIGSTOP)
        time.sleep(self._seconds)
        rig.workers[victim].signal(signal.SIGCONT)
        return {victim}


class KillStore(Case):
    name = "kill -9 store"
    expected = "requests wait 5 s for a successor, else end Unavailable; right once it is there"
    errors = (Unavailable,)

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.store.kill()
        time.sleep(draw.choice([0, 0, 3, 6]))
        rig.start_store()
        return EVERYBODY


class KillStoreThatHoldsAll(Case):
    name = "kill -9 store, all experts in RAM"
    expected = "nobody notices: every request is right, before and after it is back"
    frames = None

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.store.kill()
        time.sleep(draw.choice([0, 2, 6]))
        rig.start_store()
        return set()


class StopStore(Case):
    name = "SIGSTOP store, 5 s"
    expected = "requests wait and are right, late; or Unavailable after 5 s without a store"
    errors = (Unavailable,)

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        rig.store.signal(signal.SIGSTOP)
        time.sleep(STILL)
        rig.store.signal(signal.SIGCONT)
        return EVERYBODY


CASES = [KillWorker(), StopWorker(), KillStore(), KillStoreThatHoldsAll(), StopStore()]
