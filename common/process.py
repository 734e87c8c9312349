"""The life of a process that both share: privacy, logging, the event loop, signals, and the exit status.

A process runs one service to its end. SIGINT and SIGTERM ask it to stop in good order; a second signal ends
it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Protocol

import uvloop
from rich.console import Console
from rich.markup import escape

from common.errors import ConfigError, ServingError

EXIT_FAILURE = 1
EXIT_INVARIANT = 70  # sysexits.h EX_SOFTWARE: a bug of ours, not of the user

log = logging.getLogger(__name__)
errors_console = Console(stderr=True, highlight=False)


def configure_process() -> None:
    """Everything this process makes is its owner's alone; logs go to stderr."""
    os.umask(0o077)
    # Until the loop takes over: signals unwind, so that what was claimed is released.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _unwind)
    # gRPC's own notices (fork handlers, lame-duck sockets) are not for users.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    level = os.environ.get("EXPERT_SERVING_LOG", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"EXPERT_SERVING_LOG must be DEBUG, INFO, WARNING or ERROR, not {level!r}")
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )


_asked_to_stop = False


def _unwind(number: int, frame: FrameType | None) -> None:
    # Remembered too: raised inside some library's callback, an exit may be swallowed there.
    global _asked_to_stop
    _asked_to_stop = True
    sys.exit(128 + number)


class Service(Protocol):
    """A process's whole work: `run` until `stop` is called, or until it fails."""

    async def run(self) -> int:
        """Returns the exit status."""

    def stop(self) -> None:
        """Ask it to end in good order; called on the loop."""

    def fail(self, error: BaseException) -> None:
        """An invariant broke: end with EXIT_INVARIANT; called on the loop."""


def run_service(make: Callable[[], Service]) -> int:
    """Make a service on a new uvloop (gRPC binds what it makes to the running loop) and run it to its end."""

    async def supervised() -> int:
        loop = asyncio.get_running_loop()
        service = make()
        loop.set_exception_handler(partial(_on_loop_exception, service))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _stop_once, loop, number, service.stop)
        if _asked_to_stop:
            service.stop()
        return await service.run()

    return uvloop.run(supervised())


def watch(task: asyncio.Task[None], fail: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """A task that lives as long as its service: should it raise, the service fails. Returns the task."""

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a background task failed", exc_info=error)
            fail(error)

    task.add_done_callback(done)
    return task


def _on_loop_exception(service: Service, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Callbacks have no caller to raise to. Our invariants are asserts; what else fails is logged."""
    loop.default_exception_handler(context)
    error = context.get("exception")
    if isinstance(error, AssertionError):
        service.fail(error)


def _stop_once(loop: asyncio.AbstractEventLoop, number: int, stop: Callable[[], None]) -> None:
    loop.remove_signal_handler(number)  # the default action is back for an impatient second one
    stop()


def run_command(command: Callable[[], object]) -> int:
    """Run a command line; a `ServingError` is one clear line on stderr and status 1."""
    try:
        command()
    except ServingError as error:
        errors_console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
