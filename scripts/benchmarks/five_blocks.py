"""The 30B's real widths in five blocks, served by both processes, against transformers in bfloat16.

A synthetic checkpoint: pattern MEM*E, 2 x 128 experts, vocabulary 8192, everything at 5 bits. transformers
loads the same weights, unpacked. Both stay loaded and take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Comparison, Figure, comparison
from pair import Pair, Resident, prompt_of, served
from roofline import roofline
from synthetic import marked, run_command, synthetic_checkpoint

from common.checkpoint import PackedCheckpoint

PATTERN, VOCABULARY, BITS = "MEM*E", 8192, 5
PROMPT, NEW = 128, 48
PAIRS = 5
_GOALS = {"decode": 7.5, "prefill": 5.0}  # times transformers
_GOAL_GIGABYTES = 3.0
_SIDE = Path(__file__).with_name("transformers_side.py")

Times = list[dict[str, float]]  # seconds of prefill and of decode, run by run


def benchmark() -> Iterator[Comparison | Figure]:
    """Decode and prefill rates, resident memory, and the share of what memory delivers."""
    with synthetic_checkpoint(PATTERN, vocab=VOCABULARY, bits=BITS, dense_bits=BITS) as packed:
        with TemporaryDirectory() as directory, ExitStack() as stack:
            plain = Path(directory) / "plain"
            run_command("expert-store", "unpack", packed.directory, plain)
            pair = stack.enter_context(served(packed.directory, Path(directory)))
            theirs = stack.enter_context(_transformers(plain))
            times = _take_turns(pair, theirs)
            yield from _rates(packed, *times)
            yield from _resident(packed, pair, theirs)
        # Memory is read when nobody else is there to use it.
        decode = statistics.median(run["decode"] for run in times[0])
        yield from roofline(packed, decode / (NEW - 1))


def _take_turns(pair: Pair, theirs: _Transformers) -> tuple[Times, Times]:
    """Seconds of each side on the same prompts, without the first, which warms up."""
    our_times, their_times = [], []
    for seed in range(PAIRS + 1):
        prompt = prompt_of(seed, PROMPT, VOCABULARY)
        timings = pair.generate(prompt, NEW).timings
        our_times.append({"prefill": timings.prefill_ms / 1e3, "decode": timings.decode_ms / 1e3})
        their_times.append(theirs.measure(prompt))
    return our_times[1:], their_times[1:]


def _rates(checkpoint: PackedCheckpoint, ours: Times, theirs: Times) -> Iterator[Comparison]:
    for what, amount in (("decode", NEW - 1), ("prefill", PROMPT)):
        times = ([run[what] for run in side] for side in (ours, theirs))
        names = (f"store and worker, {BITS} bits", "transformers, bfloat16")
        named = marked(f"{PATTERN} {what}", checkpoint)
        yield comparison(named, *names, *times, amount, "tokens/s", _GOALS[what])


def _resident(checkpoint: PackedCheckpoint, pair: Pair, theirs: _Transformers) -> Iterator[Figure]:
    """The arena counts once, since both map the same pages; libraries that both map count twice."""
    store, worker = Resident.of(pair.store.pid), Resident.of(pair.worker_pid)
    together = (store.own + store.shared + worker.own) / 1e9
    what = marked("store and worker, resident together", checkpoint)
    yield Figure(what, together, "GB", at_most=_GOAL_GIGABYTES)
    for name, size in (("store's own", store.own), ("arena", store.shared), ("worker's own", worker.own)):
        yield Figure(marked(f"of these, {name}", checkpoint), size / 1e9, "GB")
    other = Resident.of(theirs.pid)
    yield Figure(marked("transformers, resident", checkpoint), (other.own + other.shared) / 1e9, "GB")


class _Transformers:
    """transformers in a process of its own, which answers line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def measure(self, prompt: list[int]) -> dict[str, float]:
        """Seconds of prefill and of decode."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"prompt": prompt, "new": NEW}), file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def _transformers(model: Path) -> Iterator[_Transformers]:
    with subprocess.Popen(
        [sys.executable, str(_SIDE), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield _Transformers(process)
        process.kill()
