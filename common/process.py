"""The life of a process that both share: privacy, logging, the event loop, signals, and the exit status.

A process runs one service to its end. SIGINT and SIGTERM ask it to stop in good order; a second signal ends
it at once. SIGHUP makes it read its configuration again.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvloop
from rich.console import Console
from rich.markup import escape

from common import logs
from common.errors import ConfigError, ServingError

if TYPE_CHECKING:
    from common.process_config import ProcessConfig

EXIT_FAILURE = 1
EXIT_INVARIANT = 70  # sysexits.h EX_SOFTWARE: a bug of ours, not of the user

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)  # not EIO, which may be of reading
_RESERVED_DESCRIPTORS = 64  # for files, the data plane, and what libraries open now and then
_LEAST_CONNECTIONS, _MOST_CONNECTIONS = 16, 65536

log = logging.getLogger(__name__)
errors_console = Console(stderr=True, highlight=False)


def configure_process(log_level: str, log_format: str) -> None:
    """Everything this process makes is its owner's alone; logs go to stderr."""
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every client takes a descriptor
    # Until the loop takes over: signals unwind, so that what was claimed is released.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _unwind)
    global _had_terminal
    _had_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()  # no nohup
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # gRPC's own notices (fork handlers, lame-duck sockets) are not for users.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logs.configure(log_level, log_format)


_asked_to_stop = False
_had_terminal = False


def _unwind(number: int, frame: FrameType | None) -> None:
    # Remembered too: raised inside some library's callback, an exit may be swallowed there.
    global _asked_to_stop
    _asked_to_stop = True
    sys.exit(128 + number)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of much code: what they leave is there for good, and no collection walks through it.

    With PyTorch one does that for 0.15 s, in which every stream stands still.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Service(Protocol):
    """A process's whole work: `run` until `stop` is called, or until it fails."""

    async def run(self) -> int:
        """Returns the exit status."""

    def stop(self) -> None:
        """Ask it to end in good order; called on the loop."""

    def reload(self) -> None:
        """SIGHUP: take up what may change while it runs; called on the loop. A ServingError keeps the old."""

    def fail(self, error: BaseException) -> None:
        """An invariant broke: end with EXIT_INVARIANT; called on the loop."""


def run_service(make: Callable[[], Service], reread: Callable[[], ProcessConfig]) -> int:
    """Make a service on a new uvloop (gRPC binds what it makes to the running loop) and run it to its end."""

    async def supervised() -> int:
        loop = asyncio.get_running_loop()
        service = make()
        loop.set_exception_handler(partial(_on_loop_exception, service))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _stop_once, loop, service.stop)
        loop.add_signal_handler(signal.SIGHUP, _hang_up, service, reread)
        if _asked_to_stop or _terminal_is_gone():
            service.stop()
        return await service.run()

    return uvloop.run(supervised())


def _hang_up(service: Service, reread: Callable[[], ProcessConfig]) -> None:
    """SIGHUP says "reload" to what runs in the background, and "your terminal is gone" to what ran in one."""
    if _terminal_is_gone():
        service.stop()
        return
    # One by one: a mistake in one file must not keep a key in force that was taken out of another.
    steps = (service.reload, lambda: logging.getLogger().setLevel(reread().log_level))
    wrong = [error for step in steps if (error := _error_of(step)) is not None]
    for error in wrong:
        log.error("reloading failed, what could not be read stays as it was: %s", error)
    if not wrong:
        log.info("reloaded")


def _error_of(step: Callable[[], object]) -> ServingError | None:
    try:
        step()
    except ServingError as error:
        return error
    return None


def _terminal_is_gone() -> bool:
    return _had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def connections_allowed() -> int:
    """Clients that may be connected at a time, so that descriptors are left for all else the process does.

    Without this, clients could take them all, and ZeroMQ ends a process that has none to accept a peer with.
    Raises ConfigError when the limit of open files is too low to serve at all.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    left = limit - len(list(Path("/proc/self/fd").iterdir())) - _RESERVED_DESCRIPTORS
    if left < _LEAST_CONNECTIONS:
        raise ConfigError(
            f"the limit of open files, {limit}, leaves {max(0, left)} for clients' connections; raise it by "
            f"{_LEAST_CONNECTIONS - left} or more (`ulimit -n`, or LimitNOFILE= of the systemd unit)"
        )
    return min(left, _MOST_CONNECTIONS)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, with what it has touched of shared segments."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


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


def _stop_once(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    # An impatient second one, of whichever kind, is the system's. Python's own action for SIGINT would raise
    # KeyboardInterrupt wherever the loop is, and gRPC's callbacks swallow what is raised in them.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    stop()


def run_command(command: Callable[[], object]) -> int:
    """Run a command line; a `ServingError`, or output that cannot be written, is one line on stderr and
    status 1."""
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # here, where what fails can be told
    except ServingError as error:
        _tell(str(error))
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        if error.errno != errno.EPIPE:  # whoever reads has seen enough
            _tell(f"the output is not whole: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _tell(message: str) -> None:
    errors_console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
