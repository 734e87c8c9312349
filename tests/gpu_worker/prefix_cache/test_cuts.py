"""Where prompts are cut: a law of what comes before the cut, and of nothing after it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.prefix_cache.cuts import CutLaw

END = 9
prompts = st.lists(st.sampled_from([1, 2, END]), max_size=120)
laws = st.builds(CutLaw, st.integers(1, 40), st.integers(1, 50), st.just(frozenset({END})))


def test_full_chunks_without_turns() -> None:
    law = CutLaw(16, 4, frozenset({END}))
    assert law.cuts([1] * 40) == [16, 32]
    assert law.cuts([1] * 32) == [16, 32]
    assert law.cuts([1] * 15) == law.cuts([]) == []


def test_a_message_that_is_long_enough_ends_with_a_cut() -> None:
    law = CutLaw(16, 4, frozenset({END}))
    assert law.cuts([1, END, 1, END, 1, 1, 1]) == [4]  # the first message alone is too short
    assert law.cuts([1] * 18 + [END] + [1] * 20) == [16, 32]  # three tokens after a full chunk
    assert law.cuts([1] * 19 + [END] + [1] * 20) == [16, 20, 36]
    assert law.cuts([1] * 35 + [END]) == [16, 32, 36]


@given(laws, prompts, prompts)
def test_a_cut_depends_on_what_comes_before_it(law: CutLaw, prompt: list[int], more: list[int]) -> None:
    both = law.cuts(prompt + more)
    assert law.cuts(prompt) == [cut for cut in both if cut <= len(prompt)]


@given(laws, prompts)
def test_chunks_are_as_long_as_they_may_be(law: CutLaw, prompt: list[int]) -> None:
    """And no turn goes by uncut where there was room."""
    cuts = [0, *law.cuts(prompt), len(prompt)]
    least = min(law.chunk, law.least)
    for start, end in pairwise(cuts):
        assert end - start <= law.chunk
        assert END not in prompt[start + least - 1 : end - 1]
        assert end == len(prompt) or end - start == law.chunk or prompt[end - 1] == END
