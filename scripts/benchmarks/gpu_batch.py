"""Several sequences, in steps of the sizes that a worker would take, by an engine in this process on a
running store.

Left out are the scheduler, gRPC, and sampling but for the likeliest token. As a script it answers `measure`,
see `gpu_child`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from gpu_child import answers
from gpu_report import Row, Spread
from pair import prompt_of

from common.addresses import Address
from common.units import parse_size
from gpu_worker.config import AUTO, WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.store_link import StoreLink

_WARMING = 64  # steps that are not counted
_ATTACH_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """What the script is told; `store` is an address, `vram` what `gpu-worker start --vram` takes."""

    store: str
    device: str
    vram: str
    policy: str
    sequences: list[int]
    prompt: int
    steps: int
    runs: int


@dataclass(frozen=True)
class BatchRow(Row):
    """So many sequences."""

    title: ClassVar[str] = (
        "several sequences, by an engine alone: no scheduler, sampling or gRPC; a round is a token of each"
    )

    budget: str
    slots: int
    policy: str
    sequences: int
    at_once: int  # sequences of the steps that made most of the tokens
    prompt: int
    rate: Spread  # tokens a second, all sequences together
    round_ms: Spread
    hit_rate: float | None
    bytes_per_round: float
    link_share: float | None
    device_bytes: int | None
    to_one: float | None  # times the rate of one sequence

    def cells(self) -> dict[str, str]:
        return {
            "budget": f"{self.budget:>6}", "slots": f"{self.slots:5}", "sequences": str(self.sequences),
            "at once": str(self.at_once),
            "tok/s": f"{self.rate.median:7.4g}", "spread": f"{self.rate.range:>16}",
            "ms a round": f"{self.round_ms.median:7.3g}",
            "x one": "-" if self.to_one is None else f"{self.to_one:.2f}",
            "hits": "-" if self.hit_rate is None else f"{self.hit_rate:6.1%}",
            "MB a round": f"{self.bytes_per_round / 1e6:7.1f}",
            "link": "-" if self.link_share is None else f"{self.link_share:6.1%}",
            "peak GB": "-" if self.device_bytes is None else f"{self.device_bytes / 1e9:.2f}",
        }  # fmt: skip


def benchmark(options: Options, link: float | None) -> Iterator[BatchRow]:
    """A row for each number of sequences; `link` in bytes a second. Raises Ended."""
    one: float | None = None
    for answer in answers("gpu_batch.py", asdict(options)):
        rate, seconds = Spread.of(answer["rates"]), sum(answer["round_seconds"])
        rounds, moved = len(answer["round_seconds"]), answer["bytes_moved"]
        if answer["sequences"] == 1:
            one = rate.median
        lookups = answer["hits"] + answer["misses"]
        yield BatchRow(
            group="batch",
            budget=options.vram,
            slots=answer["slots"],
            policy=answer["policy"],
            sequences=answer["sequences"],
            at_once=answer["at_once"],
            prompt=options.prompt,
            rate=rate,
            round_ms=Spread.of([1e3 * seconds for seconds in answer["round_seconds"]]),
            hit_rate=answer["hits"] / lookups if lookups else None,
            bytes_per_round=moved / rounds,
            link_share=moved / seconds / link if link else None,
            device_bytes=answer["device_bytes"],
            to_one=rate.median / one if one else None,
        )


@torch.inference_mode()
def measure(options: Options) -> Iterator[dict[str, Any]]:
    """What the steps of each number of sequences took, as JSON takes it."""
    from gpu_worker.loading import load_model  # not for whoever only asks

    address = Address.parse(options.store)
    vram = options.vram if options.vram == AUTO else parse_size(options.vram)
    most, context = max(options.sequences), options.prompt + _WARMING + options.steps
    with attached(address) as link:
        config = WorkerConfig(
            address, address, options.device, vram=vram, policy=options.policy, max_context=context,
            max_sequences=most,
        )  # fmt: skip
        assert link.attachment is not None
        model = load_model(config, link.attachment, link)
        for count in options.sequences:
            yield _steps(model.engine, count, options, model.config.vocab_size)
        model.fetcher.close()
        model.engine.close()


def _steps(engine: Engine, count: int, options: Options, vocabulary: int) -> dict[str, Any]:
    experts, rates, seconds = engine.experts, list[float](), list[float]()
    hits, misses, moved, sizes = 0, 0, 0, Counter[int]()
    for run in range(options.runs):
        places = [engine.take_place() for _ in range(count)]
        prompts = [prompt_of(100 * run + n, options.prompt, vocabulary) for n in range(count)]
        tokens = [_prefill(engine, *pair) for pair in zip(places, prompts, strict=True)]
        tokens = _decode(engine, places, tokens, _WARMING)[1]
        before = experts.counters.copy()
        times, _ = _decode(engine, places, tokens, options.steps, sizes)
        counted = experts.counters.since(before)
        hits, misses, moved = hits + counted.hits, misses + counted.misses, moved + counted.bytes_fetched
        rates.append(count * options.steps / sum(times))
        seconds += times
        for place in places:
            engine.give_place(place)
    on_gpu = torch.cuda.is_available()
    return {
        "slots": experts.slots, "policy": experts.describe(), "sequences": count,
        "at_once": max(sizes, key=lambda size: size * sizes[size]), "rates": rates,
        "round_seconds": seconds, "hits": hits, "misses": misses, "bytes_moved": moved,
        "device_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }  # fmt: skip


def _prefill(engine: Engine, place: int, prompt: Sequence[int]) -> int:
    """Reads a prompt; the token that follows."""
    for start in range(0, len(prompt), engine.prefill_chunk):
        hidden = engine.prefill(place, prompt[start : start + engine.prefill_chunk])
    return int(engine.logits(hidden[-1:])[0].argmax())


def _decode(
    engine: Engine, places: Sequence[int], tokens: list[int], rounds: int, sizes: Counter[int] | None = None
) -> tuple[list[float], list[int]]:
    """Seconds of each round, and the last tokens; `sizes` counts the steps by their sequences."""
    times = []
    for _ in range(rounds):
        started, following = time.perf_counter(), list[int]()
        for size in engine.divide(len(places)):
            if sizes is not None:
                sizes[size] += 1
            part = slice(len(following), len(following) + size)
            logits = engine.decode(places[part], tokens[part])
            following += logits.argmax(-1).tolist()  # waits for the device
        times.append(time.perf_counter() - started)
        tokens = following
    return times, tokens


@contextmanager
def attached(address: Address) -> Iterator[StoreLink]:
    """A link to a running store, kept up by a thread, as a worker's is by its event loop."""
    loop, link = asyncio.new_event_loop(), StoreLink(address, "benchmark")
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(link.attach(_ATTACH_SECONDS), loop).result()
    keeping = asyncio.run_coroutine_threadsafe(link.keep(), loop)
    try:
        yield link
    finally:
        keeping.cancel()
        asyncio.run_coroutine_threadsafe(link.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    for answer in measure(Options(**json.loads(sys.argv[1]))):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
