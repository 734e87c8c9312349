"""Sampling: cuts equal Hugging Face's, draws follow them, seeds reproduce, absurd values are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.errors import InvalidRequest
from gpu_worker.sampling import Sampler, SamplingParams, penalise, pick, warp


def random_logits(seed: int, vocab: int = 300) -> Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def reference_scores(params: SamplingParams, history: list[int], logits: Tensor) -> Tensor:
    """What Hugging Face's generate samples from, in the order in which it applies its processors."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([history]), logits.double()[None])[0]


@settings(deadline=None, max_examples=200)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 40, 299, 1000]),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
    repetition_penalty=st.floats(0.5, 2),
    seed=st.integers(0, 50),
)
def test_distribution_equals_hugging_face(seed: int, **chosen: Any) -> None:
    params, logits = SamplingParams(**chosen), random_logits(seed)
    history = [5, 5, int(logits.argmax()), 17]
    seen = torch.zeros(len(logits), dtype=torch.bool).index_fill(0, torch.tensor(history), True)
    got = warp(penalise(logits.double(), seen, params.repetition_penalty), params).softmax(-1)
    expected = reference_scores(params, history, logits).softmax(-1)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected)


def test_greedy_is_argmax_with_the_lowest_id_on_ties() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    choice = Sampler(SamplingParams(), [0]).choose(logits)
    assert choice.token == 1 and choice.alternatives == ()
    assert choice.logprob == pytest.approx(float(logits.log_softmax(-1)[1]))


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=0.3, top_k=1, repetition_penalty=1.5, logprobs=5, seed=1)
    choice = Sampler(params, [int(logits.argmax())]).choose(logits)
    logprobs, best = logits.log_softmax(-1).sort(descending=True)
    assert choice.logprob == pytest.approx(float(logits.log_softmax(-1)[choice.token]))
    assert [token for token, _ in choice.alternatives] == best[:5].tolist()
    assert [logprob for _, logprob in choice.alternatives] == pytest.approx(logprobs[:5].tolist())


def test_more_alternatives_than_tokens() -> None:
    assert len(Sampler(SamplingParams(logprobs=20), [0]).choose(torch.zeros(3)).alternatives) == 3


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, -torch.inf, 2.0, 0.5, -1.0])
    sampler = Sampler(SamplingParams(temperature=0.8, seed=3), [0])
    counts = torch.bincount(torch.tensor([sampler.choose(logits).token for _ in range(4000)]), minlength=5)
    expected = (logits / 0.8).softmax(-1)
    assert counts[1] == 0
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_tokens_of_probability_zero_are_never_picked() -> None:
    probabilities = torch.tensor([0, 0.25, 0, 0.75, 0], dtype=torch.float64)
    uniforms = [0.0, 0.2, 0.25, 0.9, math.nextafter(1.0, 0.0)]
    assert [int(pick(probabilities, uniform)) for uniform in uniforms] == [1, 1, 3, 3, 3]
    assert (
        int(pick(probabilities * 0.9, math.nextafter(1.0, 0.0))) == 3
    )  # as when rounding leaves the sum off 1


def test_a_vanishing_top_p_keeps_one_token() -> None:
    kept = warp(torch.zeros(4, dtype=torch.float64), SamplingParams(temperature=1, top_p=1e-300))
    assert kept.isfinite().sum() == 1


def test_a_seed_reproduces_whatever_other_sequences_do() -> None:
    params = SamplingParams(temperature=1.0, seed=(1 << 64) - 1)
    alone, beside, other = (
        Sampler(params, [0]),
        Sampler(params, [0]),
        Sampler(SamplingParams(temperature=1), [0]),
    )
    for step in range(50):
        torch.rand(step)  # the global generator is nobody's
        other.choose(random_logits(step))
        assert alone.choose(random_logits(step)) == beside.choose(random_logits(step))


def test_different_seeds_differ_and_so_do_unseeded_samplers() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [0])
        return [sampler.choose(random_logits(step)).token for step in range(20)]

    assert run(1) != run(2)
    assert run(None) != run(None)


def test_chosen_tokens_are_penalised_like_the_prompts() -> None:
    logits = torch.tensor([5.0, 4.9, 4.8, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    assert [sampler.choose(logits).token for _ in range(4)] == [1, 2, 0, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-12, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    choice = Sampler(SamplingParams(temperature=temperature, top_p=0.9, seed=1), [0]).choose(random_logits(2))
    if temperature < 1:
        assert choice.token == int(random_logits(2).argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits(1)
    logits[7] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), [0]).choose(logits)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1.0, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.1, 1.01, math.nan]),
        ("min_p", [-0.1, 1.0, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf]),
        ("seed", [-1, 1 << 64]),
        ("max_new_tokens", [0, -5]),
        ("stop", [("",), ("a",) * 17, ("a" * 1025,)]),
        ("logprobs", [-1, 21]),
    ],
)
def test_absurd_values_are_refused_by_name_and_range(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=rf"^{field} must be .*(\d|number).*, not "):
            SamplingParams(**{field: value})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(top_p=1.0, min_p=0.0, seed=0, stop=("a",) * 16, logprobs=20, max_new_tokens=1)
    SamplingParams(top_p=1e-9, min_p=0.999, seed=(1 << 64) - 1, repetition_penalty=100.0, top_k=1 << 31)


def test_greedy_takes_what_is_known_already_and_nothing_else_does() -> None:
    logits, best = random_logits(3), torch.tensor([5.0, -0.25], dtype=torch.float64)
    assert Sampler(SamplingParams(), [0]).choose(logits, best) == (5, -0.25, ())
    for params in (SamplingParams(logprobs=1), SamplingParams(repetition_penalty=1.1)):
        assert Sampler(params, [0]).choose(logits, best) == Sampler(params, [0]).choose(logits)
    with pytest.raises(FloatingPointError):
        Sampler(SamplingParams(), [0]).choose(logits, torch.tensor([5.0, math.nan]))
