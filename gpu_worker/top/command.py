"""The command `gpu-worker top`: draws what polling brings until Ctrl-C, or one frame."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from common.addresses import Address
from common.errors import ConfigError
from common.process_config import ADDRESS_HELP
from gpu_worker.client import WorkerClient
from gpu_worker.top.polling import Polling
from gpu_worker.top.view import View

_ONCE_INTERVAL = 0.5  # seconds that the rates of a single frame are of


def register(app: typer.Typer) -> None:
    """Add the command to the worker's command line."""
    app.command()(top)


def top(
    worker: Annotated[str | None, typer.Option("--worker", help=ADDRESS_HELP, metavar="ADDRESS")] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two frames.", min=0.1, max=60.0)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of half a second.")] = False,
) -> None:
    """Watch a worker: requests, tokens per second, hit rates, traffic, memory. Ctrl-C ends it."""
    console = Console()
    if not (once or console.is_terminal):
        raise ConfigError("standard output is no terminal to watch; --once prints one frame")
    with WorkerClient(Address.of_option(worker, "worker"), retry_for=0) as client:
        if once:
            print_frame(Polling(client, interval), console)
        else:
            _watch(Polling(client, interval), console, interval)


def print_frame(polling: Polling, console: Console) -> None:
    """Raises ServingError when the worker does not answer."""
    polling.ask()
    time.sleep(_ONCE_INTERVAL)
    polling.ask()
    console.print(View(*polling.latest()))


def _watch(polling: Polling, console: Console, interval: float) -> None:
    polling.start()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(View(*polling.latest(), height=console.height), refresh=True)
                time.sleep(min(interval, 0.5))
    except KeyboardInterrupt:
        pass
    finally:
        polling.close()
