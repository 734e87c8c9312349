"""A whole checkpoint within this machine's memory: rates, resident memory, and where the time goes.

The store gets less memory than the experts take, so tokens wait for the disk. Runs only when named, because
it needs a checkpoint that is already there (`scripts/build_synthetic full DST` makes one of the 30B's shape).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from counters import SECONDS, Counters, counters, difference, total
from machine import bytes_from_disk
from measure import Figure
from pair import Pair, Resident, prompt_of, served
from roofline import dense_bytes, roofline
from synthetic import marked

from common.checkpoint import PackedCheckpoint
from common.rpc import gpu_worker_pb2 as pb
from common.units import parse_size

_SPARE_OF_STORE, _SPARE_OF_WORKER = 1e9, 2e9  # beside what is counted: code, buffers, states
_TOKENS = {"prompt_tokens", "completion_tokens", "requests"}  # what other counters are divided by
_START_SECONDS = 900.0  # packing dense matrices anew takes minutes


@dataclass(frozen=True)
class Options:
    """What the command line says of this group."""

    checkpoint: Path
    ram: str
    dense_bits: int | None
    prompt: int  # tokens
    new: int
    runs: int


@dataclass(frozen=True)
class _Measured:
    """Generations one after the other, and what both processes counted and held meanwhile."""

    finishes: list[pb.Finish]
    worker: Counters
    store: Counters
    disk_bytes: int
    store_resident: list[Resident]  # after each generation
    worker_resident: list[Resident]
    slot_bytes: int

    @property
    def seconds(self) -> float:
        """Of prefill and decode, all generations together."""
        return sum(f.timings.prefill_ms + f.timings.decode_ms for f in self.finishes) / 1e3

    @property
    def decode_seconds(self) -> float:
        """Of one token, on average; the first comes out of prefill."""
        times = [f.timings.decode_ms / 1e3 / (f.usage.completion_tokens - 1) for f in self.finishes]
        return sum(times) / len(times)

    @property
    def tokens(self) -> int:
        """Read and written."""
        return sum(f.usage.prompt_tokens + f.usage.completion_tokens for f in self.finishes)


def benchmark(options: Options) -> Iterator[Figure]:
    """Rates, memory within its limits, shares of the time, counters, and the roofline of memory."""
    checkpoint = PackedCheckpoint.open(options.checkpoint)
    bits = [] if options.dense_bits is None else ["--dense-bits", str(options.dense_bits)]
    with TemporaryDirectory() as directory:
        ram = ["--ram", options.ram]
        with served(checkpoint.directory, Path(directory), ram, bits, _START_SECONDS) as pair:
            pair.store.wait_until_full(_START_SECONDS)
            _generate(pair, checkpoint, options, options.runs)  # what is touched for the first time is slow
            measured = _measure(pair, checkpoint, options)
    memory = _memory(measured, checkpoint, options)
    for figure in chain(_rates(measured), memory, _times(measured), _counts(measured)):
        yield replace(figure, what=marked(figure.what, checkpoint))
    yield from roofline(checkpoint, measured.decode_seconds, options.dense_bits)


def _generate(pair: Pair, checkpoint: PackedCheckpoint, options: Options, seed: int) -> pb.Finish:
    return pair.generate(prompt_of(seed, options.prompt, checkpoint.config.vocab_size), options.new)


def _measure(pair: Pair, checkpoint: PackedCheckpoint, options: Options) -> _Measured:
    worker, store = counters(pair.client.stats()), counters(pair.store.stats())
    disk = bytes_from_disk(pair.store.pid)
    finishes, store_resident, worker_resident = [], [], []
    for seed in range(options.runs):
        finishes.append(_generate(pair, checkpoint, options, seed))
        store_resident.append(Resident.of(pair.store.pid))
        worker_resident.append(Resident.of(pair.worker_pid))
    stats = pair.client.stats()
    return _Measured(
        finishes,
        # A counter of a request that the worker does not add up over its life is in `finish` alone.
        {**total(map(counters, finishes)), **difference(counters(stats), worker)},
        difference(counters(pair.store.stats()), store),
        bytes_from_disk(pair.store.pid) - disk,
        store_resident,
        worker_resident,
        stats.slot_bytes,
    )


def _rates(measured: _Measured) -> Iterator[Figure]:
    usage = measured.finishes[0].usage
    new, prompt = usage.completion_tokens, usage.prompt_tokens
    decode = [(new - 1) / finish.timings.decode_ms * 1e3 for finish in measured.finishes]
    prefill = [prompt / finish.timings.prefill_ms * 1e3 for finish in measured.finishes]
    yield Figure.median(f"decode, {new} tokens", decode, "tokens/s")
    yield Figure.median(f"prefill, {prompt} tokens", prefill, "tokens/s")


def _memory(measured: _Measured, checkpoint: PackedCheckpoint, options: Options) -> Iterator[Figure]:
    """The most after any generation. The arena counts as the store's, whoever maps it."""
    store = max(resident.anonymous + resident.shared for resident in measured.store_resident)
    limit = parse_size(options.ram) + _SPARE_OF_STORE
    yield _gigabytes("store: RssAnon + RssShmem (limit: --ram + 1 GB)", store, limit)
    worker = max(resident.own for resident in measured.worker_resident)
    dense = sum(dense_bytes(checkpoint, options.dense_bits).values())
    limit = dense + measured.slot_bytes + _SPARE_OF_WORKER
    yield _gigabytes("worker: Rss less RssShmem (limit: dense + slots + 2 GB)", worker, limit)
    proportional = max(resident.proportional for resident in measured.worker_resident)
    yield _gigabytes("worker: PSS, part of the arena included (no limit)", proportional)
    yield _gigabytes("dense weights", dense)
    yield _gigabytes("slots", measured.slot_bytes)


def _times(measured: _Measured) -> Iterator[Figure]:
    """Every counter of seconds, as a share of prefill and decode; and what the disk gave meanwhile."""
    named = sorted(name for name in measured.worker if name.endswith(SECONDS))
    for name in named:
        yield _share(f"time of the worker: {_plain(name)}", measured.worker[name], measured)
    rest = measured.seconds - sum(measured.worker[name] for name in named)
    yield _share("time of the worker: the rest", rest, measured)
    for name in sorted(measured.store):
        if name.endswith(SECONDS):
            what = f"time of the store's readers, two beside the worker: {_plain(name)}"
            yield _share(what, measured.store[name], measured)
    read = measured.disk_bytes
    yield Figure(
        "read from the disk by the store, not from its cache", read / measured.tokens / 1e6, "MB a token"
    )
    yield Figure("the same over the time", read / measured.seconds / 1e9, "GB/s")


def _counts(measured: _Measured) -> Iterator[Figure]:
    """Every other counter, for each token read or written."""
    for process, counted in (("worker", measured.worker), ("store", measured.store)):
        for name in sorted(counted.keys() - _TOKENS):
            amount, what = counted[name] / measured.tokens, f"{process}: {_plain(name)}"
            if "bytes" in name:
                yield Figure(what, amount / 1e6, "MB a token")
            elif not name.endswith((SECONDS, "_ms")):
                yield Figure(what, amount, "a token")


def _share(what: str, seconds: float, measured: _Measured) -> Figure:
    return Figure(what, 100 * seconds / measured.seconds, "% of the time")


def _gigabytes(what: str, size: float, limit: float | None = None) -> Figure:
    return Figure(what, size / 1e9, "GB", at_most=None if limit is None else limit / 1e9)


def _plain(name: str) -> str:
    return name.removesuffix(SECONDS).replace("_", " ")
