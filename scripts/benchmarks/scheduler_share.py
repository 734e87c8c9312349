"""What a step costs beside the engine's own: the scheduler, choosing tokens, messages to clients.

The real scheduler over the real engine in this process, on the 30B's widths in five blocks; the engine's own
calls are timed within its thread. gRPC and the event loop are left out: they are other threads' work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore
from typing import Any

from five_blocks import BITS, PATTERN, VOCABULARY
from gpu_batch import attached
from measure import Figure
from pair import prompt_of, store_of
from synthetic import marked, synthetic_checkpoint

from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.jobs import Generation
from gpu_worker.sampling import SamplingParams
from gpu_worker.scheduler import Scheduler

SEQUENCES = (1, 8)
PROMPT, NEW, ROUNDS = 16, 48, 5
_GOAL_PERCENT = 3.0
_TIMEOUT = 120.0
_SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


def benchmark() -> Iterator[Figure]:
    """Percent of a step of decode, greedy and sampled, for each number of sequences."""
    from gpu_worker.loading import load_model  # not for whoever asks for help

    with (
        synthetic_checkpoint(PATTERN, vocab=VOCABULARY, bits=BITS, dense_bits=BITS) as packed,
        TemporaryDirectory() as directory,
        store_of(packed.directory, Path(directory), [], _TIMEOUT) as store,
        attached(store.address) as link,
    ):
        config = WorkerConfig(store.address, store.address, "cpu", max_sequences=max(SEQUENCES))
        assert link.attachment is not None
        engine = load_model(config, link.attachment, link).engine
        for count in SEQUENCES:
            for name, sampling, goal in (("greedy", {}, _GOAL_PERCENT), ("top-p", _SAMPLED, None)):
                shares = [_share(engine, count, sampling) for _ in range(ROUNDS + 1)][1:]
                what = marked(f"{PATTERN} step of {count}, {name}: not the engine's", packed)
                figure = Figure.median(what, [100 * share for share in shares], "% of the step")
                yield Figure(**{**vars(figure), "at_most": goal})


def _share(engine: Engine, count: int, sampling: dict[str, Any]) -> float:
    """Of the seconds from the first step of all sequences to the last, those not spent in the engine."""
    spent, steps, ended = 0.0, list[tuple[float, float]](), Semaphore(0)
    decode = engine.decode

    def timed(*args: Any) -> Any:
        nonlocal spent
        started = time.perf_counter()
        logits = decode(*args)
        now = time.perf_counter()
        spent += now - started
        if len(args[0]) == count:
            steps.append((now, spent))
        return logits

    engine.decode = timed  # type: ignore[method-assign]
    scheduler = Scheduler(engine, count, on_fatal=print)
    try:
        for seed in range(count):
            scheduler.submit(_job(seed, sampling), lambda error: ended.release())
        scheduler.start()
        for _ in range(count):
            assert ended.acquire(timeout=_TIMEOUT), "a generation did not end"
    finally:
        scheduler.stop(_TIMEOUT)
        engine.decode = decode  # type: ignore[method-assign]
    (first, spent_before), (last, spent_until) = steps[0], steps[-1]
    return 1 - (spent_until - spent_before) / (last - first)


def _job(seed: int, sampling: dict[str, Any]) -> Generation:
    messages: list[Any] = []
    emit: Callable[[Any], None] = messages.append
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True, **sampling)
    return Generation(prompt_of(seed, PROMPT, VOCABULARY), params, (), None, emit)
