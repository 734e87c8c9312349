"""Whom work is for: what goes over a wire comes back, and what outsiders send is not believed."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import origin
from common.origin import MAX_PACKED, NOBODY, Origin, is_traceparent

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_nobody_takes_no_bytes() -> None:
    assert NOBODY.pack() == b"" and Origin.unpack(b"") == NOBODY


def test_many_ids_are_cut_at_a_whole_one() -> None:
    ids = tuple(f"{n:064d}" for n in range(40))
    kept = Origin.unpack(Origin(ids, TRACE).pack())
    assert kept.traceparent == TRACE and 10 < len(kept.requests) < 40
    assert kept.requests == ids[: len(kept.requests)]


def test_ids_that_would_be_taken_for_others_are_not_sent() -> None:
    assert Origin.unpack(Origin(("a b",)).pack()) == NOBODY
    assert Origin.unpack(Origin(("a\nb", "c")).pack()) == Origin(("c",))


@pytest.mark.parametrize(
    "data", [b" a", b"-", b"- a\n", b"-  a", "- é".encode(), b"a", b"- " + b"a" * MAX_PACKED]
)
def test_what_nobody_packs_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"origin|trace"):
        Origin.unpack(data)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_origin_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        assert Origin.unpack(data).pack() == data


def test_a_step_is_for_all_who_share_it_and_of_the_first_trace() -> None:
    merged = Origin.merged([Origin(("a",)), Origin(("b",), TRACE), Origin(("a",), "x")])
    assert merged == Origin(("a", "b"), TRACE)
    one = Origin(("a",))
    assert Origin.merged([one]) is one


def test_the_block_ends_what_it_began() -> None:
    with origin.working_for(Origin(("a",))):
        with origin.working_for(Origin(("b",))):
            assert origin.current().requests == ("b",)
        assert origin.current().requests == ("a",)
    assert origin.current() == NOBODY


def test_only_w3cs_form_is_a_traceparent() -> None:
    assert is_traceparent(TRACE)
    assert not any(map(is_traceparent, ["", TRACE.upper(), TRACE + "-1", TRACE[:-1], TRACE + "\n"]))
