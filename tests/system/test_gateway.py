"""The gateway as a process of its own, before a real worker: plain curl, OpenAI's client, and deaths."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gpu_worker.client import WorkerClient
from tests.system.processes import READY, Pair, Process, eventually, pair_of_processes

PROMPT = "def fibonacci(n):"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "import os"}]


class Front(Pair):
    """A pair and a gateway."""

    def start_gateway(self, *options: str) -> Process:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        listen = ("--listen", f"127.0.0.1:{self.port}")
        self.gateway = Process(self.runtime, "gpu-worker", "gateway", *listen, *options)
        self.processes.append(self.gateway)
        eventually(lambda: self.status("/health") == "200", READY, "the gateway's readiness")
        return self.gateway

    def curl(self, path: str, *options: str, body: Any = None) -> str:
        data = [] if body is None else ["--json", json.dumps(body)]
        url = f"http://127.0.0.1:{self.port}{path}"
        command = ["curl", "--silent", "--show-error", "--max-time", "30", *data, *options, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=READY, check=False).stdout

    def status(self, path: str, body: Any = None) -> str:
        return self.curl(path, "--output", "/dev/null", "--write-out", "%{http_code}", body=body)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with pair_of_processes(tmp_path_factory.mktemp("run"), "demo") as pair:
        front = Front(pair.runtime, pair.model)
        front.processes = pair.processes  # which end with the pair
        front.start_store()
        front.start_worker()
        front.start_gateway()
        yield front


@pytest.fixture(scope="module")
def answer(front: Front) -> str:
    """To PROMPT, by gRPC."""
    with WorkerClient(front.worker_address) as client:
        return client.answers(PROMPT, max_new_tokens=24)[0].text


def test_curl(front: Front, answer: str) -> None:
    reply = json.loads(front.curl(COMPLETIONS, body={"prompt": PROMPT, "max_tokens": 24, "temperature": 0}))
    assert reply["choices"][0]["text"] == answer
    assert reply["usage"]["completion_tokens"] == 24
    assert [model["id"] for model in json.loads(front.curl("/v1/models"))["data"]] == [reply["model"]]


def test_curl_sees_tokens_as_they_come(front: Front, answer: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stream": True}
    events = front.curl(COMPLETIONS, "--no-buffer", body=body).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer
    assert len(chunks) > 10


def test_openai_client(front: Front) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{front.port}/v1", api_key="unused") as client:
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": MESSAGES, "seed": 7}
        whole = client.chat.completions.create(**options, max_tokens=12, logprobs=True, top_logprobs=3, n=2)
        pieces = {0: "", 1: ""}
        for chunk in client.chat.completions.create(**options, max_tokens=12, stream=True, n=2):
            pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in whole.choices] == [pieces[0], pieces[1]]
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        told = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or ())
        assert told.decode(errors="replace").startswith(str(choice.message.content))
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_what_the_worker_refuses(front: Front) -> None:
    reply = json.loads(front.curl(CHATS, body={"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}))
    assert "no argument 'x'" in reply["error"]["message"]
    tool = {"type": "function", "function": {"name": "f"}}
    assert front.status(CHATS, {"messages": MESSAGES, "tools": [tool]}) == "400"
    assert front.status(COMPLETIONS, {"prompt": [1 << 20]}) == "400"
    assert front.status(COMPLETIONS, {"prompt": ""}) == "400"


def test_deaths(front: Front) -> None:
    """The last of this file: both processes end in it."""
    body = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{front.port}{COMPLETIONS}"
    command = ["curl", "--silent", "--no-buffer", "--json", json.dumps(body), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        curl.stdout.readline()
        front.worker.kill()
        assert '"code": "service_unavailable"' in curl.stdout.read().splitlines()[-2]
    assert front.status(COMPLETIONS, {"prompt": "x"}) == front.status("/health") == "503"
    front.start_worker()
    eventually(lambda: front.status("/health") == "200", READY, "finding the new worker")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        curl.stdout.readline()
        front.gateway.signal(signal.SIGTERM)
        curl.kill()
    assert front.gateway.popen.wait(READY) == 0
    eventually(lambda: front.worker_stats().running == 0, 5, "the end of its request")
