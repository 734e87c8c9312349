"""Copying ahead: it changes no bit, and goes on only as long as enough guesses are right."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from gpu_worker.cuda import fetch_ahead
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.fetch_ahead import FetchAhead
from gpu_worker.slots.fetch import Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import full_arena
from tests.helpers.synth import make_synthetic

SHAPE: dict[str, Any] = {
    "pattern": "EE", "vocab_size": 64, "hidden_size": 64, "max_position_embeddings": 64,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> PackedCheckpoint:
    directory = tmp_path_factory.mktemp("model") / "synthetic"
    return make_synthetic(directory, bits=5 if device.type == "cuda" else 16, **SHAPE)


def test_layers_that_are_guessed_for(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five, the next three from each; copied beside its own. One and two rows give the same bits so."""
    deep = make_synthetic(
        tmp_path / "deep", bits=5 if device.type == "cuda" else 16, **SHAPE | {"pattern": "EEEEE"}
    )
    asked: list[range] = []
    fetch_ahead_of = DeviceSlots.fetch_ahead

    def noted(slots: DeviceSlots, layers: range) -> None:
        asked.append(layers)
        fetch_ahead_of(slots, layers)

    monkeypatch.setattr(DeviceSlots, "fetch_ahead", noted)
    found = []
    with full_arena(deep) as link:
        for mode in ("off", "on"):
            fetcher, logits = Fetcher(link), []  # type: ignore[arg-type]
            with engine_of(deep, fetcher, 5, device, eager=True, prefetch=mode) as engine:
                places = [engine.take_place(), engine.take_place()]
                for place in places:
                    engine.prefill(place, [1, 2])
                for rows in (1, 2, 1):
                    del asked[:]
                    logits.append(engine.decode(places[:rows], [7, 9][:rows]).cpu())
                    engine.experts.check_integrity()
                    guessed = [range(4), range(1, 5), range(2, 5), range(3, 5)] if mode == "on" else []
                    assert asked == guessed
                for place in places:
                    engine.give_place(place)
            found.append(torch.cat(logits))
    assert torch.equal(*found)


def test_steps_are_the_same(checkpoint: PackedCheckpoint, device: torch.device) -> None:
    """And experts are indeed guessed, some of them rightly."""
    steps, found = 60 if device.type == "cuda" else 6, []
    with full_arena(checkpoint) as link:
        for mode in ("off", "on"):
            fetcher = Fetcher(link)  # type: ignore[arg-type]
            with engine_of(checkpoint, fetcher, 3, device, prefetch=mode) as engine:
                place = engine.take_place()
                engine.prefill(place, [1, 2])
                logits = [engine.decode([place], [7 * step % 64]).cpu() for step in range(steps)]
                engine.give_place(place)
                engine.check_integrity()
                counted = engine.experts.hints.counters
            found.append(torch.cat(logits))
            assert (counted.sent > 0) == (mode == "on")
    assert counted.useful > 0
    assert torch.equal(*found)


class Cache:
    """As much of `DeviceSlots` as judging looks at."""

    holds_all = False
    ring = SimpleNamespace(useful_bytes=4096, wasted_bytes=8192)  # of prompts

    def __init__(self) -> None:
        self.ahead = torch.ones(1, dtype=torch.int32)
        self.pool = torch.empty(2, 4, 4096, dtype=torch.uint8)
        self.awaited = SimpleNamespace(counters=torch.zeros(2, 3, dtype=torch.int64))

    def serve(self, ahead: FetchAhead, steps: int, useful: int) -> None:
        """Steps with three guesses each, of which so many are right."""
        for _ in range(steps):
            if int(self.ahead):
                self.awaited.counters[0] += torch.tensor([3, useful, 0])
            ahead.before_step()


def test_wrong_guesses_pause_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_ahead, "_JUDGED_STEPS", 4)
    monkeypatch.setattr(fetch_ahead, "_RETRY_STEPS", 8)
    cache = Cache()
    ahead = FetchAhead("auto", cache, cache.ring, able=True)  # type: ignore[arg-type]
    cache.serve(ahead, 8, useful=1)
    assert int(cache.ahead) == 1 and ahead.describe().startswith("on"), "a third is enough"
    cache.serve(ahead, 4, useful=0)
    assert int(cache.ahead) == 0 and "fewer than 33%" in ahead.describe()
    cache.serve(ahead, 7, useful=0)
    assert int(cache.ahead) == 0
    cache.serve(ahead, 1, useful=3)
    assert int(cache.ahead) == 1 and ahead.describe().startswith("on"), "tried again"
    cache.serve(ahead, 4, useful=3)
    assert int(cache.ahead) == 1


def test_bytes_are_told_by_what_became_of_them() -> None:
    """Two of three guesses of a layer were right, and half of the third was copied when it proved wrong."""
    cache = Cache()
    cache.awaited.counters[1] += torch.tensor([3, 2, 2 * 4096 + 2048])
    counted = FetchAhead("on", cache, cache.ring, able=True).counters  # type: ignore[arg-type]
    assert (counted.sent, counted.useful) == (3, 2)
    assert (counted.useful_bytes, counted.wasted_bytes) == (2 * 4096 + 4096, 2048 + 8192)


def test_what_was_asked_for_is_not_judged() -> None:
    cache = Cache()
    cache.serve(FetchAhead("on", cache, cache.ring, able=True), 600, useful=0)  # type: ignore[arg-type]
    assert int(cache.ahead) == 1


@pytest.mark.parametrize(
    ("mode", "able", "holds_all", "why"),
    [("off", True, False, "asked"), ("auto", True, True, "has its slot"), ("on", False, False, "cannot")],
)
def test_why_it_is_off(mode: str, able: bool, holds_all: bool, why: str) -> None:
    cache = Cache()
    cache.holds_all = holds_all
    described = FetchAhead(mode, cache, cache.ring, able).describe()  # type: ignore[arg-type]
    assert described.startswith("off") and why in described
