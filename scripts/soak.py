"""Many random requests to a running worker: nothing may grow, and nothing may change what is answered.

    .venv/bin/python scripts/soak.py [--requests 1000] [--steps 10000] [--listen ADDRESS]

Sends one request after another, with prompts and answers of random lengths, so that slots churn. The worker
looks after its cache's integrity at the end of each, and ends if it is broken. Every tenth request is an
earlier one again, which must be answered with the same tokens. Then one long answer, of so many steps. What
the worker and the device say of memory is compared before and after. Not done here: starting processes, load.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from common.addresses import Address
from common.units import format_bytes
from gpu_worker.client import Generated, WorkerClient

_AGAIN = 10  # one request of so many repeats an earlier one
_KEPT = 50  # earlier requests to choose from
_GROWTH = 64 << 20  # bytes that memory may differ by: allocators round


@dataclass(frozen=True)
class Asked:
    """A request, greedy, and what came of it."""

    prompt: tuple[int, ...]
    new: int
    answer: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="of random lengths")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long answer at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--listen", help="the worker's address; default: as the worker's")
    args = parser.parse_args()
    address = Address.parse(args.listen) if args.listen else Address.default("worker")
    with WorkerClient(address) as client:
        info, failed_before = client.model_info(), client.stats().requests_failed
        draw = random.Random(args.seed)
        # Whatever is allocated at first use, and for the longest prompt.
        ask(client, tuple(token % info.vocab_size for token in range(info.max_context // 2)), 8)
        before = memory(client)
        started = time.monotonic()
        repeated = sum(soak(client, draw, args.requests, info.vocab_size, info.max_context))
        steps = min(args.steps, info.max_context - 8)
        ask(client, tuple(range(8)), steps)
        after = memory(client)
        stats = client.stats()
        failed = stats.requests_failed - failed_before
    took = time.monotonic() - started
    print(
        f"{args.requests} requests, {repeated} of them again with the same answer, then {steps} steps: "
        f"{took:.0f} s; hit rate {stats.cache.hit_rate:.1%}, {failed} failed"
    )
    both = sorted(before.keys() & after.keys())
    for what in both:
        print(f"{what}: {format_bytes(before[what])} before, {format_bytes(after[what])} after")
    grown = [what for what in both if after[what] > before[what] + _GROWTH]
    if grown or failed:
        sys.exit(f"grown: {', '.join(grown) or 'nothing'}; failed: {failed}")


def soak(
    client: WorkerClient, draw: random.Random, requests: int, vocabulary: int, context: int
) -> Iterator[bool]:
    """Whether each request was one asked before; ends the program when the answer is another then."""
    earlier: list[Asked] = []
    for number in track(range(requests), "requests"):
        again = bool(earlier) and number % _AGAIN == 0
        if again:
            before = draw.choice(earlier)
            answer = ask(client, before.prompt, before.new).answer
            if answer != before.answer:
                sys.exit(f"request {number}: {before.prompt} gave {before.answer}, and now {answer}")
        else:
            length = min(int(draw.paretovariate(0.6) * 4), context // 2)
            prompt = tuple(draw.randrange(vocabulary) for _ in range(length))
            earlier.append(ask(client, prompt, draw.randint(1, min(48, context // 2))))
            del earlier[:-_KEPT]
        yield again


def ask(client: WorkerClient, prompt: tuple[int, ...], new: int) -> Asked:
    generated = Generated()
    for event in client.generate(prompt, max_new_tokens=new, ignore_eos=True):
        generated.add(event)
    if len(generated.token_ids) != new:
        sys.exit(f"{new} tokens asked for, {len(generated.token_ids)} came")
    return Asked(prompt, new, tuple(generated.token_ids))


def memory(client: WorkerClient) -> dict[str, int]:
    """Resident bytes of the worker's processes on this machine, and what is used of the device's memory.

    Beginnings of prompts that are kept, which have a budget of their own, are left out.
    """
    sizes, kept = {}, client.stats().prefix_bytes
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command = (status.parent / "cmdline").read_bytes().split(b"\0")
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it has ended meanwhile
        if any(word.endswith(b"gpu-worker") for word in command[:2]) and b"start" in command:
            resident = int(fields["RssAnon"].split()[0]) * 1024
            sizes[f"worker {status.parent.name}, resident beside the prefix cache"] = resident - kept
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        sizes["device memory in use"] = sum(map(int, used)) << 20
    except (OSError, subprocess.CalledProcessError):
        pass  # no GPU here
    return sizes


if __name__ == "__main__":
    main()
