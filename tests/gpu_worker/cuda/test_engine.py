"""The engine on a GPU, prompts and decode steps, against the CPU's over the same records.

Triton's interpreter takes milliseconds a program, so the model has few heads and few outputs.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.checkpoint import PackedCheckpoint
from gpu_worker import loading
from gpu_worker.config import WorkerConfig
from gpu_worker.loading import load_model
from gpu_worker.prefix_cache.cuts import CutLaw
from gpu_worker.prefix_cache.reading import PromptReading
from gpu_worker.prefix_cache.tree import PrefixCache
from gpu_worker.slots.fetch import Fetcher
from tests.helpers.device_engines import engine_of
from tests.helpers.engines import NOWHERE, FixedLink, full_arena, greedy
from tests.helpers.synth import make_synthetic

SHAPE: dict[str, Any] = {
    "pattern": "ME*-", "vocab_size": 128, "hidden_size": 128, "max_position_embeddings": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_num_heads": 4, "n_groups": 2,
    "n_routed_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip
PROMPTS = [(7 * i * i + 3 * i) % 128 for i in range(12)], [9, 60, 101]
COUNT = 4 if torch.cuda.is_available() else 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    """Dense matrices at five bits, but for the plain ones of shared experts."""
    directory = tmp_path_factory.mktemp("model") / "synthetic"
    return make_synthetic(directory, dense_bits=5, **SHAPE)


@pytest.fixture(scope="module")
def link(checkpoint: PackedCheckpoint) -> Iterator[FixedLink]:
    with full_arena(checkpoint) as link:
        yield link


@pytest.fixture(scope="module")
def expected(link: FixedLink) -> list[tuple[list[int], torch.Tensor]]:
    """What the CPU makes of each prompt, alone: greedy tokens, and the logits they were chosen from."""
    config = WorkerConfig(NOWHERE, NOWHERE, device="cpu")
    engine = load_model(config, link.attachment, link).engine  # type: ignore[arg-type]
    return [greedy(engine, prompt, COUNT) for prompt in PROMPTS]


def check(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert (logits.cpu() - expected).norm() < 1e-5 * expected.norm()


def test_the_cpu_computes_the_same(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device, expected: list[Any]
) -> None:
    """Of prompts, and of a step of two sequences side by side."""
    with engine_of(checkpoint, Fetcher(link), 7, device) as engine:  # type: ignore[arg-type]
        fresh = engine.experts.counters
        assert (fresh.hits, fresh.misses, fresh.bytes_fetched) == (0, 0, 0), "capturing counts"
        places = [engine.take_place(), engine.take_place()]
        for place, prompt, (_, logits) in zip(places, PROMPTS, expected, strict=True):
            check(engine.logits(engine.prefill(place, prompt)[-1:])[0], logits[0])
        found = engine.decode(places, [tokens[0] for tokens, _ in expected])
        for row, (_, logits) in zip(found, expected, strict=True):
            check(row, logits[1])
        for place in places:
            engine.give_place(place)
        counters = engine.experts.counters
    assert counters.hits > 0 and counters.misses > 0
    assert counters.bytes_fetched == counters.misses * checkpoint.layout.stride


def test_what_wants_no_weights_is_prepared_beside_them(link: FixedLink, device: torch.device) -> None:
    registered = loading._registering(link.attachment.arena, device).result(60)
    try:
        assert registered.mapped is link.attachment.arena
        assert registered.followed_by(registered.mapped) is registered
    finally:
        registered.close()


@pytest.mark.gpu
def test_a_snapshot_and_a_fork_go_on_as_what_they_are_copies_of(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device
) -> None:
    """By way of the host, and from place to place: every bit."""
    if device.type != "cuda":
        pytest.skip("the interpreter takes too long")
    prompt = PROMPTS[0]
    with engine_of(checkpoint, Fetcher(link), 7, device) as engine:  # type: ignore[arg-type]
        engine.cut_law, engine.prefixes = CutLaw(8, 8), PrefixCache(1 << 30)
        after_prompt = []
        for cached in (0, 8):
            place, other = engine.take_place(), engine.take_place()
            reading = PromptReading(engine, place, prompt)
            assert reading.cached == cached
            while not reading.done:
                hidden = reading.step()
            after_prompt.append(engine.logits(hidden[-1:]))
            engine.fork(place, other, len(prompt), engine.pools.read_recurrent(place))
            one, copy = engine.decode([place, other], [9, 9])
            assert torch.equal(one, copy)
            engine.give_place(place)
            engine.give_place(other)
        assert torch.equal(*after_prompt)


@pytest.mark.gpu
def test_captured_steps_generate_the_same_whatever_the_cache(
    checkpoint: PackedCheckpoint, link: FixedLink, device: torch.device, expected: list[Any]
) -> None:
    """Every bit, whatever the slots, the policy, who drives, and what the cache held before."""
    if device.type != "cuda":
        pytest.skip("the interpreter takes too long")
    found = []
    for slots, policy, options in (
        (1, "lru", {}), (4, "lru", {}), (7, "lfru", {}), (7, "lfru", {"eager": True}),
        (7, "lru", {"sync_fetch": True}), (12, "lru", {}),
    ):  # fmt: skip
        with engine_of(checkpoint, Fetcher(link), slots, device, policy, **options) as engine:  # type: ignore[arg-type]
            for _ in range(2):
                tokens, logits = greedy(engine, PROMPTS[0], COUNT)
                assert tokens == expected[0][0]
                check(logits, expected[0][1])
                found.append(logits)
    assert all(torch.equal(logits, found[0]) for logits in found)
