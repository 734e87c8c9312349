"""Several clients at once, with real processes: everybody gets the answer that they would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.errors import Exhausted
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.client import Generated, WorkerClient
from gpu_worker.client.results import Answers
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


def test_samples_logprobs_and_stop_strings_beside_each_other(pair: Pair) -> None:
    """Several clients with several samples each, for whom there are too few places: everybody's samples end
    at the stop string, each with its own text, which its tokens' bytes spell."""
    sampling: dict[str, Any] = {"samples": 3, "temperature": 1.0, "logprobs": 2, "max_new_tokens": 24}
    told: list[pb.Token] = []
    with WorkerClient(pair.worker_address) as client, ThreadPoolExecutor(4) as pool:

        def ask(number: int, *stop: str) -> list[Generated]:
            answers = Answers(3)
            for event in client.generate(f"{number} ships sailed", seed=number, stop=stop, **sampling):
                answers.add(event)
                told.extend(event.delta.tokens)
            return answers.complete()

        alone = [ask(number) for number in range(4)]
        stops = [answers[0].text[5:7] for answers in alone]
        together = list(pool.map(ask, range(4), stops))
    assert all(len(token.alternatives) == 2 for token in told)
    pieces = {token.id: token.piece for token in told}
    assert all(
        pieces.get(other.token_id, other.piece) == other.piece for t in told for other in t.alternatives
    )
    for plain, stopped, stop in zip(alone, together, stops, strict=True):
        for whole, part in zip(plain, stopped, strict=True):
            assert b"".join(pieces[token] for token in whole.token_ids).startswith(whole.text.encode())
            assert part.text == whole.text.split(stop)[0]
            assert part.token_ids == whole.token_ids[: len(part.token_ids)]
            assert part.finish is not None and (part.finish.reason == "stop") == (stop in whole.text)
        assert stopped[0].finish is not None and stopped[0].finish.reason == "stop"


def test_a_chat_goes_on_where_it_was(pair: Pair) -> None:
    """Nothing of the first turn is read again but the few tokens that open the answer."""
    tale = "It was a dark night, and the ship was far out at sea, when the captain saw a light. " * 4
    messages = [{"role": "user", "content": tale}]
    with WorkerClient(pair.worker_address) as client:
        before = client.stats()
        (first,) = client.answers(messages, max_new_tokens=20)
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "What did he do?"},
        ]
        (second,) = client.answers(messages, max_new_tokens=5)
        after = client.stats()
    assert first.finish is not None and second.finish is not None
    cached = second.finish.usage.cached_prompt_tokens
    assert first.finish.usage.prompt_tokens - 8 <= cached <= second.finish.usage.prompt_tokens
    assert after.prefix_saved_tokens - before.prefix_saved_tokens == cached
    assert (after.prefix_hits - before.prefix_hits, after.prefix_lookups - before.prefix_lookups) == (1, 2)
    assert after.prefix_snapshots > 0 and 0 < after.prefix_bytes <= after.prefix_budget
