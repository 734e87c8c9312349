"""Several clients at once on the demo model, against one client that asks for the same.

A side's requests are all alike in size, and the same on both sides; what differs is how many are in progress.
Prompts are short, so that it is steps of decode that are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Comparison, comparison, seconds
from pair import Pair, prompt_of, store_of

CLIENTS = (2, 4, 8)
REQUESTS, PROMPT, NEW = 8, 16, 64
ROUNDS = 5
_GOALS = {8: 2.5}  # times one client
_TIMEOUT = 120.0


def benchmark() -> Iterator[Comparison]:
    """Tokens a second of all clients together."""
    with (
        TemporaryDirectory() as directory,
        store_of("demo", Path(directory), [], _TIMEOUT) as store,
        store.worker(["--device", "cpu", "--max-sequences", str(max(CLIENTS))], _TIMEOUT) as pair,
    ):
        vocabulary = pair.client.model_info().vocab_size
        times: dict[int, list[float]] = {clients: [] for clients in (1, *CLIENTS)}
        for _ in range(ROUNDS + 1):
            for clients, taken in times.items():
                taken.append(seconds(_requests(pair, clients, vocabulary)))
    for clients in CLIENTS:
        sides = (times[clients][1:], times[1][1:])  # the first round warms up
        names = (f"{clients} clients", "one client")
        yield comparison("demo, decode", *names, *sides, REQUESTS * NEW, "tokens/s", _GOALS.get(clients))


def _requests(pair: Pair, clients: int, vocabulary: int) -> Callable[[], object]:
    """All requests, so many of them at a time."""

    def run() -> None:
        with ThreadPoolExecutor(clients) as pool:
            prompts = [prompt_of(seed, PROMPT, vocabulary) for seed in range(REQUESTS)]
            list(pool.map(lambda prompt: pair.generate(prompt, NEW), prompts))

    return run
