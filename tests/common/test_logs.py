"""Lines of a log: what programs read of them, and what people do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest

from common import logs, origin
from common.origin import Origin

log = logging.getLogger("expert_serving.test")


@pytest.fixture(autouse=True)
def pytests_own_handlers_afterwards() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_have_the_time_the_request_the_fields_and_the_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("INFO", logs.JSON)
    before = datetime.now(timezone.utc)
    with origin.working_for(Origin(("a", "b"))):
        log.info("two lines\nin %d", 1, extra=logs.fields(tokens=3))
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    log.debug("not told")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["message"] == "two lines\nin 1" and first["tokens"] == 3
    assert (first["level"], first["logger"], first["request_id"]) == ("INFO", "expert_serving.test", "a,b")
    told = datetime.fromisoformat(first["time"].replace("Z", "+00:00"))
    assert abs((told - before).total_seconds()) < 5
    assert second["exception"].endswith("ValueError: why") and "request_id" not in second


def test_json_lines_take_fields_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", logs.JSON)
    log.info("x", extra=logs.fields(path=logging))
    assert json.loads(capsys.readouterr().err)["path"].startswith("<module")


def test_text_lines_name_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO")
    with origin.working_for(Origin(("a",))):
        log.info("hello", extra=logs.fields(tokens=3))
    log.warning("bye")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" I expert_serving.test: hello [a]")
    assert second.endswith(" W expert_serving.test: bye")


def test_what_is_configured_last_counts(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("ERROR", logs.JSON)
    logs.configure("INFO")
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_what_others_wrote_stays_in_its_line() -> None:
    written = "grüße, 漢 \n I fake: \x1b[2J\x9b\u2028\ud800"
    assert logs.printable(written) == "grüße, 漢 \\n I fake: \\x1b[2J\\x9b\\u2028\\ud800"
