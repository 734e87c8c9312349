"""The 30B's real widths in five blocks, served by both processes, against transformers in bfloat16.

A synthetic checkpoint: pattern MEM*E, 2 x 128 experts, vocabulary 8192, everything at 5 bits. transformers
loads the same weights, unpacked. Both stay loaded and take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import Comparison, Figure, comparison
from pair import SCRIPTS, served

from common.checkpoint.packed import PackedCheckpoint
from gpu_worker.client import Generated, WorkerClient

PATTERN, VOCABULARY, BITS = "MEM*E", 8192, 5
PROMPT, NEW = 128, 48
PAIRS = 5
_SIDE = Path(__file__).with_name("transformers_side.py")


def benchmark() -> Iterator[Comparison | Figure]:
    """Decode and prefill rates, resident memory, and the share of what memory delivers."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        packed, plain = Path(directory) / "packed", Path(directory) / "plain"
        _run(
            "expert-store", "synth", packed, "--pattern", PATTERN, "--vocab", VOCABULARY, "--dense-bits", BITS
        )
        _run("expert-store", "unpack", packed, plain)
        ours = _Ours(*stack.enter_context(served(packed, Path(directory))))
        theirs = stack.enter_context(_transformers(plain))
        prompts = [
            [(seed * 7919 + 31 * i * i) % VOCABULARY for i in range(PROMPT)] for seed in range(PAIRS + 1)
        ]
        times = [(ours.measure(prompt), theirs.measure(prompt)) for prompt in prompts][1:]
        for what, amount, goal in (("decode", NEW - 1, 7.5), ("prefill", PROMPT, 5.0)):
            a, b = ([side[what] for side in sides] for sides in zip(*times, strict=True))
            names = ("store and worker, 5 bits", "transformers, bfloat16")
            yield comparison(f"{PATTERN} {what} (synthetic)", *names, a, b, amount, "tokens/s", goal)
        yield Figure("store and worker, resident together", ours.resident() / 1e9, "GB")
        yield Figure("transformers, resident", theirs.resident() / 1e9, "GB")
        yield Figure("packed bytes read a token", bytes_a_token(PackedCheckpoint.open(packed)) / 1e9, "GB")


def bytes_a_token(checkpoint: PackedCheckpoint) -> int:
    """What decoding one token reads of weights: chosen experts, dense matrices, not the embeddings."""
    config = checkpoint.config
    routed = config.num_layers * config.num_experts_per_tok * checkpoint.layout.stride
    dense = sum(stored.size for name, stored in checkpoint.dense_stored.items() if "embeddings" not in name)
    return routed + dense


class _Ours:
    """Both processes, and a client."""

    def __init__(self, client: WorkerClient, processes: list[subprocess.Popen[bytes]]) -> None:
        self._client, self._processes = client, processes

    def measure(self, prompt: list[int]) -> dict[str, float]:
        """Seconds of prefill and of decode, by the worker's clock."""
        generated = Generated()
        for event in self._client.generate(prompt, max_new_tokens=NEW, ignore_eos=True):
            generated.add(event)
        assert generated.finish is not None and len(generated.token_ids) == NEW
        timings = generated.finish.timings
        return {"prefill": timings.prefill_ms / 1e3, "decode": timings.decode_ms / 1e3}

    def resident(self) -> int:
        """Proportional set size: pages that both map count once."""
        return sum(_memory(process.pid, "Pss") for process in self._processes)


class _Theirs:
    """transformers in a process of its own, which answers line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, prompt: list[int]) -> dict[str, float]:
        return self._ask({"prompt": prompt, "new": NEW})

    def resident(self) -> int:
        return _memory(self._process.pid, "Pss")

    def _ask(self, request: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def _transformers(model: Path) -> Iterator[_Theirs]:
    with subprocess.Popen(
        [sys.executable, str(_SIDE), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield _Theirs(process)
        process.kill()


def _run(command: str, *words: object) -> None:
    subprocess.run([str(SCRIPTS / command), *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def _memory(pid: int, kind: str) -> int:
    """Bytes, from /proc: Rss or Pss."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
