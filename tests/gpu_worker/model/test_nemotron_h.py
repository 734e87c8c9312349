"""The whole model: equal to transformers, and equal to itself however its work is cut up."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.model.states import StatePools
from tests.helpers.nemotron import Twins, make_twins, relative_error

SHAPES = {
    "all four block types": {},
    "grouped routing": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "norm_topk_prob": False},
    "no conv bias": {"use_conv_bias": False, "conv_kernel": 2},
    "one group, one kv head": {"n_groups": 1, "num_key_value_heads": 1, "chunk_size": 64},
    "deep": {"hybrid_override_pattern": "MEMEM*EMEMEM*EME-E", "hidden_size": 80},
    # Half of all dt lie below this bound, so that a missing clamp shows.
    "clamped time steps": {"time_step_min": 0.05},
}
PROMPT = 101  # longer than any chunk_size, and no multiple of one


@cache
def twins(shape: str = "all four block types") -> Twins:
    return make_twins(**SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    tokens = twins(shape).tokens(PROMPT)
    error = relative_error(twins(shape).prefill_logits(tokens), twins(shape).reference_logits(tokens))
    assert error <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32])
def test_short_prompts_equal_transformers(length: int) -> None:
    tokens = twins().tokens(length)
    assert relative_error(twins().prefill_logits(tokens), twins().reference_logits(tokens)) <= 1e-5


@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, PROMPT - 1), max_size=6))
def test_chunked_prefill_equals_whole(cuts: set[int]) -> None:
    tokens, pools = twins().tokens(PROMPT), twins().pools()
    edges = [0, *sorted(cuts), PROMPT]
    chunks = [tokens[start:end] for start, end in pairwise(edges)]
    hidden = torch.cat([twins().model.prefill(chunk, 0, pools) for chunk in chunks])
    assert relative_error(twins().model.logits(hidden), twins().prefill_logits(tokens)) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 37])
def test_decode_after_prefill_equals_prefill_of_the_whole(shape: str, prompt: int) -> None:
    model, tokens, pools = twins(shape).model, twins(shape).tokens(prompt + 20), twins(shape).pools()
    place = torch.tensor([0])
    rows = [model.prefill(tokens[:prompt], 0, pools)]
    rows += [model.decode(token[None], place, pools) for token in tokens[prompt:]]
    assert pools.lengths.tolist() == [prompt + 20]
    got = model.logits(torch.cat(rows))
    assert relative_error(got, twins(shape).prefill_logits(tokens)) <= 1e-5


def decode_batch(
    pools: StatePools, places: list[int], steps: int, context: int | None = None
) -> torch.Tensor:
    """Logits (steps, b, vocab) of sequences of 5, 40 and 17 tokens at `places`, then `steps` tokens each."""
    model = twins().model
    for seed, (place, length) in enumerate(zip(places, [5, 40, 17], strict=True)):
        model.prefill(twins().tokens(length, seed), place, pools)
    following = twins().tokens(3 * steps, seed=9).view(steps, 3)
    rows = [model.decode(tokens, torch.tensor(places), pools, context) for tokens in following]
    return model.logits(torch.stack(rows))


def test_decode_batch_equals_one_at_a_time() -> None:
    together = decode_batch(twins().pools(sequences=5), [3, 0, 4], steps=8)
    following = twins().tokens(24, seed=9).view(8, 3)
    for row, length in enumerate([5, 40, 17]):
        whole = torch.cat([twins().tokens(length, seed=row), following[:, row]])
        alone = twins().prefill_logits(whole)[length:]
        assert relative_error(together[:, row], alone) <= 1e-5


def test_decode_touches_only_the_places_of_its_batch() -> None:
    pools = twins().pools(sequences=2)
    twins().model.prefill(twins().tokens(9), 1, pools)
    before = [state.clone() for state in (pools.conv, pools.ssm, pools.keys, pools.values)]
    twins().model.decode(torch.tensor([7]), torch.tensor([0]), pools)
    after = (pools.conv, pools.ssm, pools.keys, pools.values)
    assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(before, after, strict=True))
    assert pools.lengths.tolist() == [1, 9]


def test_a_tight_context_changes_nothing() -> None:
    whole = decode_batch(twins().pools(sequences=3), [0, 1, 2], steps=4)
    tight = decode_batch(twins().pools(sequences=3), [0, 1, 2], steps=4, context=44)
    assert relative_error(tight, whole) <= 1e-6


def test_the_last_token_that_a_context_holds() -> None:
    tokens, pools = twins().tokens(33), twins().pools(max_context=33)
    twins().model.prefill(tokens[:32], 0, pools)
    last = twins().model.decode(tokens[32:], torch.tensor([0]), pools)
    assert relative_error(twins().model.logits(last), twins().prefill_logits(tokens)[32:]) <= 1e-5
    with pytest.raises(AssertionError, match="context of 33"):
        twins().model.prefill(tokens[:1], 0, pools)


def test_greedy_continuation_of_200_tokens_equals_generate() -> None:
    # transformers does not clamp dt in its cached steps, so the bound must not bite for the two to agree.
    # The seed is one whose two best logits are never closer than 2e-3, a thousand times their error.
    deep = make_twins(seed=1, **SHAPES["deep"], time_step_min=1e-6)
    prompt, pools = deep.tokens(37), deep.pools()
    expected = deep.reference.generate(
        prompt[None], max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 37:]
    assert expected.unique().numel() > 20, "a degenerate continuation proves little"
    hidden, got = deep.model.prefill(prompt, 0, pools)[-1:], []
    for _ in range(200):
        token = deep.model.logits(hidden).argmax(-1)
        got.append(token)
        hidden = deep.model.decode(token, torch.tensor([0]), pools)
    assert torch.equal(torch.cat(got), expected)


class ForbidHostSync(TorchDispatchMode):
    """Fails on the operators through which a tensor's content reaches the host or decides a shape."""

    FORBIDDEN = frozenset((
        "item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount",
        "_unique2", "resolve_neg",
    ))  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), (
                "boolean mask"
            )
        return func(*args, **(kwargs or {}))


def test_decode_never_waits_for_the_device() -> None:
    pools = twins().pools(sequences=3)
    tokens, places = torch.tensor([5, 6]), torch.tensor([2, 0])
    with ForbidHostSync():
        hidden = twins().model.decode(tokens, places, pools)
        twins().model.logits(hidden)
    with pytest.raises(AssertionError, match="item"), ForbidHostSync():
        twins().model.prefill(tokens, 0, pools)  # reads its start: the watch does see


def test_bfloat16_computes_in_bfloat16_and_stays_close() -> None:
    half, tokens = make_twins(dtype=torch.bfloat16), twins().tokens(40)
    pools = half.pools()
    hidden = half.model.prefill(tokens, 0, pools)
    assert hidden.dtype == pools.keys.dtype == pools.conv.dtype == torch.bfloat16
    assert pools.ssm.dtype == half.model.logits(hidden).dtype == torch.float32
    decoded = half.model.decode(tokens[:1], torch.tensor([0]), pools)
    expected = twins().reference_logits(torch.cat([tokens, tokens[:1]]))
    got = half.model.logits(torch.cat([hidden, decoded]))
    assert relative_error(got, expected) <= 0.1
