"""The exactness law on the device: no bit depends on slots, policy, the store's frames, or who drives a step.

A model of nothing but routed experts. By the interpreter these are raw, which takes a tenth of the time: what
is tested is where records come from and lie, and kernels have tests of their own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import PackedCheckpoint
from gpu_worker.cuda import staging_ring
from gpu_worker.cuda.engine import DeviceEngine
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.slots.fetch import Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import FixedLink, ScarceStore, full_arena
from tests.helpers.synth import make_synthetic

EXPERTS, RANKS = 6, 2
SHAPE: dict[str, Any] = {
    "pattern": "EE", "vocab_size": 64, "hidden_size": 64, "max_position_embeddings": 64,
    "n_routed_experts": EXPERTS, "num_experts_per_tok": RANKS, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 2, "topk_group": 1,  # such routers are PyTorch's, which the interpreter leaves alone
}  # fmt: skip
PROMPT = [(7 * i * i + 3 * i) % 64 for i in range(12)]
TOKENS = [1, 60]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> PackedCheckpoint:
    directory = tmp_path_factory.mktemp("model") / "synthetic"
    return make_synthetic(directory, bits=5 if device.type == "cuda" else 16, **SHAPE)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups go round several times in a layer."""
    monkeypatch.setattr(staging_ring, "WAVE", 2)
    monkeypatch.setattr(staging_ring, "GROUPS", 2)


def outputs(engine: DeviceEngine) -> list[Tensor]:
    """Of a prompt, of a step after it, and of a step beside a sequence that begins."""
    places = [engine.take_place(), engine.take_place()]
    made = [engine.prefill(places[0], PROMPT)]
    made += [engine.decode(places[:count], TOKENS[:count]).clone() for count in (1, 2)]
    for place in places:
        engine.give_place(place)
    return [tensor.cpu() for tensor in made]


@pytest.fixture(scope="module")
def expected(checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device) -> list[Tensor]:
    """By a worker whose host leads, and fetches one record at a time."""
    with engine_of(checkpoint, Fetcher(link), 5, device, sync_fetch=True) as engine:
        return outputs(engine)


def check(engine: DeviceEngine, expected: list[Tensor]) -> CacheCounters:
    """Fresh and warm; the counters of the warm run."""
    for _ in range(2):
        before = engine.experts.counters
        for made, right in zip(outputs(engine), expected, strict=True):
            assert torch.equal(made, right)
        engine.check_integrity()
    return engine.experts.counters.since(before)


@pytest.mark.parametrize(
    ("slots", "policy", "options"),
    [
        (1, "lru", {}),  # a token needs more than fit
        (2, "lfru", {}),  # two tokens do
        (4, "lru", {"eager": True}),
        (4, "lfru", {"sync_fetch": True}),
        (EXPERTS, "lru", {}),
    ],
)
def test_a_full_store(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device, expected: list[Tensor],
    slots: int, policy: str, options: dict[str, Any], small_ring: None,
) -> None:  # fmt: skip
    with engine_of(checkpoint, Fetcher(link), slots, device, policy, **options) as engine:
        counted = check(engine, expected)
    assert counted.staged == 0 and counted.hits > 0
    assert (counted.misses == 0) == (slots == EXPERTS)


@pytest.mark.parametrize(("slots", "frames"), [(1, 1), (5, 4)])
def test_a_store_that_lacks_frames(
    checkpoint: PackedCheckpoint, device: torch.device, expected: list[Tensor], slots: int, frames: int,
    small_ring: None,
) -> None:  # fmt: skip
    store = ScarceStore(checkpoint, frames)
    try:
        with engine_of(checkpoint, store, slots, device) as engine:
            counted = check(engine, expected)
            assert engine.experts.hints.counters.sent > 0
    finally:
        store.close()
    assert 0 < counted.staged <= counted.misses
    assert counted.bytes_fetched == counted.misses * checkpoint.layout.stride


def test_the_host_decides_as_the_device_does(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    """Slot for slot, and hit for hit; but for what the device alone copies ahead."""
    found, alike = [], {"eager": True, "prefetch": "off"}
    for sync_fetch in (False, True):
        with engine_of(
            checkpoint, Fetcher(link), 4, device, "lfru", sync_fetch=sync_fetch, **alike
        ) as engine:
            outputs(engine)
            counted = engine.experts.counters
            found.append((counted.hits, counted.misses, engine.experts.cache.snapshot()))
    assert found[0] == found[1]
