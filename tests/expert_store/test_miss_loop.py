"""The data plane inside one process: exactly one reply a request, and pins that come and go with them."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from common.arena import ArenaShape, OwnedArena
from common.checkpoint import PackedCheckpoint
from common.expert_key import ExpertKey
from common.messages import Done, Failed, Fault, Kind, Reply, Staged, request, unpack_reply
from expert_store import miss_loop
from expert_store.frames import FrameTable
from expert_store.leases import LeaseTable
from expert_store.miss_loop import MissLoop
from expert_store.staging import Stager
from tests.helpers.models import make_hf_model, pack_model

LAYERS, EXPERTS = 2, 8
A, B = ExpertKey(0, 1), ExpertKey(1, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    directory = tmp_path_factory.mktemp("model")
    return pack_model(make_hf_model(directory / "hf"), directory / "packed")


@dataclass
class Plane:
    """A data plane and one peer of it."""

    frames: FrameTable
    leases: LeaseTable
    stager: Stager
    socket: zmq.Socket[bytes]

    def send(self, kind: Kind, request_id: int, lease: int, *keys: ExpertKey) -> None:
        self.socket.send(request(kind, request_id, lease, keys))

    async def receive(self, within: float = 20.0) -> Reply | None:
        """The next reply; the loop runs meanwhile."""
        deadline = asyncio.get_running_loop().time() + within
        while not self.socket.poll(0):
            if asyncio.get_running_loop().time() > deadline:
                return None
            await asyncio.sleep(0.002)
        return unpack_reply(self.socket.recv())

    async def ask(self, kind: Kind, request_id: int, lease: int, *keys: ExpertKey) -> Reply | None:
        self.send(kind, request_id, lease, *keys)
        return await self.receive()


@asynccontextmanager
async def plane(checkpoint: PackedCheckpoint, directory: Path, frames: int) -> AsyncIterator[Plane]:
    layout = checkpoint.layout
    arena = OwnedArena(ArenaShape(layout.digest, LAYERS, EXPERTS, frames, layout.stride))
    table = FrameTable(arena)
    leases = LeaseTable(
        60.0, ended=lambda lease: (table.unpin_all(lease), stager.drop(lease), stager.released())
    )
    stager = Stager(checkpoint, table, leases)
    loop = MissLoop(directory / "data", table, leases, stager)
    loop.start()
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(loop.endpoint)
            yield Plane(table, leases, stager, socket)
    finally:
        loop.close()
        stager.close()
        arena.close()


def test_a_staged_expert_is_pinned_until_it_is_released(checkpoint: PackedCheckpoint, tmp_path: Path) -> None:
    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=2) as p:
            lease = p.leases.attach("worker", 1).lease_id
            assert await p.ask(Kind.STAGE, 1, lease, A) == Staged(1)
            assert p.frames.is_ready(A)
            assert p.frames.pinned_by(lease) == 1
            assert await p.ask(Kind.RELEASE, 2, lease, A) == Done(2)
            assert p.frames.pinned_by(lease) == 0
            p.frames.check_integrity()

    asyncio.run(run())


def test_no_frame_in_time_is_said_once_and_pins_nothing_later(
    checkpoint: PackedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miss_loop, "STAGE_TIMEOUT", 0.1)

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=1) as p:
            first, second = (p.leases.attach("worker", pid).lease_id for pid in (1, 2))
            assert await p.ask(Kind.STAGE, 1, first, A) == Staged(1)
            refused = await p.ask(Kind.STAGE, 2, second, B)
            assert isinstance(refused, Failed)
            assert (refused.request_id, refused.fault) == (2, Fault.NO_FRAME)
            assert await p.ask(Kind.RELEASE, 3, first, A) == Done(3)
            assert await p.receive(within=0.3) is None
            assert p.frames.pinned_count == 0

    asyncio.run(run())


def test_a_lease_that_ends_while_the_disk_is_read_pins_nothing(
    checkpoint: PackedCheckpoint, tmp_path: Path
) -> None:
    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=1) as p:
            first, second = (p.leases.attach("worker", pid).lease_id for pid in (1, 2))
            assert await p.ask(Kind.STAGE, 1, first, A) == Staged(1)
            p.send(Kind.STAGE, 2, second, B)  # waits for the only frame
            assert await p.receive(within=0.1) is None
            p.leases.detach(second)
            p.send(Kind.RELEASE, 3, first, A)
            refused, released = await p.receive(), await p.receive()
            assert released == Done(3)
            assert isinstance(refused, Failed)
            assert (refused.request_id, refused.fault) == (2, Fault.NO_LEASE)
            assert p.frames.pinned_count == 0
            assert p.frames.is_absent(B)  # nobody reads for the dead

    asyncio.run(run())


def test_what_cannot_be_read_is_said(
    checkpoint: PackedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stager, run: object) -> float:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Stager, "_read", fail)

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=2) as p:
            lease = p.leases.attach("worker", 1).lease_id
            reply = await p.ask(Kind.STAGE, 1, lease, A)
            assert isinstance(reply, Failed)
            assert reply.fault is Fault.UNREADABLE
            assert "Input/output error" in reply.text
            p.frames.check_integrity()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_of_two_leases(checkpoint: PackedCheckpoint, tmp_path: Path, seed: int) -> None:
    """Three frames, sixteen experts: every request gets one reply, and in the end nothing is pinned."""
    rng = random.Random(seed)

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=3) as p:
            leases = [p.leases.attach("worker", pid).lease_id for pid in (1, 2)]
            answered: dict[int, Reply] = {}
            held: dict[int, tuple[int, ExpertKey]] = {}
            sent = 0
            while len(answered) < 150:
                if sent < 150:
                    sent += 1
                    lease = rng.choice(leases)
                    key = ExpertKey(rng.randrange(LAYERS), rng.randrange(EXPERTS))
                    kind = rng.choice([Kind.STAGE, Kind.STAGE, Kind.HINT, Kind.RELEASE])
                    p.send(kind, sent, lease, key)
                    if kind is Kind.STAGE:
                        held[sent] = (lease, key)
                reply = await p.receive(within=0.01 if sent < 150 else 20.0)
                if reply is None:
                    continue
                assert reply.request_id not in answered, "two replies to one request"
                answered[reply.request_id] = reply
                p.frames.check_integrity()
                if isinstance(reply, Staged):  # release at once, as a worker that has copied it
                    lease, key = held[reply.request_id]
                    p.send(Kind.RELEASE, 1000 + reply.request_id, lease, key)
                    answered.pop(reply.request_id)
                elif reply.request_id > 1000:
                    answered[reply.request_id - 1000] = answered.pop(reply.request_id)
            assert await p.receive(within=0.1) is None
            for lease in leases:
                p.leases.detach(lease)
            assert p.frames.pinned_count == 0
            p.frames.check_integrity()

    asyncio.run(run())


def test_the_same_again_while_it_waits_gets_one_reply(checkpoint: PackedCheckpoint, tmp_path: Path) -> None:
    """A worker that hears nothing asks again; once answered, the same is answered anew and pins no more."""

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=2) as p:
            lease, other = (p.leases.attach("worker", pid).lease_id for pid in (1, 2))
            assert await p.ask(Kind.STAGE, 1, other, A) == Staged(1)
            assert await p.ask(Kind.STAGE, 2, lease, B) == Staged(2)
            for _ in range(3):
                p.send(Kind.STAGE, 3, lease, A)  # its share is one frame
            assert await p.receive(within=0.1) is None
            assert await p.ask(Kind.RELEASE, 4, lease) in (Done(4), Staged(3))
            assert await p.receive() in (Done(4), Staged(3))
            assert await p.receive(within=0.1) is None
            assert await p.ask(Kind.STAGE, 3, lease, A) == Staged(3)
            assert p.frames.pinned_by(lease) == 1
            assert await p.ask(Kind.RELEASE, 5, lease, A) == Done(5)
            assert p.frames.pinned_by(lease) == 0

    asyncio.run(run())


def test_a_lease_has_a_bounded_number_of_demands(
    checkpoint: PackedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miss_loop, "MOST_WAITING", 3)

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=1) as p:
            first, second = (p.leases.attach("worker", pid).lease_id for pid in (1, 2))
            assert await p.ask(Kind.STAGE, 1, first, A) == Staged(1)
            for number in range(2, 6):
                p.send(Kind.STAGE, number, second, ExpertKey(1, number))
            refused = await p.receive()
            assert isinstance(refused, Failed)
            assert (refused.request_id, refused.fault) == (5, Fault.BUSY)

    asyncio.run(run())


def test_a_slow_disk_is_not_called_a_lack_of_frames(
    checkpoint: PackedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miss_loop, "STAGE_TIMEOUT", 0.1)
    monkeypatch.setattr(Stager, "_read", lambda self, run: time.sleep(0.5) or 0.5)

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=4) as p:
            lease = p.leases.attach("worker", 1).lease_id
            for number, expert in enumerate(range(3), start=1):  # the third waits for one of two readers
                p.send(Kind.STAGE, number, lease, ExpertKey(0, expert))
            for _ in range(3):
                late = await p.receive()
                assert isinstance(late, Failed)
                assert late.fault is Fault.TOO_SLOW and "the disk" in late.text

    asyncio.run(run())


@pytest.mark.parametrize("kind", [Kind.HINT, Kind.STAGE])
def test_a_peer_that_floods_lets_the_loop_go_on(
    checkpoint: PackedCheckpoint, tmp_path: Path, kind: Kind
) -> None:
    """A thousand messages are there; what else the loop has to do comes in between."""

    async def run() -> None:
        async with plane(checkpoint, tmp_path, frames=2) as p:
            lease = p.leases.attach("worker", 1).lease_id
            p.send(Kind.STAGE, 1, lease, A)
            assert isinstance(await p.receive(), Staged)
            for number in range(2, 1002):
                p.send(kind, number, lease, A)
            time.sleep(0.2)
            most = answered = 0
            while answered < 1000:
                await asyncio.sleep(0)
                before = answered
                while p.socket.poll(0):
                    p.socket.recv()
                    answered += 1
                most = max(most, answered - before)
            assert most <= 2 * 256  # by the reader and by the second look

    asyncio.run(run())
