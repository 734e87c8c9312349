"""The tree of snapshots: what is found, what is shared, what goes first, and that bytes are conserved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpu_worker.model.states import StatePools
from gpu_worker.prefix_cache import tree
from gpu_worker.prefix_cache.tree import PrefixCache
from tests.helpers.nemotron import make_twins

CONFIG = make_twins().config
CHUNK = 4


def pools_of(tokens: list[int]) -> StatePools:
    """Pools whose first place is as if it had read the tokens: all that is kept tells which these were."""
    pools = StatePools(CONFIG, 1, 64)
    for position in range(len(tokens)):
        pools.keys[:, 0, :, position] = fingerprint(tokens[: position + 1])
        pools.values[:, 0, :, position] = -fingerprint(tokens[: position + 1])
    pools.conv[:], pools.ssm[:] = fingerprint(tokens), 2 * fingerprint(tokens)
    pools.lengths[0] = len(tokens)
    return pools


def fingerprint(tokens: list[int]) -> float:
    value = 1
    for token in tokens:
        value = (value * 31 + token + 1) % 999_983
    return float(value)


def cuts(tokens: list[int]) -> list[int]:
    return list(range(CHUNK, len(tokens) + 1, CHUNK))


def store(cache: PrefixCache, tokens: list[int]) -> None:
    cache.store(tokens, cuts(tokens), pools_of(tokens), 0)
    cache.check_integrity()


def found(cache: PrefixCache, tokens: list[int]) -> int:
    """Tokens of the snapshot that is found, which are checked to be those of the prompt."""
    snapshot = cache.find(tokens, cuts(tokens))
    if snapshot is None:
        return 0
    expected = pools_of(tokens[: snapshot.end])
    assert snapshot.states is not None
    assert torch.equal(snapshot.states.conv, expected.conv[:, 0])
    assert torch.equal(snapshot.states.ssm, expected.ssm[:, 0])
    for chunk in snapshot.way():
        assert chunk.context is not None
        assert torch.equal(chunk.context.keys, expected.keys[:, 0, :, chunk.start : chunk.end])
        assert torch.equal(chunk.context.values, expected.values[:, 0, :, chunk.start : chunk.end])
    return snapshot.end


def size_of(cache_of: list[list[int]]) -> int:
    cache = PrefixCache(1 << 30)
    for tokens in cache_of:
        store(cache, tokens)
    return cache.nbytes


A, B = [1] * 8, [1, 1, 1, 1, 2, 2, 2, 2]  # alike in their first chunk


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(1 << 30)
    store(cache, A[:4])
    store(cache, A)
    assert found(cache, [*A, 5]) == 8
    assert found(cache, B) == 4
    assert found(cache, [2, *A]) == found(cache, A[:3]) == 0
    assert cache.snapshots == 2


def test_keys_and_values_are_kept_once_for_all_that_share_them() -> None:
    one, other, both = size_of([A]), size_of([B]), size_of([A, B])
    chunk = size_of([A, A[:4]]) - StatePools(CONFIG, 1, 64).recurrent_bytes
    assert chunk == one == other  # keys and values of a snapshot within another are not kept again
    shared = CHUNK * (StatePools(CONFIG, 1, 64).token_bytes + 4)
    assert both == one + other - shared


def test_storing_again_takes_nothing() -> None:
    cache = PrefixCache(1 << 30)
    store(cache, A)
    before = cache.nbytes
    store(cache, A)
    assert cache.nbytes == before and cache.snapshots == 1


def test_the_snapshot_unused_for_longest_goes_first() -> None:
    cache = PrefixCache(2 * size_of([[3] * 4]))
    store(cache, [3] * 4)
    store(cache, [4] * 4)
    assert found(cache, [3] * 4) == 4
    store(cache, [5] * 4)
    assert [found(cache, [token] * 4) for token in (3, 4, 5)] == [4, 0, 4]


def test_a_beginning_in_use_by_longer_ones_keeps_its_keys_and_values() -> None:
    """Its states go; what leads to the longer one stays, and comes back to life if it is stored again."""
    cache = PrefixCache(size_of([A]))
    store(cache, A[:4])
    store(cache, A)
    assert (found(cache, A[:4]), found(cache, A), cache.snapshots) == (0, 8, 1)
    store(cache, A[:4])
    assert (found(cache, A[:4]), cache.snapshots) == (4, 1)


def test_what_the_budget_does_not_hold_is_not_kept_and_takes_nothing_away() -> None:
    cache = PrefixCache(size_of([[3] * 4]))
    store(cache, [3] * 4)
    store(cache, [4] * 16)
    assert (found(cache, [3] * 4), found(cache, [4] * 16)) == (4, 0)
    empty = PrefixCache(0)
    store(empty, A)
    assert empty.nbytes == empty.snapshots == 0


def test_equal_hashes_are_not_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Colliding(bytes):
        def __hash__(self) -> int:
            return 1

        __eq__ = bytes.__eq__

    key = tree._key
    monkeypatch.setattr(tree, "_key", lambda *args: Colliding(key(*args)))
    cache = PrefixCache(1 << 30)
    store(cache, A)
    assert (found(cache, B), found(cache, [2] * 8)) == (0, 0)
    store(cache, B)
    assert (found(cache, B), found(cache, A)) == (8, 8)


def test_everything_can_be_forgotten() -> None:
    cache = PrefixCache(1 << 30)
    for tokens in (A, B, [3] * 12):
        store(cache, tokens)
    cache.clear()
    cache.check_integrity()
    assert cache.nbytes == cache.snapshots == found(cache, A) == 0


tokens = st.lists(st.sampled_from([1, 2]), min_size=CHUNK, max_size=20)


class Conversations(RuleBasedStateMachine):
    """Whatever is stored and forgotten: what is found is right, and no more is kept than fits."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(3 * size_of([[3] * 8]))
        self.stored: set[bytes] = set()

    @rule(tokens=tokens)
    def store(self, tokens: list[int]) -> None:
        whole = tokens[: cuts(tokens)[-1]]
        store(self.cache, whole)
        self.stored.add(bytes(whole))
        assert found(self.cache, tokens) == len(whole)

    @rule(tokens=tokens)
    def find(self, tokens: list[int]) -> None:
        length = found(self.cache, tokens)
        assert length == 0 or bytes(tokens[:length]) in self.stored

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.stored.clear()

    @invariant()
    def intact(self) -> None:
        self.cache.check_integrity()


Conversations.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestConversations = Conversations.TestCase
