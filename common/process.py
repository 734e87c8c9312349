"""The life of a process that both share: privacy, logging, the event loop, signals, and the exit status.

A process runs one coroutine to its end. SIGINT and SIGTERM ask it to stop in good order through its
`stop` callback; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop
from rich.console import Console

from common.errors import ServingError

EXIT_FAILURE = 1
EXIT_INVARIANT = 70  # sysexits.h EX_SOFTWARE: a bug of ours, not of the user

errors_console = Console(stderr=True, highlight=False)


def configure_process() -> None:
    """Everything this process makes is its owner's alone; logs go to stderr."""
    os.umask(0o077)
    # gRPC's own notices (fork handlers, lame-duck sockets) are not for users.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    level = os.environ.get("EXPERT_SERVING_LOG", "INFO").upper()
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )


def run_service(main: Coroutine[Any, Any, int], stop: Callable[[], None]) -> int:
    """Run `main` on uvloop until it returns its exit status; `stop` is called on the loop by signals."""

    async def supervised() -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _stop_once, loop, number, stop)
        return await main

    return uvloop.run(supervised())


def _stop_once(loop: asyncio.AbstractEventLoop, number: int, stop: Callable[[], None]) -> None:
    loop.remove_signal_handler(number)  # the default action is back for an impatient second one
    stop()


def run_command(command: Callable[[], object]) -> int:
    """Run a command line; a `ServingError` is one clear line on stderr and status 1."""
    try:
        command()
    except ServingError as error:
        errors_console.print(f"[bold red]error:[/] {error}", soft_wrap=True, markup=True)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
