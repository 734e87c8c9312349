"""What clients ask again and again, with the answers of a worker that had nothing else to do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.client import AsyncWorkerClient, Generated, Prompt

TEXTS = (
    "def read_config(path):\n",
    "import os\n",
    "class Stack:\n    def push(",
    "The worker ",
    "for i in range(",
)
FIRST = "import json\n\n\ndef load(path):\n    with open(path) as file:\n"
TURNS = ("Write a function that adds two numbers.", "Now one that subtracts.", "And a test of both, please.")

Answer = tuple[tuple[tuple[int, ...], tuple[float, ...], str, str], ...]  # of all samples


@dataclass(frozen=True)
class Asked:
    """A request whose answer does not depend on anything else: greedy, or sampled with a seed."""

    prompt: Prompt
    samples: int
    sampling: dict[str, Any]
    answer: Answer = field(default=(), compare=False)


@dataclass(frozen=True)
class Book:
    """All of them, answered; and what is scored."""

    asked: Sequence[Asked]
    vocabulary: int
    scored: Sequence[int]
    logprobs: tuple[float, ...]


async def write_book(client: AsyncWorkerClient, seed: int, size: int) -> Book:
    """Ask an idle worker. Twice, as the second time finds what the first has left in caches."""
    draw = random.Random(seed)
    vocabulary = (await client.model_info()).vocab_size
    asked = []
    for number in range(size):
        one = _request(number, draw, vocabulary)
        answers = [await ask(client, one) for _ in range(2)]
        assert answers[0] == answers[1], f"an idle worker answers {one} in two ways"
        asked.append(Asked(one.prompt, one.samples, one.sampling, answers[0]))
    scored = [draw.randrange(vocabulary) for _ in range(90)]
    return Book(asked, vocabulary, scored, await score(client, scored))


async def check_book(client: AsyncWorkerClient, book: Book) -> list[str]:
    """Faults: whatever is answered otherwise now."""
    return [
        f"answered otherwise afterwards: {one}" for one in book.asked if await ask(client, one) != one.answer
    ]


async def ask(client: AsyncWorkerClient, asked: Asked) -> Answer:
    return answer_of(await client.answers(asked.prompt, samples=asked.samples, **asked.sampling))


async def score(client: AsyncWorkerClient, tokens: Sequence[int]) -> tuple[float, ...]:
    return tuple([value async for event in client.score(tokens) for value in event.piece.logprobs])


def answer_of(samples: Sequence[Generated]) -> Answer:
    return tuple(
        (tuple(one.token_ids), tuple(one.logprobs), one.text, one.finish.reason if one.finish else "none")
        for one in samples
    )


def _request(number: int, draw: random.Random, vocabulary: int) -> Asked:
    """Texts, chats of several turns and bare tokens, many of which begin alike; greedy, seeded, of several
    samples, with stop strings, with logprobs."""
    sampling: dict[str, Any] = {"max_new_tokens": draw.randint(1, 32), "ignore_eos": draw.random() < 0.5}
    if number % 3 == 1:
        sampling |= {"temperature": 0.9, "seed": number, "top_p": 0.95}
    if number % 4 == 2:
        sampling["stop"] = [draw.choice(("\n", "e", " = ", "return"))]
    if number % 5 == 3:
        sampling["logprobs"] = draw.randint(1, 5)
    kind = number % 4
    prompt: Any
    if kind == 0:
        prompt = FIRST * draw.randint(0, 6) + draw.choice(TEXTS)
    elif kind == 1:
        said = [text for turn in TURNS[: draw.randint(0, 2)] for text in (turn, "Here it is.")]
        roles = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        prompt = [*roles, {"role": "user", "content": draw.choice(TURNS)}]
    else:
        beginning = [(7 * i * i) % vocabulary for i in range(64 * draw.randint(0, 2))]
        prompt = [*beginning, *(draw.randrange(vocabulary) for _ in range(draw.randint(1, 40)))]
    return Asked(prompt, 3 if number % 6 == 4 else 1, sampling)
