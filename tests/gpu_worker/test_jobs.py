"""What generations stream: the same where the engine only launches a step as where it waits for it."""

from collections.abc import Iterator

import pytest

from common.errors import InvalidRequest
from gpu_worker.engine import Engine
from gpu_worker.jobs import check_length
from gpu_worker.prefix_cache.cuts import CutLaw
from tests.helpers.engines import full_arena, load
from tests.helpers.models import make_hf_model, pack_model
from tests.helpers.scheduling import serving

PROMPT = [5, 3, 80, 2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("model")
    with full_arena(pack_model(make_hf_model(directory / "hf"), directory / "packed")) as link:
        yield load(link, max_sequences=2, prefix_cache=0).engine


def test_a_larger_context_is_advised_where_the_model_has_one() -> None:
    with pytest.raises(
        InvalidRequest, match="at most 8: shorten it, or start the worker with a larger --max"
    ):
        check_length(9, 8, 16)
    with pytest.raises(InvalidRequest, match=r"at most 8: shorten it$"):
        check_length(9, 8, 8)


def test_a_token_is_streamed_while_the_next_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for launches_only, order in (
        (False, "p:a t:a d:a t:a d:a t:a d:a t:a f:a"),
        (True, "p:a d:a t:a d:a t:a d:a t:a t:a f:a"),
    ):
        with serving(engine, monkeypatch) as served:
            monkeypatch.setattr(engine, "launches_only", launches_only)
            request = served.generate("a", PROMPT, max_new_tokens=4)
            served.scheduler.start()
            answers.append(request.tokens())
        assert " ".join(served.events) == order
        assert answers[-1] == request.output
    assert answers[0] == answers[1]


def test_tokens_of_a_batch_are_streamed_while_the_next_are_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all its sequences, but before a chunk of another's prompt, which takes longer than a step."""
    monkeypatch.setattr(engine, "launches_only", True)
    monkeypatch.setattr(engine, "cut_law", CutLaw(3, 3))
    with serving(engine, monkeypatch) as served:
        a, b = served.generate("a", [1], max_new_tokens=5), served.generate("b", PROMPT, max_new_tokens=3)
        served.scheduler.start()
        for request, count in ((a, 5), (b, 3)):
            assert len(request.tokens()) == count
    joined = "p:a d:a t:a t:a p:b d:a t:a p:b d:ab t:b d:ab t:a t:b t:a f:a t:b f:b"
    assert " ".join(served.events) == joined


def test_a_stop_string_is_looked_for_before_the_next_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "launches_only", True)
    with serving(engine, monkeypatch) as served:
        request = served.generate("a", PROMPT, max_new_tokens=3, stop=("never",))
        served.scheduler.start()
        assert len(request.tokens()) == 3
    assert " ".join(served.events) == "p:a t:a d:a t:a d:a t:a f:a"
