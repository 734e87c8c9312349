"""Ways in which clients go about a request, each with the ending that it must have."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.addresses import Address
from common.errors import DeadlineExceeded, Exhausted, InvalidRequest, Unavailable
from gpu_worker.client import Answers, AsyncWorkerClient
from tests.soak.asked import Asked, Book, answer_of, score
from tests.soak.ledger import CANCELLED, DEADLINE, FINISHED, GONE, INVALID, REFUSED, Entry, Ledger, Stopwatch
from tests.soak.relay import relay

LONGEST = 120.0  # seconds that any request may take, with those of everybody else before it
_PATIENCE = 0.6  # seconds within which clients lose it


@dataclass
class Client:
    """One of many; `worker` is its own connection, for as long as it keeps it."""

    number: int
    address: Address
    directory: Path
    worker: AsyncWorkerClient
    book: Book
    ledger: Ledger
    draw: random.Random

    async def run(self, until: float) -> None:
        names, ways = list(WAYS), list(WAYS.values())
        while time.monotonic() < until:
            name, (way, _) = self.draw.choices(list(zip(names, ways, strict=True)), [w for _, w in ways])[0]
            with self.ledger.request(name) as entry:
                await asyncio.wait_for(way(self, entry), LONGEST)
            if entry.ending == REFUSED:
                await asyncio.sleep(self.draw.uniform(0.1, 0.5))

    async def read(
        self,
        worker: AsyncWorkerClient,
        entry: Entry,
        asked: Asked,
        timeout: float | None = None,
        pause: float = 0.0,
        timed: bool = False,
    ) -> None:
        """To the end, which is the right answer or a refusal for want of room."""
        answers, watch = Answers(asked.samples), Stopwatch()
        finished: set[int] = set()
        try:
            async for event in worker.generate(
                asked.prompt,
                samples=asked.samples,
                priority=self.draw.choice((-1, 0, 0, 0, 1)),
                timeout=timeout,
                **asked.sampling,
            ):
                if event.index in finished:
                    return entry.wrong(f"continuation {event.index} goes on after its finish")
                answers.add(event)
                if event.HasField("finish"):
                    finished.add(event.index)
                elif event.delta.tokens:
                    watch.token(event.index)
                if pause:
                    await asyncio.sleep(pause)
        except Exhausted:
            return entry.end(REFUSED)
        if answer_of(answers.complete()) != asked.answer:
            return entry.wrong(f"{asked} was answered by {answer_of(answers.complete())}")
        if timed:
            watch.note(self.ledger)
        return entry.end(FINISHED)

    def one(self) -> Asked:
        return self.draw.choice(self.book.asked)

    async def impatience(self) -> None:
        await asyncio.sleep(self.draw.uniform(0, _PATIENCE))


async def answered(client: Client, entry: Entry) -> None:
    await client.read(client.worker, entry, client.one(), timed=True)


async def slowly(client: Client, entry: Entry) -> None:
    """A client that dawdles over each token."""
    await client.read(client.worker, entry, client.one(), pause=client.draw.uniform(0.01, 0.2))


async def anything(client: Client, entry: Entry) -> None:
    """Random tokens, at random lengths and temperatures: nothing is known of the answer but its form."""
    draw, vocabulary = client.draw, client.book.vocabulary
    prompt = [draw.randrange(vocabulary) for _ in range(draw.choice((1, 3, 20, 64, 200)))]
    samples, new = draw.choice((1, 1, 2, 5)), draw.randint(1, 24)
    options = {"temperature": draw.choice((0.0, 0.7, 5.0)), "top_k": draw.choice((0, 1, 40)), "logprobs": 2}
    try:
        answers = await client.worker.answers(
            prompt, samples=samples, max_new_tokens=new, ignore_eos=True, **options
        )
    except Exhausted:
        return entry.end(REFUSED)
    for answer in answers:
        if len(answer.token_ids) != new or not all(0 <= token < vocabulary for token in answer.token_ids):
            return entry.wrong(f"{len(answer.token_ids)} tokens instead of {new}: {answer}")
    return entry.end(FINISHED)


async def cancelled(client: Client, entry: Entry) -> None:
    reader = asyncio.create_task(client.read(client.worker, entry, client.one()))
    await client.impatience()
    reader.cancel()
    await asyncio.wait([reader])
    if reader.cancelled():
        entry.end(CANCELLED)
    else:
        reader.result()


async def with_deadline(client: Client, entry: Entry) -> None:
    limit, started = client.draw.uniform(0.001, _PATIENCE), time.monotonic()
    try:
        await client.read(client.worker, entry, client.one(), timeout=limit)
    except DeadlineExceeded:
        took = time.monotonic() - started
        entry.end(DEADLINE) if took < limit + 10 else entry.wrong(f"{took:.1f} s for a limit of {limit:.1f}")


async def channel_closed(client: Client, entry: Entry) -> None:
    """Closes its whole connection in the middle."""
    worker = AsyncWorkerClient(client.address, retry_for=0)
    reader = asyncio.create_task(client.read(worker, entry, client.one()))
    await client.impatience()
    await worker.close()
    await asyncio.wait([reader])
    cut = reader.cancelled() or isinstance(reader.exception(), (Unavailable, grpc.aio.UsageError))
    entry.end(GONE) if cut else reader.result()


async def socket_cut(client: Client, entry: Entry) -> None:
    """Its connection is cut, and nobody is told."""
    path = client.directory / f"relay-{client.number}.sock"
    async with (
        relay(path, client.address) as between,
        AsyncWorkerClient(between.address, retry_for=0) as worker,
    ):
        reader = asyncio.create_task(client.read(worker, entry, client.one()))
        await client.impatience()
        between.cut()
        await asyncio.wait([reader])
    entry.end(GONE) if isinstance(reader.exception(), Unavailable) else reader.result()


async def mistaken(client: Client, entry: Entry) -> None:
    draw, vocabulary = client.draw, client.book.vocabulary
    prompt, sampling = draw.choice(
        (
            ([vocabulary], {}), ([], {}), ([1], {"temperature": -1.0}), ([1], {"top_p": 2.0}),
            ([1], {"max_new_tokens": 0}), ([1] * 100_000, {}), ([1], {"min_p": float("nan")}),
        )
    )  # fmt: skip
    try:
        await client.worker.answers(prompt, **sampling)
    except InvalidRequest:
        return entry.end(INVALID)
    return entry.wrong(f"accepted: {prompt[:3]} {sampling}")


async def scored(client: Client, entry: Entry) -> None:
    try:
        logprobs = await score(client.worker, client.book.scored)
    except Exhausted:
        return entry.end(REFUSED)
    entry.end(FINISHED) if logprobs == client.book.logprobs else entry.wrong(f"scored as {logprobs}")
    return None


Way = Callable[[Client, Entry], Awaitable[None]]
WAYS: dict[str, tuple[Way, int]] = {  # how many of a hundred do so
    "answered": (answered, 52),
    "slowly": (slowly, 3),
    "anything": (anything, 12),
    "cancelled": (cancelled, 10),
    "deadline": (with_deadline, 8),
    "channel closed": (channel_closed, 5),
    "socket cut": (socket_cut, 4),
    "mistaken": (mistaken, 4),
    "scored": (scored, 2),
}
