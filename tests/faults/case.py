"""What a case is, and what one round of it finds: a fault at a random moment, and what comes of it."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field

from common.errors import ServingError
from tests.faults.rig import BOUND, Ending, Rig
from tests.system.processes import eventually

_REST = 15.0  # seconds until nothing is pinned any more: pins end after 10 at the latest


class Case:
    """One fault. Between two rounds everything is as it was before."""

    name = ""
    expected = ""  # for the table
    errors: tuple[type[ServingError], ...] = ()  # that requests to struck workers may end with
    bystanders = BOUND  # seconds within which the requests to all other workers end
    recovery = 10.0  # seconds from the end of the fault until everybody answers right again
    model = ""  # default: a small random one
    frames: int | None = 6

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        """The fault from its beginning to its end; returns the workers whose requests may have `errors`."""
        raise NotImplementedError


@dataclass
class Round:
    """What was observed. `faults` are what must not be, in words."""

    case: str
    seed: int
    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # request, in seconds
    recovered: float = 0.0  # after so many seconds
    faults: list[str] = field(default_factory=list)


def play(case: Case, rig: Rig, seed: int) -> Round:
    draw = random.Random(f"{case.name} {seed}")
    observed = Round(case.name, seed)
    load = rig.load(seed)
    struck: set[int] = set(range(len(rig.addresses)))
    try:
        time.sleep(draw.uniform(0.1, 1.0))
        struck = case.strike(rig, draw)
        rig.calm()
        observed.recovered = rig.recover(case.recovery)
    except (AssertionError, ServingError) as failure:
        observed.faults.append(f"{type(failure).__name__}: {failure}")
    finally:
        rig.calm()
        endings = load.end()
    for ending in endings:
        _judge(case, ending, ending.worker in struck, observed)
    observed.faults += [f"{name} is dead" for name in rig.dead()]
    try:
        eventually(rig.at_rest, _REST, "rest (nothing pinned, nothing running)")
    except (AssertionError, ServingError) as failure:
        observed.faults.append(str(failure))
    return observed


def _judge(case: Case, ending: Ending, struck: bool, observed: Round) -> None:
    observed.slowest = max(observed.slowest, ending.seconds)
    if ending.seconds > (BOUND if struck else case.bystanders):
        observed.faults.append(f"a request to worker {ending.worker} took {ending.seconds:.1f} s")
    if ending.right:
        observed.right += 1
    elif ending.error is None:
        observed.faults.append(f"WRONG: {ending.tokens}")
    else:
        kind = type(ending.error).__name__
        observed.errors[f"{kind}: {ending.error}"] += 1
        if not struck or not isinstance(ending.error, case.errors):
            observed.faults.append(f"worker {ending.worker}: {kind}: {ending.error}")
        if "Traceback" in str(ending.error) or not str(ending.error).strip():
            observed.faults.append(f"a message that says nothing: {ending.error!r}")
