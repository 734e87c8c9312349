"""HTTP to the gateway: bodies that are nearly right, bodies that are nothing, and requests that are not HTTP.

`run` sends bytes and looks at the answer; `by_schema` has schemathesis make requests of the gateway's own
OpenAPI schema and compare answers with it. Answers of many tokens are left in the middle, as their length is
the caller's wish.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from tests.fuzz.mutate import json_bytes, mutated, some_bytes
from tests.fuzz.tally import Tally

PATIENCE = 5.0  # seconds that a caller waits for the whole of an answer; afterwards nothing may be left of it
_AT_ONCE = 8
_READ = 1 << 16  # bytes
_COMPLETION: dict[str, Any] = {
    "model": None, "prompt": "import os\n", "max_tokens": 2, "temperature": 0.5, "n": 1, "seed": 1,
    "logprobs": 1, "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}, "top_p": 0.9,
}  # fmt: skip
_PLAIN = {"prompt": [1, 2, 3], "max_tokens": 1}
_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {
            "role": "assistant", "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    ],
    "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto",
}  # fmt: skip
_SEEDS = [("/v1/completions", _COMPLETION), ("/v1/completions", _PLAIN), ("/v1/chat/completions", _CHAT)]
_PATHS = (
    "/v1/models",
    "/v1/models/demo",
    "/v1/models/%00",
    "/health",
    "/metrics",
    "/openapi.json",
    "/../x",
    "/",
)


async def run(tally: Tally, numbers: range, url: str) -> None:
    """Several requests at a time."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    rest = iter(numbers)
    await asyncio.gather(*(_caller(tally, rest, host, int(port)) for _ in range(_AT_ONCE)))


async def _caller(tally: Tally, rest: Iterator[int], host: str, port: int) -> None:
    for case in rest:
        sent = request_bytes(tally.draw(case))
        reader, writer = await asyncio.open_connection(host, port)
        answer = b""
        try:
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(_READ), PATIENCE)
        except (asyncio.TimeoutError, OSError):
            pass
        finally:
            writer.transport.abort()
        status, complaint = _judged(answer)
        tally.outcome(status)
        if complaint:
            tally.fault(case, f"{complaint}: {sent[:1500]!r} was answered by {answer[:1500]!r}")


def request_bytes(draw: random.Random) -> bytes:
    way = draw.random()
    if way < 0.03:
        return some_bytes(draw) + b"\r\n\r\n"
    if way < 0.1:
        method = draw.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "x"))
        head = f"{method} {draw.choice(_PATHS)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        return mutated(draw, head) if draw.random() < 0.5 else head
    path, body = draw.choice(_SEEDS)
    data = some_bytes(draw) if way < 0.15 else json_bytes(draw, body)
    kind = draw.choice(("application/json",) * 9 + ("text/plain", "application/x-www-form-urlencoded"))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode()
    return (mutated(draw, head) if way > 0.95 else head) + data


def _judged(answer: bytes) -> tuple[str, str]:
    """The status, and what is wrong with the answer or nothing. A request without an end has none."""
    if not answer:
        return "no answer in time", ""
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if match is None:
        return "no HTTP", "an answer that is none"
    status = int(match[1])
    if status >= 500 or b"Traceback" in answer:
        return str(status), "the server's fault"
    head, _, body = answer.partition(b"\r\n\r\n")
    if status >= 400 and b"application/json" in head and body:
        error = json.loads(body).get("error", {})
        if not isinstance(error, dict) or not error.get("message"):
            return str(status), "an error without a message"
    return str(status), ""


def by_schema(tally: Tally, examples: int, url: str) -> None:
    """So many requests of each operation, valid and invalid, by schemathesis."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from requests.exceptions import ReadTimeout
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

    # Not that all which fits the schema is accepted: an empty prompt fits.
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.setdefault("max_tokens", 2)  # time is short, and what is large is `run`'s
            for name in ("max_tokens", "max_completion_tokens", "n"):
                if isinstance(case.body.get(name), int) and case.body[name] > 2:
                    case.body[name] = 2
        try:
            answer = case.call(timeout=PATIENCE)
        except ReadTimeout:
            return tally.outcome("no answer in time")
        case.validate_response(answer, checks=checks)
        return tally.outcome(str(answer.status_code))

    for number, operation in enumerate(schema.get_all_operations()):
        found: Any = operation.ok()  # type: ignore[union-attr]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                cases = found.as_strategy(generation_mode=mode)
                options = settings(
                    max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
                )  # fmt: skip
                seed(tally.seed)(options(given(case=cases)(send)))()
            except (Exception, FailureGroup) as error:  # noqa: BLE001 -- whatever schemathesis finds
                if "Unsatisfiable" not in type(error).__name__:
                    tally.fault(number, f"{found.method} {found.path}: {type(error).__name__}: {error}")
