"""What both processes do on a GPU, asked through gRPC: one worker after the other on one store.

A row for each length of prompts has rates by the worker's clock and by the client's, what decoding alone did
to cache and link, and memory as the worker and as the driver report it. Not done here: which workers are
measured (`bench_gpu`), single requests (`gpu_requests`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from gpu_driver import device_bytes
from gpu_report import Report, Row, Spread
from gpu_requests import Decoded, Run, digest, request, run
from pair import Ended, Pair, Store, prompt_of

from common.errors import ServingError

UNBOUNDED = "auto"  # --vram auto: as much as the device has
REFERENCE = "reference"  # the group that others are compared with
START_SECONDS = 180.0  # the first worker on a machine compiles every kernel


@dataclass(frozen=True)
class Worker:
    """One worker to be measured."""

    group: str
    budget: str  # of --vram
    policy: str
    prefetch: str
    prompts: tuple[int, ...]  # tokens
    cpu_experts: str = "auto"  # threads of the CPU that compute missing experts
    options: tuple[str, ...] = ()  # more of gpu-worker start

    @property
    def what(self) -> str:
        return f"{self.budget}, {self.policy}, prefetch {self.prefetch}, CPU {self.cpu_experts}"


@dataclass(frozen=True)
class Workload:
    """What is asked of every worker."""

    new: int  # tokens
    runs: int
    context: int  # tokens, the same for all: what it takes is kept from the slots
    device: str


@dataclass
class Yardsticks:
    """What rows are compared with, as far as it was measured in this run."""

    link: float | None = None  # bytes a second
    reference: float | None = None  # tokens a second of decode
    unbounded: dict[int, float] = field(default_factory=dict)  # the same by length of the prompt


@dataclass(frozen=True)
class PairRow(Row):
    """One prompt length on one worker."""

    title: ClassVar[str] = "store, worker and client: tok/s as the worker says, `client` of its median token"

    model: str
    budget: str
    slots: int
    policy: str
    prefetch: str  # as asked for
    prefetch_in_force: str
    cpu_experts: str  # as asked for
    prompt: int
    new: int
    start_seconds: float
    decode: Spread  # tokens a second
    client_decode: Spread
    prefill: Spread
    first_ms: Spread
    hit_rate: float | None  # None: nothing was looked up, since every expert has its slot
    bytes_per_token: float
    link_share: float | None
    on_cpu_per_token: float  # experts computed there
    guesses: int
    guesses_useful: int
    worker_bytes: int | None  # the most it has taken, as it says
    tensor_bytes: int | None  # of these, what lived at once
    driver_bytes: int | None  # what starting and using the worker added
    to_reference: float | None
    to_unbounded: float | None
    distinct: float  # share of the new tokens' ids that are different ones
    digest: str

    def cells(self) -> dict[str, str]:
        return {
            "budget": f"{self.budget or '-':>6}", "slots": f"{self.slots:5}",
            "policy": f"{self.policy.split(',')[0]:>6}", "prefetch": self.prefetch,
            "start s": f"{self.start_seconds:.1f}", "prompt": f"{self.prompt:6}",
            "tok/s": f"{self.decode.median:7.4g}", "spread": f"{self.decode.range:>16}",
            "client": f"{self.client_decode.median:7.4g}", "prefill/s": f"{self.prefill.median:.4g}",
            "first ms": f"{self.first_ms.median:.4g}", "hits": _percent(self.hit_rate),
            "MB/token": f"{self.bytes_per_token / 1e6:.1f}", "link": _percent(self.link_share),
            "on CPU": f"{self.on_cpu_per_token:.1f}", "guesses": f"{self.guesses_useful}/{self.guesses}",
            "worker GB": _gigabytes(self.worker_bytes), "driver GB": _gigabytes(self.driver_bytes),
            "x ref": _number(self.to_reference), "of auto": _percent(self.to_unbounded),
            "tokens": self.digest,
        }  # fmt: skip


def measure(
    store: Store, workers: Sequence[Worker], workload: Workload, yardsticks: Yardsticks, report: Report
) -> None:
    """A row for each prompt on each worker; a worker that does not start or ends is reported as such."""
    for worker in workers:
        before = device_bytes()
        report.note(f"{worker.group}: {worker.what}")
        failure: BaseException | None = None
        try:
            with store.worker(_command(worker, workload), START_SECONDS) as pair:
                for row in _rows(pair, worker, workload, before, yardsticks):
                    report.add(row)
        except (Ended, ServingError, AssertionError) as error:  # asserted is what a worker must answer
            failure = error
        said = store.worker_log.read_text()
        report.log(f"{worker.group}: {worker.what}\n{said}")
        if failure is not None:
            shown = failure if isinstance(failure, Ended) else f"{said}{failure}"
            report.failed(worker.group, worker.what, str(shown))


def _command(worker: Worker, workload: Workload) -> list[str]:
    """Nothing is remembered of prompts, which are all sent twice."""
    budget = ["--vram", worker.budget] if worker.budget else []
    threads = [] if worker.cpu_experts == "auto" else ["--cpu-experts", worker.cpu_experts]
    return [
        "--device", workload.device, *budget, "--max-context", str(workload.context),
        "--policy", worker.policy, "--prefetch", worker.prefetch, "--prefix-cache", "0", *threads,
        *worker.options,
    ]  # fmt: skip


def _rows(
    pair: Pair, worker: Worker, workload: Workload, before: int | None, yardsticks: Yardsticks
) -> Iterator[PairRow]:
    info, seeds = pair.client.model_info(), count()
    for prompt in worker.prompts:
        # The same prompts for every worker: what they say must not depend on it.
        prompts = [prompt_of(next(seeds), prompt, info.vocab_size) for _ in range(workload.runs + 1)]
        request(pair, prompts[0], workload.new)  # what is touched for the first time is slow
        runs = [run(pair, ids, workload.new) for ids in prompts[1:]]
        row = _row(worker, info.model, pair, runs, before, yardsticks)
        if worker.budget == UNBOUNDED:
            yardsticks.unbounded.setdefault(prompt, row.decode.median)
        if worker.group == REFERENCE:
            yardsticks.reference = row.decode.median
        yield row


def _row(
    worker: Worker, model: str, pair: Pair, runs: list[Run], before: int | None, yardsticks: Yardsticks
) -> PairRow:
    stats, usage = pair.client.stats(), runs[0].long.finish.usage
    parts = [answer.decoded for answer in runs]
    both = [answer for single in runs for answer in (single.short, single.long)]
    decode = Spread.of([part.tokens / part.seconds for part in parts])
    moved, tokens = sum(part.bytes_moved for part in parts), sum(part.tokens for part in parts)
    rate = moved / sum(part.seconds for part in parts)
    used = [answer.device_bytes for answer in runs if answer.device_bytes is not None]
    ids = [token for answer in runs for token in answer.long.token_ids]
    return PairRow(
        group=worker.group,
        model=model,
        budget=worker.budget,
        slots=stats.slots_per_layer,
        policy=stats.policy,
        prefetch=worker.prefetch,
        prefetch_in_force=stats.prefetch,
        cpu_experts=worker.cpu_experts,
        prompt=usage.prompt_tokens,
        new=usage.completion_tokens,
        start_seconds=pair.start_seconds,
        decode=decode,
        client_decode=Spread.of([1 / statistics.median(answer.long.between) for answer in runs]),
        prefill=Spread.of([answer.prefill_rate for answer in both]),
        first_ms=Spread.of([answer.first * 1e3 for answer in both]),
        hit_rate=_hit_rate(parts),
        bytes_per_token=moved / tokens,
        link_share=rate / yardsticks.link if yardsticks.link else None,
        on_cpu_per_token=sum(part.on_cpu for part in parts) / tokens,
        guesses=sum(part.guesses for part in parts),
        guesses_useful=sum(part.useful for part in parts),
        worker_bytes=stats.vram_peak or None,
        tensor_bytes=stats.vram_tensors_peak or None,
        driver_bytes=max(used) - before if used and before is not None else None,
        to_reference=_ratio(decode.median, yardsticks.reference),
        to_unbounded=_ratio(decode.median, yardsticks.unbounded.get(usage.prompt_tokens)),
        distinct=len(set(ids)) / len(ids),
        digest=digest(runs),
    )


def _hit_rate(parts: Sequence[Decoded]) -> float | None:
    hits, misses = sum(part.hits for part in parts), sum(part.misses for part in parts)
    return hits / (hits + misses) if hits + misses else None


def _ratio(value: float, unit: float | None) -> float | None:
    return None if unit is None else value / unit


def _percent(share: float | None) -> str:
    return f"{'-':>6}" if share is None else f"{share:6.1%}"


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
