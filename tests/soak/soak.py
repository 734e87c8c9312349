"""One soak of processes that run: questions and answers first, then everybody at once, then what is left."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.addresses import Address
from common.units import format_bytes
from gpu_worker.client import AsyncWorkerClient
from tests.soak.asked import Book, check_book, write_book
from tests.soak.clients import Client
from tests.soak.front import Front, FrontClient
from tests.soak.ledger import Ledger
from tests.soak.watch import Watch

WARM = 0.4  # of the time, after which memory must be flat
GROWTH = 1 << 20  # bytes a minute that it may seem to grow by then: allocators and the line through them err


@dataclass(frozen=True)
class Plan:
    """Where to, and how hard."""

    worker: Address
    store: Address
    gateway: str | None = None  # its URL
    clients: int = 64
    gateway_clients: int = 8  # of these, if there is one
    seconds: float = 60.0
    seed: int = 0
    questions: int = 24
    growth: float | None = GROWTH  # None: too short to tell


@dataclass(frozen=True)
class Outcome:
    """What there is to say in the end."""

    plan: Plan
    ledger: Ledger
    watch: Watch
    seconds: float
    prefix_hits: int
    staged: int

    @property
    def faults(self) -> list[str]:
        """All that must not be."""
        found = [*self.ledger.faults, *self.watch.faults]
        if self.ledger.open or sum(self.ledger.asked.values()) != sum(self.ledger.endings.values()):
            found.append(f"asked {self.ledger.asked}, ended {self.ledger.endings}, open {self.ledger.open}")
        if self.plan.growth is not None:
            found += [
                f"the {name} grows by {format_bytes(int(60 * growth))} a minute"
                for name in self.watch.resident
                if 60 * (growth := self.watch.growth(name, WARM)) > self.plan.growth
            ]
        return found

    def figures(self) -> dict[str, Any]:
        ledger, watch = self.ledger, self.watch
        return {
            "clients": self.plan.clients,
            "seconds": round(self.seconds, 1),
            "requests": sum(ledger.asked.values()),
            "asked": dict(ledger.asked.most_common()),
            "endings": dict(ledger.endings.most_common()),
            "first_token_ms": _percentiles(ledger.first_token),
            "between_tokens_ms": _percentiles(ledger.between_tokens),
            "prefix_hits": self.prefix_hits,
            "staged": self.staged,
            "most": watch.most,
            "resident_mb": {
                name: [sizes[0] >> 20, sizes[-1] >> 20] for name, sizes in watch.resident.items()
            },
            "growth_kb_a_minute": {
                name: round(60 * watch.growth(name, WARM) / 1024) for name in watch.resident
            },
            "faults": len(self.faults),
        }


async def soak(plan: Plan) -> Outcome:
    """Raises whatever keeps it from asking at all; what clients meet is in the outcome."""
    ledger, front = Ledger(), Front(plan.gateway) if plan.gateway else None
    async with AsyncWorkerClient(plan.worker) as worker:
        book = await write_book(worker, plan.seed, plan.questions)
        watch = Watch(worker, plan.store, front)
        at_rest, before, started = await watch.counts(), await worker.stats(), time.monotonic()
        watching = asyncio.create_task(watch.run())
        with tempfile.TemporaryDirectory() as directory:
            await _everybody(plan, book, ledger, front, Path(directory))
        seconds = time.monotonic() - started
        watching.cancel()
        await asyncio.wait([watching])
        if not watching.cancelled():
            watch.faults.append(f"watching ended: {watching.exception()}")
        await watch.check_rest(at_rest)
        ledger.faults += await check_book(worker, book)
        await watch.check_rest(at_rest)
        after = await worker.stats()
    if front is not None:
        await front.close()
    hits, staged = after.prefix_hits - before.prefix_hits, after.cache.staged - before.cache.staged
    return Outcome(plan, ledger, watch, seconds, hits, staged)


async def _everybody(plan: Plan, book: Book, ledger: Ledger, front: Front | None, directory: Path) -> None:
    """All clients at once, each with a connection and a seed of its own."""
    until = time.monotonic() + plan.seconds
    others = plan.gateway_clients if front is not None else 0
    workers = [AsyncWorkerClient(plan.worker, retry_for=0) for _ in range(plan.clients - others)]
    draws = [random.Random(f"{plan.seed} {number}") for number in range(plan.clients)]
    clients: list[Client | FrontClient] = [
        Client(number, plan.worker, directory, worker, book, ledger, draws[number])
        for number, worker in enumerate(workers)
    ]
    if front is not None:
        clients += [FrontClient(front, book, ledger, draw) for draw in draws[len(workers) :]]
    await asyncio.gather(*(client.run(until) for client in clients))
    for worker in workers:
        await worker.close()


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {
        f"p{part}": round(1e3 * ordered[min(len(ordered) * part // 100, len(ordered) - 1)], 1)
        for part in (50, 99)
    }
