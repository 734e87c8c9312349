"""Processes for the fuzz: the demo model on the CPU, every expert in memory, and a gateway before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.soak.pair import gateway_of
from tests.system.processes import Pair, eventually, pair_of_processes


@contextmanager
def front_and_pair(runtime: Path) -> Iterator[tuple[Pair, str]]:
    """The pair and the gateway's URL. Whoever uses them says whether they must still live."""
    with pair_of_processes(runtime, "demo") as pair:
        pair.start_store()
        eventually(lambda: pair.store_stats().ready_frames == pair.store_stats().frames, 30, "loading")
        pair.start_worker("--max-sequences", "8", "--max-queue", "64", "--max-context", "512")
        yield pair, gateway_of(pair)


def check_alive(pair: Pair) -> list[str]:
    """What is wrong with the processes once nobody asks any more."""
    faults = [f"{one.log.name} has ended" for one in pair.processes if one.popen.poll() is not None]
    faults += [
        f"{one.log.name}: {line}" for one in pair.processes for line in _complaints(one.log.read_text())
    ]
    if faults:
        return faults
    try:
        eventually(lambda: _at_rest(pair), 60, "rest")
    except AssertionError as error:
        return [f"{error}: {pair.worker_stats()}"]
    return []


def _at_rest(pair: Pair) -> bool:
    worker, store = pair.worker_stats(), pair.store_stats()
    at_work = worker.running or worker.set_aside or worker.waiting
    return not (at_work or worker.places_taken or store.pinned_frames)


def _complaints(log: str) -> list[str]:
    """A traceback in a log is a failure that nobody expected."""
    return [log[log.index("Traceback") :][:2000]] if "Traceback" in log else []
