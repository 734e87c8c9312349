"""The exactness law with real processes: RAM budgets, prefetch, warm and fresh workers, a store restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.client import Generated
from tests.system.conftest import EXPERTS, LAYERS
from tests.system.processes import Pair, pair_of_processes

PROMPT = [(5 * i * i + i) % 96 for i in range(80)]
COUNT = 40


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, packed_model: Path) -> Iterator[Generated]:
    """Everything in RAM and in slots."""
    with pair_of_processes(tmp_path_factory.mktemp("run"), packed_model) as pair:
        pair.start_store()
        pair.start_worker("--slots", str(EXPERTS))
        yield pair.generate(PROMPT, COUNT)


def same(result: Generated, expected: Generated) -> bool:
    return (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.parametrize(
    "worker",
    [
        ("--slots", "1", "--policy", "lru", "--prefetch", "on"),
        ("--slots", "2", "--policy", "lfru", "--prefetch", "off"),
        ("--slots", "5", "--policy", "lfru", "--prefetch", "auto"),
        ("--slots", "direct"),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_tenth_of_the_experts_in_ram(
    pair: Pair, expected: Generated, record_bytes: int, worker: tuple[str, ...]
) -> None:
    frames = LAYERS * EXPERTS // 10
    pair.start_store("--ram", str(frames * record_bytes))
    pair.start_worker(*worker)
    fresh = pair.generate(PROMPT, COUNT)
    warm = pair.generate(PROMPT, COUNT)
    assert same(fresh, expected)
    assert same(warm, expected)
    store = pair.store_stats()
    assert (store.frames, store.pinned_frames) == (frames, 0)
    assert store.evictions > 0
    assert fresh.finish is not None
    assert fresh.finish.cache.staged > 0
    assert (pair.worker_stats().hints_sent > 0) == ("off" not in worker)


def test_one_frame_is_enough(pair: Pair, expected: Generated, record_bytes: int) -> None:
    """A wave of many misses with a single frame: each is released before the next can be staged."""
    pair.start_store("--ram", str(record_bytes))
    pair.start_worker("--slots", "10")
    assert same(pair.generate(PROMPT, COUNT), expected)


def test_after_a_store_restart(pair: Pair, expected: Generated) -> None:
    pair.start_store()
    pair.start_worker("--slots", "3")
    assert same(pair.generate(PROMPT, COUNT), expected)
    pair.store.stop()
    pair.start_store()
    assert same(pair.generate(PROMPT, COUNT), expected)


def test_two_workers_on_one_store(pair: Pair, expected: Generated, record_bytes: int) -> None:
    """Both stage through three frames at once; leases keep them from starving or corrupting each other."""
    from concurrent.futures import ThreadPoolExecutor

    from common.addresses import Address
    from gpu_worker.client import WorkerClient

    pair.start_store("--ram", str(3 * record_bytes))
    pair.start_worker("--slots", "2")
    second = Address.parse(f"unix:{pair.runtime}/second.sock")
    pair._start(second, "gpu-worker", "start", "--device", "cpu", "--slots", "3", "--listen", str(second))

    def ask(address: Address) -> Generated:
        result = Generated()
        with WorkerClient(address) as client:
            for event in client.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True):
                result.add(event)
        return result

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(ask, [pair.worker_address, second] * 2))
    assert all(same(result, expected) for result in results)
    store = pair.store_stats()
    assert (store.pinned_frames, len(store.leases)) == (0, 2)
