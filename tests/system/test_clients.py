"""Several clients at once, with real processes: everybody gets the answer that they would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.errors import Exhausted
from gpu_worker.client import WorkerClient
from tests.system.processes import Pair, eventually, pair_of_processes

CLIENTS = 8
Asked = tuple[list[int], int, dict[str, float]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The demo model with places and a queue for half of the clients each."""
    with pair_of_processes(tmp_path_factory.mktemp("run"), "demo") as pair:
        pair.start_store()
        pair.start_worker("--max-sequences", "4", "--max-queue", "4")
        yield pair


def requests() -> list[Asked]:
    """Prompts of up to two chunks, greedy and sampled."""
    asked: list[Asked] = []
    for number in range(CLIENTS):
        prompt = [(31 * i * i + 7919 * number) % 2048 for i in range(1 + 75 * number)]
        sampling = {"temperature": 0.9, "seed": number} if number % 2 else {}
        asked.append((prompt, 8 + 2 * number, sampling))
    return asked


def test_everybody_is_answered_as_if_they_were_alone(pair: Pair) -> None:
    """Twice as many clients as places."""
    alone = [pair.generate(prompt, count, **sampling) for prompt, count, sampling in requests()]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda asked: pair.generate(asked[0], asked[1], **asked[2]), requests()))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for answer, (prompt, count, _) in zip(together, requests(), strict=True):
        assert answer.finish is not None
        assert (answer.finish.usage.prompt_tokens, answer.finish.usage.completion_tokens) == (
            len(prompt),
            count,
        )
    stats = pair.worker_stats()
    assert (stats.running, stats.waiting, stats.requests_failed) == (0, 0, 0)


def test_clients_that_go_away_leave_the_others_alone(pair: Pair) -> None:
    """Four hold all places; those who wait behind them are answered once one of the four is gone."""
    prompt = requests()[3][0]
    expected = pair.generate(prompt, 20).token_ids
    with WorkerClient(pair.worker_address) as client:
        streams = [client.generate([number], max_new_tokens=3000, ignore_eos=True) for number in range(4)]
        for stream in streams:
            next(stream)
        stats = client.stats()
        assert (stats.running, stats.waiting) == (4, 0)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(pair.generate, prompt, 20) for _ in range(4)]
            eventually(lambda: client.stats().waiting == 4, 10, "waiting")
            with pytest.raises(Exhausted, match="4 requests are waiting"):
                pair.generate(prompt, 1)
            streams[0].close()
            assert [answer.result(60).token_ids for answer in waiting] == [expected] * 4
        for stream in streams[1:]:
            next(stream)  # they run still
            stream.close()
        eventually(lambda: client.stats().running == 0, 5, "leaving")
