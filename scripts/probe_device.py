"""Measures this machine's GPU and its link to memory: a table, then one JSON line.

    .venv/bin/python scripts/probe_device.py [--gigabytes 20]

Records of the 30B's size lie in an arena that another process owns, as a store's do. What is measured first
is how long CUDA takes to register it, mapped read-only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common.arena import ArenaShape, Entry, MappedArena, OwnedArena, State
from common.expert_key import ExpertKey
from gpu_worker.cuda import probe
from gpu_worker.cuda.host_memory import RegisteredArena

STRIDE = 6_500_352  # a record of the 30B at 5 bits
DIGEST = "0" * 32
PROGRAMS = (4, 8, 16, 32, 64, 132)
BATCHES = (6, 48, 138)

Row = tuple[str, float, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the arena")
    records = int(parser.parse_args().gigabytes * 1e9) // STRIDE
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here")
    device = torch.device("cuda")
    with foreign_arena(records) as arena:
        rows = list(measure(arena, device))
    table = Table(title=torch.cuda.get_device_name(device), show_header=False)
    for what, value, unit in rows:
        table.add_row(what, f"{value:.4g} {unit}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    print(json.dumps({**machine, "results": [{"what": w, "value": v, "unit": u} for w, v, u in rows]}))


def measure(arena: MappedArena, device: torch.device) -> Iterator[Row]:
    started = time.perf_counter()
    registered = RegisteredArena(arena, device)
    size = arena.frames.nbytes / 1e9
    yield f"registering {size:.1f} GB of another process", time.perf_counter() - started, "s"
    frames = arena.frames[:138]
    pool = torch.empty(frames.shape, dtype=torch.uint8, device=device)
    yield "host to device, one copy", probe.copy_engine(frames, pool) / 1e9, "GB/s"
    for count in BATCHES:
        rate = probe.batched_copies(frames, pool, count)
        yield f"host to device, {count} records in one call", rate / 1e9, "GB/s"
    for programs in PROGRAMS:
        rate = probe.kernel_reads(frames, pool, programs)
        yield f"host to device, read by {programs} programs", rate / 1e9, "GB/s"
    assert torch.equal(pool[:3].cpu(), frames[:3]), "records arrived damaged"
    yield "device copy, read and written", probe.device_copies(2 << 30, device) / 1e9, "GB/s"
    yield "launch, eager", probe.eager_launch(device) * 1e6, "us"
    yield "launch, a graph's node", probe.graph_node(device) * 1e6, "us"
    yield "device to host and back", probe.round_trip(device) * 1e6, "us"
    registered.close()


@contextmanager
def foreign_arena(records: int) -> Iterator[MappedArena]:
    """An arena of random records that a child process owns, mapped here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_own, args=(records, there))
    owner.start()
    try:
        yield MappedArena(Path(here.recv()), DIGEST)
    finally:
        here.send(None)
        owner.join()


def _own(records: int, pipe: Connection) -> None:
    arena = OwnedArena(ArenaShape(DIGEST, 1, records, records, STRIDE))
    arena.commit(list(range(records)))
    pattern = torch.randint(256, (STRIDE,), dtype=torch.uint8)
    for frame in range(records):
        arena.frames[frame] = pattern.roll(frame)
        arena.publish(ExpertKey(0, frame), Entry(State.READY, frame, 1))
    pipe.send(str(arena.path))
    pipe.recv()
    arena.close()


if __name__ == "__main__":
    main()
