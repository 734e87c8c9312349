"""Clients of the gateway, by OpenAI's own library: the same questions, with the same answers."""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass
from typing import Any

import openai

from tests.soak.asked import Asked, Book
from tests.soak.ledger import CANCELLED, FINISHED, INVALID, REFUSED, Entry, Ledger


class Front:
    """A gateway by its URL."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)
        self._metrics = f"{url}/metrics"
        self._model = ""

    async def model(self) -> str:
        self._model = self._model or (await self.client.models.list()).data[0].id
        return self._model

    async def resident_bytes(self) -> int:
        page = (await self.client._client.get(self._metrics)).text
        found = re.search(r"^process_resident_memory_bytes (\S+)$", page, re.MULTILINE)
        assert found is not None, "the gateway does not say what memory it takes"
        return int(float(found[1]))

    async def close(self) -> None:
        await self.client.close()


@dataclass
class FrontClient:
    """One of several; asks texts and token ids for completions."""

    front: Front
    book: Book
    ledger: Ledger
    draw: random.Random

    async def run(self, until: float) -> None:
        questions = [one for one in self.book.asked if not _is_chat(one)]
        while time.monotonic() < until:
            asked = self.draw.choice(questions)
            way = self.draw.choices((self._whole, self._streamed, self._left, self._mistaken), (3, 4, 2, 1))[
                0
            ]
            with self.ledger.request(f"gateway, {way.__name__.strip('_')}") as entry:
                try:
                    await way(entry, asked)
                except openai.RateLimitError:
                    entry.end(REFUSED)
            if entry.ending == REFUSED:
                await asyncio.sleep(0.3)

    async def _body(self, asked: Asked) -> dict[str, Any]:
        sampling = dict(asked.sampling)
        extra = {"ignore_eos": sampling.pop("ignore_eos")}
        body = {"temperature": sampling.pop("temperature", 0.0), "max_tokens": sampling.pop("max_new_tokens")}
        body |= {"model": await self.front.model(), "prompt": asked.prompt, "n": asked.samples}
        return body | sampling | {"extra_body": extra}

    async def _whole(self, entry: Entry, asked: Asked) -> None:
        answer = await self.front.client.completions.create(**await self._body(asked))
        self._compare(entry, asked, [choice.text for choice in answer.choices])

    async def _streamed(self, entry: Entry, asked: Asked) -> None:
        texts = [""] * asked.samples
        async for chunk in await self.front.client.completions.create(**await self._body(asked), stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        self._compare(entry, asked, texts)

    async def _left(self, entry: Entry, asked: Asked) -> None:
        """Goes away in the middle."""
        reader = asyncio.create_task(self._streamed(entry, asked))
        await asyncio.sleep(self.draw.uniform(0, 0.6))
        reader.cancel()
        await asyncio.wait([reader])
        if reader.cancelled():
            entry.end(CANCELLED)
        else:
            reader.result()

    async def _mistaken(self, entry: Entry, asked: Asked) -> None:
        body = await self._body(asked) | {"temperature": -1.0}
        try:
            await self.front.client.completions.create(**body)
        except openai.BadRequestError:
            return entry.end(INVALID)
        return entry.wrong("accepted a temperature of -1")

    def _compare(self, entry: Entry, asked: Asked, texts: list[str]) -> None:
        expected = [text for _, _, text, _ in asked.answer]
        entry.end(FINISHED) if texts == expected else entry.wrong(f"{asked} was answered by {texts}")


def _is_chat(asked: Asked) -> bool:
    return bool(asked.prompt) and isinstance(asked.prompt, list) and isinstance(asked.prompt[0], dict)
