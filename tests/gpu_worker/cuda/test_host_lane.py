"""Experts that the host computes in the middle of a device's step."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from common.hlwq import native
from common.model_config import ModelConfig
from common.record import RecordLayouts
from gpu_worker.cuda import host_lane, loading
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.kernels.lane import SHARES
from gpu_worker.slots.fetch import Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import FixedLink, full_arena, greedy
from tests.helpers.synth import make_synthetic

# On a GPU the widths are the real ones, whose sums have the order that the host knows.
WIDE = torch.cuda.is_available()
SHAPE: dict[str, Any] = {
    "pattern": "E*E", "vocab_size": 128, "hidden_size": 2688 if WIDE else 128, "max_position_embeddings": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_num_heads": 4, "n_groups": 2,
    "n_routed_experts": 24, "num_experts_per_tok": 3, "moe_intermediate_size": 1856 if WIDE else 64,
    "moe_shared_expert_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip
PROMPT, COUNT = [9, 60, 101], 24 if WIDE else 2

pytestmark = pytest.mark.skipif(
    native.path() in (native.PLAIN, "portable"), reason="the host computes experts by AVX2 or AVX-512"
)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    return make_synthetic(tmp_path_factory.mktemp("model") / "synthetic", dense_bits=5, **SHAPE)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


def lane_with(share: int) -> Any:
    """In place of `host_lane`, whose measuring takes a GPU: one that is handed so much."""

    def made(
        layouts: RecordLayouts, arena: RegisteredArena, pool: torch.Tensor, config: ModelConfig, threads: int
    ) -> host_lane.HostLane:
        native.set_threads(threads)
        return host_lane.HostLane(layouts, arena.frames, config.num_experts_per_tok, pool.device, share)

    return made


@pytest.mark.gpu
@pytest.mark.parametrize("share", [7, SHARES.value] if WIDE else [SHARES.value])
def test_steps_hand_over(
    checkpoint: PackedCheckpoint,
    link: FixedLink,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    share: int,
) -> None:
    """The same logits as without it: every bit on a GPU, whose order of additions the interpreter lacks."""
    monkeypatch.setattr(loading, "host_lane", lane_with(share))
    found, fetched = [], []
    for threads in (0, 2):
        with engine_of(checkpoint, Fetcher(link), 7, device, cpu_experts=threads) as engine:  # type: ignore[arg-type]
            found.append(greedy(engine, PROMPT, COUNT))
            counters = engine.experts.counters
            places = [engine.take_place(), engine.take_place()]
            engine.decode(places, [3, 4])  # two sequences hand nothing over
            after = engine.experts.counters
            for place in places:
                engine.give_place(place)
        assert (counters.misses_on_cpu > 0) == (threads > 0)
        assert after.misses_on_cpu == counters.misses_on_cpu
        fetched.append(counters.bytes_fetched)
    (tokens, logits), (without, expected) = found
    assert tokens == without and fetched[1] < fetched[0]
    assert torch.equal(logits, expected) if WIDE else torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_measures_what_it_hands_over(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    if device.type != "cuda":
        pytest.skip("there is no link to measure")
    with (
        caplog.at_level(logging.INFO),
        engine_of(checkpoint, Fetcher(link), 7, device, cpu_experts=4) as engine,  # type: ignore[arg-type]
    ):
        greedy(engine, PROMPT, COUNT)
    assert "the CPU computes" in caplog.text


def test_what_it_cannot_help_with(
    checkpoint: PackedCheckpoint,
    link: FixedLink,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said once, with the reason; steps go on without it."""
    monkeypatch.setattr(host_lane, "_differs", lambda *_: "it adds otherwise")
    for threads, reason in ((1, "that takes 2 threads at least, not 1"), (2, "it adds otherwise")):
        with (
            caplog.at_level(logging.INFO),
            engine_of(checkpoint, Fetcher(link), 7, device, cpu_experts=threads) as engine,  # type: ignore[arg-type]
        ):
            engine.give_place(engine.take_place())
        assert f"no expert is computed on the CPU: {reason}" in caplog.text


def test_what_a_container_may_use_is_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    quota = tmp_path / "cpu.max"
    assert host_lane.spare_threads(quota) == 16
    for text, threads in (("max 100000", 16), ("900000 100000", 6), ("150000 100000", -2)):
        quota.write_text(text)
        assert host_lane.spare_threads(quota) == threads


def test_a_link_that_is_much_faster_is_left_alone(
    checkpoint: PackedCheckpoint,
    link: FixedLink,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in (("_differs", None), ("_seconds_here", 0.04), ("_seconds_by_link", 0.001)):
        monkeypatch.setattr(host_lane, name, lambda *_, value=value: value)
    arena = RegisteredArena(link.attachment.arena, torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        pool = torch.empty(7, checkpoint.layout.stride, dtype=torch.uint8)
        assert host_lane.host_lane(checkpoint.layout, arena, pool, checkpoint.config, 2) is None
    assert "it takes 40000 us for each, the link 1000 us" in caplog.text


def test_bits_that_differ_are_found(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last bit that is another one is enough."""
    compute = host_lane.expert_lane.device_experts

    def nearly(layout: Any, records: Any, x: torch.Tensor, products: torch.Tensor) -> None:
        compute(layout, records, x, products)
        products[0, 5] = torch.nextafter(products[0, 5], torch.tensor(torch.inf))

    if WIDE:
        monkeypatch.setattr(host_lane.expert_lane, "device_experts", nearly)
    arena = RegisteredArena(link.attachment.arena, device)
    try:
        assert "another order" in str(host_lane._differs(checkpoint.layout, arena, device))
    finally:
        arena.close()
