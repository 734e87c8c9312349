"""The processes that are struck, the load that they are under, and what came of every request.

Each request of the load has one right answer, found out beforehand without any fault. It may end with that
answer or with an error that says what is wrong; anything else, or no ending in time, is what is looked for.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc

from common.addresses import Address
from common.errors import ServingError
from common.grpc_client import OPTIONS, channel_to, translate
from common.messages import PROTOCOL_VERSION
from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub
from tests.faults.shim import Shim
from tests.system.processes import Pair, Process, eventually, pair_of_processes

CLIENTS = 2  # of each worker
_PAUSE = 0.3  # seconds, the longest between two requests of a client
BOUND = 60.0  # seconds within which every request ends; the worker's own limits are 30 + 5


class Asked(NamedTuple):
    prompt: tuple[int, ...]
    new: int
    temperature: float

    def message(self) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(
            max_new_tokens=self.new, ignore_eos=True, temperature=self.temperature, seed=self.new
        )
        tokens = pb.TokenIds(ids=self.prompt)
        return pb.GenerateRequest(protocol_version=PROTOCOL_VERSION, token_ids=tokens, sampling=sampling)


def requests() -> list[Asked]:
    """Short and long prompts, greedy and sampled."""
    draw = random.Random(5)
    lengths = [1, 3, 9, 17, 40, 70]
    return [
        Asked(tuple(draw.randrange(96) for _ in range(length)), 12 + 3 * place, 0.8 * (place % 2))
        for place, length in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Ending:
    """How one request ended: `error` is None where an answer came, which is right or not."""

    worker: int
    seconds: float
    right: bool
    error: ServingError | None = None
    tokens: tuple[int, ...] = ()


def ask(address: Address, asked: Asked, within: float = BOUND) -> tuple[int, ...]:
    """The whole answer; raises ServingError. No retries: what a client sees is what counts."""
    tokens: list[int] = []
    finished = False
    with grpc.insecure_channel(str(address), options=OPTIONS) as channel:
        try:
            for event in GpuWorkerStub(channel).Generate(asked.message(), timeout=within):
                tokens += [token.id for token in event.delta.tokens]
                finished |= event.HasField("finish")
        except grpc.RpcError as error:
            raise translate(error, address) from None
    assert finished, "a stream ended without its finish and without an error"
    return tuple(tokens)


class Load:
    """Clients that ask one request after the other until they are told to end."""

    def __init__(self, workers: Sequence[Address], expected: dict[Asked, tuple[int, ...]], seed: int) -> None:
        self.endings: list[Ending] = []
        self._expected = expected
        self._ended = threading.Event()
        clients = [(worker, number) for worker in range(len(workers)) for number in range(CLIENTS)]
        self._threads = [
            threading.Thread(target=self._run, args=(worker, workers[worker], f"{seed} {worker} {number}"))
            for worker, number in clients
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Ending]:
        """Let everybody end what they are at; each has a time limit of its own."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * BOUND)
            assert not thread.is_alive(), "a request did not end within its own time limit"
        return self.endings

    def _run(self, worker: int, address: Address, seed: str) -> None:
        draw = random.Random(seed)
        while not self._ended.is_set():
            asked, started = draw.choice(list(self._expected)), time.monotonic()
            try:
                tokens = ask(address, asked)
                right, error = tokens == self._expected[asked], None
            except ServingError as failure:
                tokens, right, error = (), False, failure
            self.endings.append(Ending(worker, time.monotonic() - started, right, error, tokens))
            self._ended.wait(draw.uniform(0, _PAUSE))


@dataclass
class Rig:
    """A store and its workers, all of which should be alive between one fault and the next."""

    pair: Pair
    given_shim: Shim | None
    addresses: list[Address]
    frames: int | None  # None: everything fits
    record_bytes: int
    store: Process = field(init=False)
    workers: list[Process] = field(init=False, default_factory=list)
    expected: dict[Asked, tuple[int, ...]] = field(init=False, default_factory=dict)

    @property
    def shim(self) -> Shim:
        assert self.given_shim is not None, "this case needs a shim"
        return self.given_shim

    def calm(self) -> None:
        """What the shim does ends."""
        if self.given_shim is not None:
            self.given_shim.set()

    def start(self) -> None:
        self.start_store()
        self.workers = [self.start_worker(number) for number in range(len(self.addresses))]
        self.expected = {asked: ask(self.addresses[0], asked) for asked in requests()}

    def start_store(self) -> Process:
        ram = () if self.frames is None else ("--ram", str(self.frames * self.record_bytes))
        self.store = self.pair.start_store(*ram)
        return self.store

    def start_worker(self, number: int) -> Process:
        """Slots for the first, the frames themselves for the others."""
        address = self.addresses[number]
        slots = "2" if number == 0 else "direct"
        command = ("gpu-worker", "start", "--device", "cpu", "--slots", slots, "--max-sequences", "4")
        return self.pair._start(address, *command, "--listen", str(address))

    def restart_worker(self, number: int) -> None:
        """It may have been killed."""
        self.workers[number].stop()
        self.workers[number] = self.start_worker(number)

    def restart_store(self) -> None:
        self.store.stop()
        self.start_store()

    @contextmanager
    def leases(self) -> Iterator[Callable[[], None]]:
        """Ends every lease when called, as the store does when it has not heard of a worker."""
        with channel_to(self.pair.store_address) as channel:
            store = ExpertStoreStub(channel)
            leases = store.Stats(store_pb.StoreStatsRequest(), timeout=10).leases

            def end_all() -> None:
                for lease in leases:
                    store.Detach(store_pb.DetachRequest(lease_id=lease.lease_id), timeout=10)

            yield end_all

    def dead(self) -> list[str]:
        """Those of the processes that should live and do not."""
        named = {"store": self.store} | {f"worker {n}": worker for n, worker in enumerate(self.workers)}
        return [name for name, process in named.items() if process.popen.poll() is not None]

    def load(self, seed: int) -> Load:
        return Load(self.addresses, self.expected, seed)

    def recover(self, within: float) -> float:
        """Seconds until every worker answers right again; each is asked until it does."""
        return eventually(
            lambda: all(map(self._answers, self.addresses)), within, "a right answer of everybody"
        )

    def _answers(self, address: Address) -> bool:
        asked = next(iter(self.expected))
        try:
            return ask(address, asked, 10) == self.expected[asked]
        except ServingError:
            return False

    def at_rest(self) -> bool:
        """Nothing pinned, nothing running."""
        if self.pair.store_stats().pinned_frames:
            return False
        for address in self.addresses:
            with channel_to(address) as channel:
                stats = GpuWorkerStub(channel).Stats(pb.WorkerStatsRequest(), timeout=10)
            if stats.running or stats.set_aside or stats.waiting:
                return False
        return True


@contextmanager
def rig_of(
    runtime: Path,
    model: Path | str,
    record_bytes: int,
    shim: Shim | None,
    frames: int | None = 6,
    workers: int = 2,
) -> Iterator[Rig]:
    """Running and warm; stopped at the end whatever happens. Processes without a shim start faster."""
    with pair_of_processes(runtime, model) as pair:
        if shim is not None and os.environ.get("LD_PRELOAD") != shim.environment["LD_PRELOAD"]:
            pair.environment = shim.environment
        addresses = [Address.parse(f"unix:{runtime}/worker-{number}.sock") for number in range(workers)]
        rig = Rig(pair, shim, addresses, frames, record_bytes)
        try:
            rig.start()
            yield rig
        finally:
            rig.calm()
            for process in pair.processes:
                if process.popen.poll() is None:
                    process.signal(signal.SIGCONT)
