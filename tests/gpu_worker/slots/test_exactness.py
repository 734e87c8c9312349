"""The exactness law inside one process: no bit depends on slots, policy, or what the cache held before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.checkpoint.packed import PackedCheckpoint
from common.errors import Unavailable
from common.expert_key import ExpertKey
from common.hlwq import native
from tests.helpers.engines import FixedLink, full_arena, greedy, load, packed, prompt_logits
from tests.helpers.models import make_hf_model
from tests.helpers.nemotron import relative_error

PROMPT = [(7 * i * i + 3 * i) % 96 for i in range(70)]


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FixedLink]:
    directory: Path = tmp_path_factory.mktemp("model")
    checkpoint: PackedCheckpoint = packed(make_hf_model(directory / "hf"), directory / "packed", 5)
    with full_arena(checkpoint) as link:
        yield link


@pytest.fixture(scope="module")
def expected(link: FixedLink) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    engine = load(link, slots=8).engine
    return *greedy(engine, PROMPT, 24), prompt_logits(engine, PROMPT)


@pytest.mark.parametrize("policy", ["lru", "lfru"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, "direct"])
def test_slots_and_policy_change_nothing(link: FixedLink, expected, slots: int | str, policy: str) -> None:
    tokens, logits, prompt = expected
    engine = load(link, slots=slots, policy=policy).engine
    for _ in ("fresh", "warm"):
        got_tokens, got_logits = greedy(engine, PROMPT, 24)
        assert got_tokens == tokens
        assert torch.equal(got_logits, logits)
        assert torch.equal(prompt_logits(engine, PROMPT), prompt)
        engine.check_integrity()


def test_chunks_change_nothing(link: FixedLink) -> None:
    """By the native kernels, a row's result does not depend on how many rows it stands among."""
    engine = load(link).engine
    experts = engine.experts
    x, choices = torch.randn(9, 128), torch.stack([torch.randperm(8)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    whole = experts.compute(0, x, choices, weights)
    alone = [experts.compute(0, x[i : i + 1], choices[i : i + 1], weights[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), whole)


def test_plain_twins_agree_with_the_native_kernels(link: FixedLink, expected) -> None:
    _, _, prompt = expected
    with native.forced(native.PLAIN):
        got = prompt_logits(load(link, slots=3).engine, PROMPT)
    assert relative_error(got, prompt) <= 2e-5


def test_direct_throws_away_what_a_reused_frame_gave(
    link: FixedLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame is reused while the kernel runs: the product is made again from where the record is then."""
    experts = load(link).engine.experts
    x, weights, choices = torch.randn(1, 128), torch.full((1, 2), 0.5), torch.tensor([[5, 6]])
    expected = experts.compute(0, x, choices, weights)
    arena, kernel = experts._fetcher.arena, experts._kernels[0]
    staged: list[ExpertKey] = []

    def torn(records, positions, x, products) -> None:
        kernel(records, positions, x, products)
        if not staged:
            products[positions[1]] = torch.nan  # what came of expert 6
            words = arena.words.copy()
            words[0, 6] += 1 << 32  # another generation
            monkeypatch.setattr(arena, "words", words)

    def stage(keys, take) -> None:
        staged.extend(keys)
        assert all(take(arena, key) for key in keys)

    monkeypatch.setattr(experts._fetcher, "stage", stage)
    monkeypatch.setattr(experts, "_kernels", [torn])
    assert torch.equal(experts.compute(0, x, choices, weights), expected)
    assert staged == [ExpertKey(0, 6)]
    assert (experts.counters.hits, experts.counters.misses) == (3, 1)


def test_counters_add_up(link: FixedLink) -> None:
    """Every expert that a layer needs in a step is a hit or a miss; with all resident, all later ones hit."""
    engine = load(link, slots=8).engine
    counters = engine.experts.counters
    greedy(engine, PROMPT, 4)
    stride = engine.experts.pool.shape[-1]
    assert counters.misses == counters.bytes_fetched // stride <= 16
    before = counters.copy()
    greedy(engine, PROMPT, 4)
    during = counters.since(before)
    assert (during.misses, during.bytes_fetched, during.staged) == (0, 0, 0)
    assert all(layer.hits for layer in during.layers) and len(during.layers) == 2
    assert during.hits > 2 * 3 * 2  # two layers, three decode steps, at least two experts; and the prompt's


def test_decode_working_set_survives_a_prefill_that_needs_more_than_fits(link: FixedLink) -> None:
    engine = load(link, slots=4).engine
    layer = engine.experts.layers[0]
    x = torch.randn(1, 128)
    weights = torch.full((1, 2), 0.5)
    for pair in ([0, 1], [2, 3], [0, 1], [2, 3]):
        engine.experts.compute(0, x, torch.tensor([pair]), weights)
    prompt = torch.tensor([[3, 4], [5, 6], [7, 4]])  # five experts, four slots, and only 3 is in one
    engine.experts.compute(0, x.expand(3, -1), prompt, weights.expand(3, -1))
    survivors = [expert for expert in range(4) if layer.lookup(expert) is not None]
    assert survivors == [1, 2, 3]  # a quarter of the slots, one, was borrowed by all that passed through


def test_a_failed_fetch_leaves_no_trace(link: FixedLink, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(link, slots=4).engine
    x, weights = torch.randn(1, 128), torch.full((1, 2), 0.5)

    def fail(wanted: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.experts, "_fetch", fail)
        with pytest.raises(Unavailable):
            engine.experts.compute(0, x, torch.tensor([[5, 6]]), weights)
    engine.experts.check_integrity()
    assert engine.experts.layers[0].lookup(5) is None
    engine.experts.compute(0, x, torch.tensor([[5, 6]]), weights)
    assert engine.experts.layers[0].lookup(5) is not None
