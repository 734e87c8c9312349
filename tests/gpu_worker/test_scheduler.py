"""The scheduler over a real engine: who takes part in which step, and one ending for every job.

What a request answers does not depend on what else runs, and neither does its failure.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.errors import Exhausted, ServingError, Unavailable
from gpu_worker.device_errors import DeviceFailed
from gpu_worker.engine import Engine
from gpu_worker.lifecycle import NotAccepting
from gpu_worker.prefix_cache.cuts import CutLaw
from gpu_worker.samples import NotFinite
from tests.helpers.engines import full_arena, load
from tests.helpers.models import make_hf_model, pack_model
from tests.helpers.scheduling import Request, Served, serving

PLACES, CHUNK = 3, 16


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * seed) % 96 for i in range(tokens)]


# Prompts of one to five chunks, all ways of sampling.
REQUESTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "a": (prompt(70), {"max_new_tokens": 20}),
    "b": (prompt(1, 5), {"max_new_tokens": 12}),
    "c": (prompt(16, 1), {"max_new_tokens": 25, "temperature": 1.0, "seed": 3}),
    "e": (prompt(33, 2), {"max_new_tokens": 9, "repetition_penalty": 1.3, "logprobs": 2}),
    "f": (prompt(5, 3), {"max_new_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 4}),
    "g": (prompt(50, 4), {"max_new_tokens": 2}),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("model")
    checkpoint = pack_model(make_hf_model(directory / "hf"), directory / "packed")
    with full_arena(checkpoint) as link:
        engine = load(link, max_sequences=PLACES, slots=4, prefix_cache=0).engine
        engine.cut_law = CutLaw(CHUNK, CHUNK)
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[int]]:
    """The answers to REQUESTS, one after the other."""
    with pytest.MonkeyPatch.context() as patch, serving(engine, patch) as served:
        served.scheduler.start()
        return {name: ask(served, name).tokens() for name in REQUESTS}


@pytest.fixture
def served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving(engine, monkeypatch) as served:
        yield served
        assert served.fatal == []
    engine.check_integrity()


def ask(served: Served, name: str) -> Request:
    tokens, sampling = REQUESTS[name]
    return served.generate(name, tokens, **sampling)


def short(served: Served, name: str, tokens: int = 8) -> Request:
    return served.generate(name, [1, 2], max_new_tokens=tokens)


def fail_once(error: BaseException, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Callable[[], None]:
    """Has the experts of the next step's second layer fail."""
    compute = engine.experts.compute

    def broken(layer: int, *args: Any) -> torch.Tensor:
        if layer == 1:
            monkeypatch.setattr(engine.experts, "compute", compute)
            raise error
        return compute(layer, *args)

    return lambda: monkeypatch.setattr(engine.experts, "compute", broken)


def test_together_and_alone_give_the_same_tokens(served: Served, alone: dict[str, list[int]]) -> None:
    """Twice as many requests as places, joining at different times."""
    joining = {4: "e", 9: "f", 11: "g"}
    served.at = {step: lambda name=name: ask(served, name) for step, name in joining.items()}
    for name in "abc":
        ask(served, name)
    served.scheduler.start()
    served.wait_for(len(REQUESTS))
    assert {request.name: request.tokens() for request in served.requests} == alone
    assert {"d:abc", "d:ace", "d:acf", "d:fg"} <= set(served.steps)
    assert (served.scheduler.running, served.scheduler.waiting, served.scheduler.failed) == (0, 0, 0)


def test_first_come_first_served(served: Served) -> None:
    for name in "abcefg":
        short(served, name, 3)
    served.scheduler.start()
    served.wait_for(6)
    prefills = [step for step in served.steps if step.startswith("p")]
    assert prefills == ["p:a", "p:b", "p:c", "p:e", "p:f", "p:g"]


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk(served: Served) -> None:
    short(served, "a")
    short(served, "b")
    served.at[4] = lambda: served.generate("l", prompt(4 * CHUNK + 1), max_new_tokens=3)
    served.scheduler.start()
    served.wait_for(3)
    steps = "p:a d:a p:b d:ab d:ab p:l d:ab p:l d:ab p:l d:ab p:l d:ab p:l d:bl d:l"
    assert " ".join(served.steps) == steps


def test_prompts_take_turns(served: Served) -> None:
    """A short prompt is read long before a long one that was there first; nothing is decoded meanwhile."""
    served.generate("l", prompt(4 * CHUNK), max_new_tokens=1)
    served.generate("m", prompt(2 * CHUNK), max_new_tokens=1)
    served.generate("s", prompt(CHUNK), max_new_tokens=1)
    served.scheduler.start()
    served.wait_for(3)
    assert " ".join(served.steps) == "p:l p:m p:s p:l p:m p:l p:l"


def test_a_text_is_scored_beside_generations(served: Served, alone: dict[str, list[int]]) -> None:
    """Its windows are prompts; between two of them its place is as new, though all others are taken."""
    tokens = prompt(60, 9)

    def logprobs(request: Request) -> list[float]:
        assert request.ending() is None
        return [value for message in request.messages for value in message.piece.logprobs]

    served.scheduler.start()
    expected = logprobs(served.score("s", tokens, 24, 8))
    served.at[len(served.steps)] = lambda: (served.score("s", tokens, 24, 8), ask(served, "c"))
    ask(served, "f")
    served.wait_for(4)
    *_, scored, c = served.requests
    assert logprobs(scored) == expected and len(expected) == 59
    assert (c.tokens(), served.requests[1].tokens()) == (alone["c"], alone["f"])
    assert "d:cf p:s d:cf" in " ".join(served.steps)


def test_who_is_cancelled_leaves_and_the_others_answer_as_ever(
    served: Served, alone: dict[str, list[int]]
) -> None:
    """Cancelled while it waits, while it decodes (during a chunk of another), while its prompt is read."""
    a, b, c, e, f = (ask(served, name) for name in "abcef")
    served.at = {3: e.cancel, 7: c.cancel, 8: a.cancel}
    served.scheduler.start()
    served.wait_for(5)
    assert [request.ending() for request in (a, c, e)] == [None] * 3
    assert (b.tokens(), f.tokens()) == (alone["b"], alone["f"])
    assert c.output == alone["c"][:3] and not a.messages and not e.messages
    begun = "p:a p:b d:b p:c d:bc p:a d:bc p:a d:b p:f d:bf"
    assert " ".join(served.steps[:11]) == begun


def test_a_step_that_fails_ends_those_who_took_part(
    served: Served, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of two, in the middle, while a third reads its prompt; their places are good after it."""
    gone = Unavailable("the store is gone")
    b, c, a = (ask(served, name) for name in "bca")
    served.at[7] = fail_once(gone, monkeypatch, served.engine)
    served.scheduler.start()
    served.wait_for(3)
    assert served.steps[7] == "d:bc" and served.steps[6] == "p:a"
    assert (b.ending(), c.ending()) == (gone, gone)
    assert a.tokens() == alone["a"]
    assert served.scheduler.failed == 2
    again = [ask(served, name) for name in "bc"]
    assert [request.tokens() for request in again] == [alone["b"], alone["c"]]


def test_an_error_keeps_nothing_that_the_step_had(
    served: Served, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost store's arena would stay mapped: whoever awaits the request is in a cycle with its error."""
    had: list[weakref.ref[Any]] = []

    def lost(layer: int, *args: Any) -> torch.Tensor:
        arena = torch.zeros(1)
        had.append(weakref.ref(arena))
        try:
            raise OSError("cut off")
        except OSError:
            raise Unavailable("the store is gone") from None

    c = ask(served, "c")
    served.at[1] = lambda: monkeypatch.setattr(served.engine.experts, "compute", lost)
    served.scheduler.start()
    served.wait_for(1)
    assert isinstance(c.ending(), Unavailable) and len(had) == 1
    assert had[0]() is None


@pytest.fixture
def one_by_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine wants a step for each sequence."""
    monkeypatch.setattr(engine, "divide", lambda count: [1] * count)


@pytest.mark.usefixtures("one_by_one")
def test_a_token_for_everybody_may_take_several_steps(
    served: Served, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have their turn, and a step that fails ends nobody else."""
    b, c, f = (ask(served, name) for name in "bcf")
    gone = Unavailable("the store is gone")
    served.at[3] = fail_once(gone, monkeypatch, served.engine)
    served.scheduler.start()
    served.wait_for(3)
    assert " ".join(served.steps[:10]) == "p:b d:b p:c d:b d:c p:f d:c d:f d:c d:f"
    assert b.ending() is gone and (c.tokens(), f.tokens()) == (alone["c"], alone["f"])


@pytest.mark.usefixtures("one_by_one")
def test_who_has_failed_takes_part_in_no_further_step(
    served: Served, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with another sample that would be next."""
    b, twins = ask(served, "b"), served.generate("t", prompt(5, 3), samples=2, max_new_tokens=9)
    gone = Unavailable("the store is gone")
    served.at[9] = fail_once(gone, monkeypatch, served.engine)
    served.scheduler.start()
    served.wait_for(2)
    assert " ".join(served.steps[:12]) == "p:b d:b p:t d:b d:t d:b d:t d:t d:b d:t d:b d:b"
    assert twins.ending() is gone and b.tokens() == alone["b"]


def test_a_chunk_that_fails_ends_its_prompt_alone(
    served: Served, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Unavailable("the store is gone")
    b, c, a = (ask(served, name) for name in "bca")
    served.at[6] = fail_once(gone, monkeypatch, served.engine)
    served.scheduler.start()
    served.wait_for(3)
    assert served.steps[6] == "p:a" and a.ending() is gone
    assert (b.tokens(), c.tokens()) == (alone["b"], alone["c"])
    assert served.scheduler.failed == 1


def test_logits_that_are_not_finite_fail_their_sequence_alone(
    served: Served, alone: dict[str, list[int]]
) -> None:
    def poison() -> None:
        served.engine.pools.ssm[:, b.places[0]] = torch.nan

    b, c = ask(served, "b"), ask(served, "c")
    served.at[5] = poison
    served.scheduler.start()
    served.wait_for(2)
    assert served.steps[5] == "d:bc"
    assert isinstance(b.ending(), NotFinite) and isinstance(b.ending(), ServingError)
    assert c.tokens() == alone["c"]
    again = [ask(served, name) for name in "bfe"]  # at all the places
    assert [request.tokens() for request in again] == [alone[name] for name in "bfe"]


def test_a_broken_invariant_ends_everything_and_everyone_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AssertionError("a slot is lost")
    with serving(engine, monkeypatch) as served:
        running, waiting = [short(served, name) for name in "abc"], [short(served, name) for name in "ef"]
        served.at[3] = fail_once(broken, monkeypatch, engine)
        served.scheduler.start()
        assert [request.ending() for request in running] == [broken] * 3
        assert all(isinstance(request.ending(), Unavailable) for request in waiting)
        assert served.scheduler.stop(30) and served.fatal == [broken]
        with pytest.raises(NotAccepting, match="stopping, and this request was not accepted"):
            short(served, "g")
    give_back(engine)


def test_a_place_that_is_lost_is_missed_when_the_last_has_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(engine, monkeypatch) as served:
        served.at[2] = lambda: engine._free_places.remove(2)
        a, b = short(served, "a", 4), short(served, "b", 6)
        served.scheduler.start()
        assert a.ending() is None
        assert isinstance(b.ending(), AssertionError) and "a place is lost" in str(b.ending())
        assert served.scheduler.stop(30) and len(served.fatal) == 1
    give_back(engine)


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "budget of 7.6 GB"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "unspecified launch failure"),
    ],
)
def test_a_failed_device_ends_everything_in_one_line(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    names: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(engine, monkeypatch, budget=7_600_000_000) as served, caplog.at_level(logging.INFO):
        running, waiting = [short(served, name) for name in "abc"], short(served, "e")
        served.at[3] = fail_once(error, monkeypatch, engine)
        served.scheduler.start()
        assert isinstance(waiting.ending(), Unavailable)
        assert served.scheduler.stop(30)
        (failure,) = served.fatal
        assert isinstance(failure, DeviceFailed) and names in str(failure)
        assert [request.ending() for request in running] == [failure] * 3
    assert [(record.getMessage(), record.exc_info) for record in caplog.records] == [(str(failure), None)]
    give_back(engine)


def test_stopping_ends_what_runs_and_what_waits(served: Served) -> None:
    requests = [served.generate(name, prompt(40), max_new_tokens=400) for name in "abce"]
    served.at[20] = threading.Thread(target=served.scheduler.stop, args=(30,)).start
    served.scheduler.start()
    served.wait_for(4)
    assert all(isinstance(request.ending(), Unavailable) for request in requests)
    assert served.scheduler.stop(30)


def test_who_has_given_up_again_leaves_nothing_to_do(served: Served) -> None:
    """Between the scheduler's being woken and its looking, the only job may go."""
    served.scheduler._iterate()
    assert served.events == []


def test_a_full_queue_refuses_and_who_gave_up_makes_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds a place does not count, even if the step in progress has to end first."""
    refused: list[str] = []

    def arrive() -> None:
        for name in "bcefgh":
            try:
                short(served, name)
            except Exhausted as error:
                refused.append(f"{name}: {error}")
        served.requests[3].cancel()
        short(served, "i")

    with serving(engine, monkeypatch, max_queue=2) as served:
        served.at[2] = arrive
        short(served, "a")
        served.scheduler.start()
        served.wait_for(6)
        assert refused == [f"{name}: 2 requests are waiting already; try again later" for name in "gh"]
        assert not served.requests[3].messages  # it never ran


def give_back(engine: Engine) -> None:
    """After a scheduler that left the engine as it was."""
    taken = set(range(PLACES)) - set(engine._free_places)
    for place in taken:
        engine.give_place(place)
    engine.check_integrity()
