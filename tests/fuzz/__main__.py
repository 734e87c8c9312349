"""Runs the fuzz and says what came of it.

    scripts/fuzz [--seed 0] [--first 0] [--scale 1.0] [--doors files frames rpc http schema]

At scale 1 more than 100,000 cases, against processes of its own: the demo model on the CPU. What was found is
printed with its door, seed and number; `--first NUMBER --scale 0` has that case again. Exits 1 if there was
anything, or if a process has ended or is not at rest afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from tests.fuzz import files, frames, http, rpc
from tests.fuzz.processes import check_alive, front_and_pair
from tests.fuzz.tally import Tally
from tests.system.processes import Pair

CASES = {"files": 15_000, "frames": 60_000, "rpc": 25_000, "http": 5_000, "schema": 50}
_SLICE = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of cases")
    parser.add_argument("--doors", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of tensors that have no place in a model
    faults: list[str] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        processes = None
        if args.doors != ["files"]:
            processes = stack.enter_context(front_and_pair(directory / "run"))
        for door in args.doors:
            tally = Tally(door, args.seed)
            count = max(1, int(CASES[door] * args.scale))
            fuzz(tally, range(args.first, args.first + count), _door(door, directory, processes))
            tally.faults += [] if processes is None else check_alive(processes[0])
            print(f"{door}: {tally.outcomes.total()} cases, {len(tally.faults)} faults")
            print(
                "   ",
                ", ".join(f"{count} {name}" for name, count in tally.outcomes.most_common()),
                flush=True,
            )
            faults += tally.faults
    print(*(f"!! {fault}" for fault in faults[:50]), sep="\n")
    sys.exit(bool(faults))


def fuzz(tally: Tally, numbers: range, run: Callable[[Tally, range], None]) -> None:
    """In slices, so that whoever waits sees that it goes on, and from where it could."""
    for first in numbers[::_SLICE]:
        run(tally, range(first, min(first + _SLICE, numbers.stop)))
        print(f"{tally.door}: to {first + _SLICE}, {len(tally.faults)} faults", file=sys.stderr, flush=True)


def _door(name: str, directory: Path, processes: tuple[Pair, str] | None) -> Callable[[Tally, range], None]:
    if name == "files":
        return partial(files.run, victims=files.make_victims(directory))
    assert processes is not None
    pair, url = processes
    if name == "frames":
        return partial(frames.run, store=pair.store_address)
    if name == "schema":
        return lambda tally, numbers: http.by_schema(tally, len(numbers), url)
    if name == "http":
        return lambda tally, numbers: asyncio.run(http.run(tally, numbers, url))
    addresses = pair.worker_address, pair.store_address
    return lambda tally, numbers: asyncio.run(rpc.run(tally, numbers, *addresses))


if __name__ == "__main__":
    main()
