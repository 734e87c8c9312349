"""The data plane's wire: every message round-trips, and no bytes of others are taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.expert_key import ExpertKey
from common.messages import (
    MAX_KEYS,
    Done,
    Failed,
    Fault,
    Kind,
    Malformed,
    Reply,
    Request,
    Staged,
    pack_reply,
    peek_request_id,
    unpack_reply,
)
from common.origin import Origin

U64 = st.integers(0, (1 << 64) - 1)
ORIGINS = st.builds(
    Origin,
    st.lists(st.from_regex(r"[!-~]{1,64}", fullmatch=True), max_size=12).map(tuple),
    st.sampled_from(["", "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"]),
)
KEYS = st.builds(ExpertKey, st.integers(0, 65535), st.integers(0, 65535))
REQUESTS = st.one_of(
    st.builds(Request, st.just(Kind.STAGE), U64, U64, st.tuples(KEYS), ORIGINS),
    st.builds(
        Request,
        st.sampled_from([Kind.RELEASE, Kind.HINT]),
        U64,
        U64,
        st.lists(KEYS, max_size=40).map(tuple),
        ORIGINS,
    ),
)
REPLIES = st.one_of(
    st.builds(Staged, U64),
    st.builds(Done, U64),
    st.builds(Failed, U64, st.sampled_from([fault for fault in Fault if fault]), st.text(max_size=80)),
)


@given(REQUESTS)
def test_requests_round_trip(request: Request) -> None:
    assert Request.unpack(request.pack()) == request
    assert peek_request_id(request.pack()) == request.request_id


@given(REPLIES)
def test_replies_round_trip(reply: Reply) -> None:
    assert unpack_reply(pack_reply(reply)) == reply


@given(st.binary(max_size=200))
def test_random_bytes_are_malformed(data: bytes) -> None:
    for unpack in (Request.unpack, unpack_reply):
        with pytest.raises(Malformed):
            unpack(data)
    peek_request_id(data)


@given(REQUESTS, st.data())
def test_a_changed_length_is_malformed(request: Request, data: st.DataObject) -> None:
    packed = request.pack()
    cut = data.draw(st.integers(0, len(packed) - 1))
    for wrong in (packed[:cut], packed + b"\0"):
        with pytest.raises(Malformed):
            Request.unpack(wrong)


def test_too_many_keys_are_malformed() -> None:
    with pytest.raises(Malformed, match="keys"):
        Request.unpack(Request(Kind.HINT, 1, 1, (ExpertKey(0, 0),) * (MAX_KEYS + 1)).pack())
