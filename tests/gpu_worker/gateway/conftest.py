"""One event loop for all tests of the gateway; a gateway and a scripted worker for each file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import pytest

from tests.helpers.gateways import LoopThread, ScriptedWorker, Served, says, serving


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def served(loop: LoopThread) -> Iterator[Served]:
    with TemporaryDirectory() as directory, serving(loop, Path(directory)) as served:
        yield served


@pytest.fixture
def worker(served: Served) -> ScriptedWorker:
    """As new."""
    served.worker.script = says("Hello", " there")
    served.worker.info.tool_call_form = served.worker.info.reasoning_form = ""
    served.worker.requests.clear()
    served.worker.metadata.clear()
    return served.worker


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's own."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client
