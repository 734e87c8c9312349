"""Several samples of one prompt: read once, one stream each, places shared with everybody else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

from common.errors import Unavailable
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.prefix_cache.cuts import CutLaw
from gpu_worker.samples import NotFinite
from gpu_worker.sampling import stream_seed
from gpu_worker.sequences import sequence_messages
from tests.helpers.engines import full_arena, load
from tests.helpers.models import make_hf_model, pack_model
from tests.helpers.scheduling import Request, Served, serving

PLACES, CHUNK = 3, 16
PROMPT = [(5 * i * i + i) % 96 for i in range(40)]
SAMPLING: dict[str, Any] = {"temperature": 1.2, "seed": 11, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("model")
    with full_arena(pack_model(make_hf_model(directory / "hf"), directory / "packed")) as link:
        engine = load(link, max_sequences=PLACES, prefix_cache=0).engine
        engine.cut_law = CutLaw(CHUNK, CHUNK)
        yield engine


@pytest.fixture
def served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving(engine, monkeypatch) as served:
        yield served
        assert served.fatal == []
    engine.check_integrity()
    for pool in (engine.pools.keys, engine.pools.values, engine.pools.conv, engine.pools.ssm):
        assert not pool.any(), "a free place is not as new"


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[list[int]]:
    """Eight samples, with nothing else running: the first is what is answered to one, all are different."""
    with pytest.MonkeyPatch.context() as patch, serving(engine, patch) as served:
        served.scheduler.start()
        one = served.generate("a", PROMPT, **SAMPLING).tokens()
        samples = ask(served, 8).samples()
        seeded = [
            served.generate("a", PROMPT, **SAMPLING | {"seed": stream_seed(11, i)}).tokens() for i in range(8)
        ]
    assert samples[0] == one and samples == seeded
    assert len({tuple(sample) for sample in samples}) == 8
    return samples


def ask(served: Served, samples: int, name: str = "s", **options: Any) -> Request:
    return served.generate(name, PROMPT, samples=samples, **SAMPLING | options)


def test_the_prompt_is_read_once_and_samples_take_what_places_there_are(
    served: Served, alone: list[list[int]]
) -> None:
    served.scheduler.start()
    assert ask(served, 4).samples() == alone[:4]
    assert " ".join(served.steps) == "p:s p:s p:s d:s" + " d:sss" * 7 + " d:sss" + " d:s" * 7
    usages = [message.finish.usage for message in served.requests[0].messages if message.HasField("finish")]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(40, 9)] * 4


@pytest.mark.parametrize("count", [1, 2, 8])
def test_samples_are_the_same_whatever_else_runs(served: Served, alone: list[list[int]], count: int) -> None:
    """Others hold the places, come, and go; at times one place is all that the request has."""
    for name in "ab":
        served.generate(name, PROMPT[:7], max_new_tokens=17, temperature=1.0, seed=3)
    request = ask(served, count)
    for name in "cdef":
        served.generate(name, PROMPT[:5], max_new_tokens=13, samples=2)
    served.scheduler.start()
    served.wait_for(7)
    assert request.samples() == alone[:count]
    assert served.requests[0].tokens() == served.requests[1].tokens()


def test_samples_that_end_with_their_first_token(served: Served, alone: list[list[int]]) -> None:
    served.scheduler.start()
    assert ask(served, 100, max_new_tokens=1).samples()[:8] == [sample[:1] for sample in alone]
    assert served.steps == ["p:s"] * 3


def test_samples_of_one_token_do_not_keep_up_those_that_decode(served: Served) -> None:
    """Between two steps no more of them begin than there are places."""
    served.generate("a", PROMPT[:2], max_new_tokens=80)
    ask(served, 100, max_new_tokens=1)
    served.scheduler.start()
    served.wait_for(2)
    told = " ".join(event for event in served.events if event not in ("t:a", "f:s", "p:s"))
    assert "t:s " * 2 in told and "t:s " * (PLACES + 1) not in told


def test_a_place_for_a_further_sample_is_waited_for_like_any_other(served: Served) -> None:
    """Whoever came before the sample before it began goes first, and whoever is more urgent."""
    order: list[str] = []
    served.at = {3: lambda: [served.generate(name, PROMPT[:2], max_new_tokens=40) for name in "ab"]}
    ask(served, 30, max_new_tokens=2)
    served.scheduler.start()
    served.wait_for(3)
    for step in served.steps:
        order += sorted(set(step[2:]) - set(order))
    assert order == ["s", "a", "b"]
    assert "d:abs" in served.steps  # it kept one, though it had 30 to go


def test_many_samples_do_not_keep_the_only_place(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, alone: list[list[int]]
) -> None:
    """Whoever comes while a sample runs is next when it ends, another with many samples too; the prompts are
    read once, and what is answered stays the same."""
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    with serving(engine, monkeypatch) as served:
        served.at = {
            5: lambda: served.generate("a", PROMPT[:2], max_new_tokens=3),
            14: lambda: ask(served, 8, "b"),
        }
        ask(served, 8)
        served.scheduler.start()
        served.wait_for(3)
        turns = [key for key, _ in groupby(step[2:] for step in served.steps)]
        assert turns[:7] == ["s", "a", "s", "b", "s", "b", "s"]
        assert [step for step in served.steps if step[0] == "p"] == ["p:s"] * 3 + ["p:a"] + ["p:b"] * 3
        assert [served.requests[i].samples() for i in (0, 2)] == [alone, alone]
    assert not engine.pools.keys.any() and not engine.pools.values.any()
    for place in taken:
        engine.give_place(place)


def test_a_request_that_was_set_aside_can_be_cancelled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    with serving(engine, monkeypatch) as served:
        served.at = {
            5: lambda: served.generate("a", PROMPT[:2], max_new_tokens=20),
            15: lambda: served.requests[0].cancel(),
        }
        ask(served, 8)
        served.scheduler.start()
        served.wait_for(2)
        assert served.steps[-1] == "d:a" and len(served.requests[1].tokens()) == 20
        assert served.scheduler.jobs == [] and engine.free_places == 1
    for place in taken:
        engine.give_place(place)


def test_a_request_that_was_set_aside_is_told_as_such(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a prefill once, and counted as running."""
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    told: dict[int, list[pb.SequenceInfo]] = {}
    with serving(engine, monkeypatch) as served:

        def look(step: int) -> None:
            told[step] = sequence_messages(served.scheduler.jobs)

        served.at = {
            1: lambda: look(1),
            5: lambda: served.generate("a", PROMPT[:2], max_new_tokens=6),
            6: lambda: look(6),
            22: lambda: look(22),
        }
        ask(served, 8)
        served.scheduler.start()
        served.wait_for(2)
    assert " ".join(served.steps[:25]) == "p:s p:s p:s" + " d:s" * 16 + " p:a" + " d:a" * 5
    states = {step: [sequence.state for sequence in sequences] for step, sequences in told.items()}
    assert states == {1: ["prefill"], 6: ["decode", "waiting"], 22: ["set aside", "decode"]}
    assert [sequence.completion_tokens for sequence in told[22]] == [18, 3]
    for place in taken:
        engine.give_place(place)


def test_no_more_prompts_are_set_aside_than_stated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, alone: list[list[int]]
) -> None:
    """Of further requests, one keeps the place until it has no further samples. What the host keeps of all
    their prompts is bounded by that, and told."""
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    with serving(engine, monkeypatch) as served:
        most = kept = 0
        prompt = engine.pools.recurrent_bytes + len(PROMPT) * engine.pools.token_bytes

        def count() -> None:
            nonlocal most, kept
            scheduler = served.scheduler
            most, kept = max(most, scheduler.set_aside), max(kept, scheduler.prompt_state_bytes)
            assert scheduler.running == 1 and scheduler.prompt_state_bytes >= scheduler.set_aside * prompt
            served.at[len(served.steps) + 1] = count

        served.at[1] = count
        for name in "abcdefgh":
            ask(served, 3, name)
        served.scheduler.start()
        served.wait_for(8)
        assert all(request.samples() == alone[:3] for request in served.requests)
        assert most == 4 and 4 * prompt < kept <= 5 * prompt
        assert served.scheduler.prompt_state_bytes == 0
    for place in taken:
        engine.give_place(place)


def test_an_urgent_request_goes_before_those_that_came_earlier(served: Served) -> None:
    for name in "abc":
        served.generate(name, PROMPT[:3], max_new_tokens=6)
    served.generate("d", PROMPT[:3], max_new_tokens=2)
    served.generate("u", PROMPT[:3], max_new_tokens=2, priority=1)
    served.scheduler.start()
    served.wait_for(5)
    begun = [step for step in served.steps if step.startswith("p")]
    assert begun == ["p:u", "p:a", "p:b", "p:c", "p:d"]


def test_cancelling_ends_all_samples(served: Served) -> None:
    request = ask(served, 7, max_new_tokens=400)
    served.at = {9: request.cancel}
    served.scheduler.start()
    assert request.ending() is None
    assert len(served.steps) <= 10 and not any(message.HasField("finish") for message in request.messages)
    assert served.engine.free_places == PLACES and served.scheduler.waiting == 0


def test_a_step_that_fails_is_one_ending_for_all_samples(served: Served, alone: list[list[int]]) -> None:
    gone, decode = Unavailable("the store is gone"), served.engine.decode

    def failing(*args: Any) -> torch.Tensor:
        if len(served.steps) == 6:
            served.engine.decode = decode  # type: ignore[method-assign]
            raise gone
        return decode(*args)

    served.engine.decode = failing  # type: ignore[method-assign, assignment]
    request = ask(served, 5)
    served.scheduler.start()
    assert request.ending() is gone and served.scheduler.failed == 1
    assert ask(served, 5).samples() == alone[:5]


def test_a_sample_gone_wrong_ends_its_request_alone(served: Served, alone: list[list[int]]) -> None:
    """Two samples of it go wrong in one step; the error is told once."""

    def poison() -> None:
        for place in bad.places:
            served.engine.pools.ssm[:, place] = torch.nan

    bad = served.generate("b", PROMPT, samples=2, max_new_tokens=30)
    good = ask(served, 1)
    served.at[10] = poison
    served.scheduler.start()
    assert isinstance(bad.ending(), NotFinite)
    assert good.samples() == alone[:1]


def test_places_for_one(engine: Engine, monkeypatch: pytest.MonkeyPatch, alone: list[list[int]]) -> None:
    """With one place in all, samples come one after the other, and the prompt is still read once."""
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    with serving(engine, monkeypatch) as served:
        served.scheduler.start()
        assert ask(served, 8).samples() == alone
        assert served.steps == ["p:s"] * 3 + ["d:s"] * 8 * 8
        served.eos = (alone[-1][2],)  # the last is shorter than those before it at its place
        assert ask(served, 8).samples()[-1] == alone[-1][:3]
    assert not engine.pools.keys.any() and not engine.pools.values.any()
    for place in taken:
        engine.give_place(place)
