"""Answers with the prefix cache are those without it, bit for bit, and less is read for them.

The demo model in float32, with chunks so short that a prompt has several; answers are compared with their
logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from common.errors import Unavailable
from expert_store.config import DEMO
from expert_store.models import locate_model
from gpu_worker.engine import Engine
from gpu_worker.loading import ServedModel
from gpu_worker.prefix_cache.cuts import CutLaw
from gpu_worker.prefix_cache.tree import PrefixCache
from tests.helpers.engines import full_arena, load
from tests.helpers.models import pack_model
from tests.helpers.scheduling import Served, serving

CHUNK, LEAST, PLACES = 48, 12, 3
END_OF_TURN = 2
Answer = tuple[list[int], Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    packed = pack_model(locate_model(DEMO).directory, tmp_path_factory.mktemp("demo") / "packed")
    with full_arena(packed) as link:
        yield load(link, max_sequences=PLACES, max_context=1024, prefix_cache=0)


@pytest.fixture
def engine(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    law = CutLaw(CHUNK, LEAST, frozenset(model.eos_token_ids))
    monkeypatch.setattr(model.engine, "cut_law", law)
    monkeypatch.setattr(model.engine, "prefixes", PrefixCache(0))
    yield model.engine
    model.engine.check_integrity()


@contextmanager
def serving_with(engine: Engine, budget: int) -> Iterator[Served]:
    """With an empty cache of so many bytes."""
    with pytest.MonkeyPatch.context() as patch, serving(engine, patch) as served:
        patch.setattr(engine, "prefixes", PrefixCache(budget))
        served.eos = tuple(engine.cut_law.turn_ends)
        yield served
        engine.prefixes.clear()
        engine.check_integrity()
        assert engine.prefixes.nbytes == engine.prefixes.snapshots == 0


def answer(served: Served, prompt: Sequence[int], count: int = 6, **options: int) -> Answer:
    """Tokens, and logits from which they were chosen."""
    rows: list[Tensor] = []
    logits = served.engine.logits

    def noted(hidden: Tensor) -> Tensor:
        rows.append(logits(hidden).clone())
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "logits", noted)
        request = served.generate("a", prompt, max_new_tokens=count, **options)
        tokens = request.tokens()
    usage = request.finish.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(tokens))
    return tokens, torch.cat(rows)


def cached(served: Served) -> int:
    """Tokens of the last prompt that were not read."""
    return int(served.requests[-1].finish.usage.cached_prompt_tokens)


def assert_same(one: Answer, other: Answer) -> None:
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


class Chat:
    """A chat by the model's own template."""

    def __init__(self, model: ServedModel, system: str) -> None:
        assert model.tokenizer is not None
        self._tokenizer = model.tokenizer
        self._messages = [{"role": "system", "content": system}]

    def ask(self, text: str) -> list[int]:
        """The prompt of the next turn."""
        self._messages.append({"role": "user", "content": text})
        return self._tokenizer.encode_chat(self._messages)

    def answered(self, output: Sequence[int]) -> None:
        self._messages.append({"role": "assistant", "content": self._tokenizer.decode(output)})


def test_a_second_turn_does_not_read_the_first_again(model: ServedModel, engine: Engine) -> None:
    """Of the first prompt, what is read again is less than a message's `least`, and what opens the answer."""
    chat = Chat(model, "You tell stories of the sea. " * 5)
    first = chat.ask("Tell me of a ship, of her crew, and of the storm in which she was lost.")
    with serving_with(engine, 1 << 30) as served:
        served.scheduler.start()
        output, _ = answer(served, first, 30)
        assert cached(served) == 0
        chat.answered(output)
        second = chat.ask("Now tell me what the captain wrote in his book on the evening before.")
        warm = answer(served, second)
        assert len(first) - LEAST - 5 <= cached(served) <= len(first)
        counters = engine.prefixes.counters
        assert (counters.lookups, counters.hits, counters.saved_tokens) == (2, 1, cached(served))
        again = answer(served, second)
        assert cached(served) >= len(second) - LEAST - 5
        chat.answered(warm[0])
        answer(served, chat.ask("And then?"))
        assert cached(served) >= len(second) - LEAST - 5
    with serving_with(engine, 0) as served:
        served.scheduler.start()
        cold = answer(served, second)
        assert cached(served) == 0
    assert_same(warm, cold)
    assert_same(again, cold)


def test_a_beginning_that_others_have_too_is_read_once(engine: Engine) -> None:
    """Three prompts of one long beginning: where they part is known from the second on."""
    beginning = tokens_of(6 * CHUNK + 5, 1)
    prompts = [[*beginning, *tokens_of(5 * CHUNK, seed)] for seed in (2, 3, 4)]
    saved = []
    with serving_with(engine, 1 << 30) as served:
        served.scheduler.start()
        warm = []
        for prompt in prompts:
            warm.append(answer(served, prompt, 2))
            saved.append(cached(served))
    assert saved == [0, CHUNK, 6 * CHUNK]
    with serving_with(engine, 0) as served:
        served.scheduler.start()
        for prompt, expected in zip(prompts, warm, strict=True):
            assert_same(answer(served, prompt, 2), expected)


@pytest.mark.parametrize("snapshots", [1.5, 4, 100])
def test_answers_are_the_same_whatever_the_budget(engine: Engine, snapshots: float) -> None:
    """Prompts that share beginnings of all lengths, in any order, some that end with a cut; some cancelled in
    the middle, and some answered beside others."""
    pools, random_ = engine.pools, random.Random(7)
    budget = int(snapshots * (pools.recurrent_bytes + 4 * CHUNK * (pools.token_bytes + 4)))
    long = tokens_of(9 * CHUNK, 5)
    lengths = [CHUNK, 2 * CHUNK, 100, 101, 7 * CHUNK, 300, 9 * CHUNK]
    prompts = [long[:length] for length in lengths]
    prompts += [[*long[:150], END_OF_TURN, *long[150:200]], [*long[:150], END_OF_TURN, *long[40:200]]]
    with serving_with(engine, 0) as served:
        served.scheduler.start()
        cold = [answer(served, prompt, 3) for prompt in prompts]
    with serving_with(engine, budget) as served:
        served.scheduler.start()
        for number in random_.choices(range(len(prompts)), k=12):
            assert_same(answer(served, prompts[number], 3), cold[number])
            gone = served.generate("b", random_.choice(prompts), max_new_tokens=50)
            served.at[len(served.steps) + random_.randrange(5)] = gone.cancel
            assert gone.ending() is None
            beside = [
                served.generate("c", prompts[random_.randrange(len(prompts))], max_new_tokens=2, samples=2)
                for _ in range(2)
            ]
            assert [request.ending() for request in beside] == [None] * 2
            engine.prefixes.check_integrity()
            assert engine.prefixes.nbytes <= budget
        assert engine.prefixes.counters.saved_tokens > (0 if snapshots < 4 else 100 * CHUNK)


def tokens_of(count: int, seed: int) -> list[int]:
    """Random ones, none of which ends a turn."""
    return random.Random(seed).choices(range(10, 2000), k=count)


def test_samples_after_a_snapshot(engine: Engine) -> None:
    prompt = tokens_of(5 * CHUNK + 3, 8)
    outputs = []
    for budget in (0, 1 << 30):
        with serving_with(engine, budget) as served:
            served.scheduler.start()
            for _ in range(2):
                request = served.generate("a", prompt, samples=4, temperature=1.0, seed=5, max_new_tokens=8)
                outputs.append(request.samples())
            assert cached(served) == (5 * CHUNK if budget else 0)
    assert outputs[1:] == outputs[:1] * 3


def test_a_step_that_fails_leaves_no_snapshot(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens_of(3 * CHUNK, 6)
    with serving_with(engine, 1 << 30) as served:
        prefill, chunks = engine.prefill, []

        def failing(place: int, tokens: Sequence[int]) -> Tensor:
            chunks.append(tokens)
            hidden = prefill(place, tokens)
            if len(chunks) == 2:
                raise Unavailable("the store is gone")
            return hidden

        monkeypatch.setattr(engine, "prefill", failing)
        served.scheduler.start()
        assert isinstance(served.generate("a", prompt, max_new_tokens=2).ending(), Unavailable)
        assert engine.prefixes.snapshots == 1
        assert len(served.generate("b", prompt, max_new_tokens=2).tokens()) == 2
        assert cached(served) == CHUNK


def test_states_that_are_no_numbers_do_not_come_back(engine: Engine) -> None:
    prompt = tokens_of(3 * CHUNK, 6)

    def poison() -> None:
        engine.pools.ssm[:, served.requests[0].places[0]] = torch.nan

    with serving_with(engine, 1 << 30) as served:
        served.at[1] = poison
        served.scheduler.start()
        assert "not finite" in str(served.generate("a", prompt, max_new_tokens=2).ending())
        assert engine.prefixes.snapshots == 0
        answered = answer(served, prompt)
        assert answered[1].isfinite().all()


def ends_with(engine: Engine, first: Sequence[int], chunk: int) -> list[int]:
    """What the model says after a prompt, up to a token that comes late and ends a turn from now on."""
    with serving_with(engine, 0) as served:
        served.scheduler.start()
        tokens, _ = answer(served, first, 40)
    end = max(range(len(tokens)), key=lambda at: tokens.index(tokens[at]))
    engine.cut_law = CutLaw(chunk, LEAST, frozenset({tokens[end]}))
    assert end >= LEAST and not engine.cut_law.turn_ends & set(first)
    return tokens[: end + 1]


def test_an_answer_is_read_for_its_next_turn_when_there_is_nothing_else_to_do(
    engine: Engine,
) -> None:
    """The second turn then reads nothing but its own message."""
    first = tokens_of(60, 9)
    output = ends_with(engine, first, CHUNK)
    with serving_with(engine, 1 << 30) as served:
        served.scheduler.start()
        assert answer(served, first, 400)[0] == output
        told = len(served.steps)
        served.idle()
        assert set(served.steps[told:]) == {"p:"}  # by nobody's request
        second = [*first, *output, *tokens_of(20, 10)]
        warm = answer(served, second)
        assert cached(served) == len(first) + len(output)
    with serving_with(engine, 0) as served:
        served.scheduler.start()
        assert_same(answer(served, second), warm)
        assert not served.scheduler._next_turns


def test_whoever_arrives_while_an_answer_is_read_waits_for_a_chunk_at_most(engine: Engine) -> None:
    """Even where all places but one are taken and nobody may wait; and no error of it is anybody's."""
    first = tokens_of(60, 9)
    output = ends_with(engine, first, chunk=8)
    steps = 8 + len(output) - 1  # of the first turn
    taken = [engine.take_place() for _ in range(PLACES - 1)]
    with pytest.MonkeyPatch.context() as patch, serving(engine, patch, max_queue=0) as served:
        patch.setattr(engine, "prefixes", PrefixCache(1 << 30))
        patch.setattr(engine, "check_integrity", engine.prefixes.check_integrity)
        served.eos = tuple(engine.cut_law.turn_ends)
        served.at[steps] = lambda: served.generate("b", [5, 6], max_new_tokens=2)
        served.scheduler.start()
        assert answer(served, first, 400)[0] == output
        served.wait_for(2)
        assert served.steps[steps:] == ["p:", "p:b", "d:b"]
        engine.prefixes.clear()
        served.at[steps + 3 + steps] = fail
        for _ in range(2):
            assert answer(served, first, 400)[0] == output
            served.idle()
        assert not served.at and served.steps[-1] == "p:"  # the second time it was read
    for place in taken:
        engine.give_place(place)
    engine.prefixes.clear()


def fail() -> None:
    raise Unavailable("the store is gone")
