"""`--version` of both command lines."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Annotated

import typer

_DISTRIBUTION = "expert-serving"


def add_version(app: typer.Typer) -> None:
    """The option, beside the commands of `app`."""
    app.callback()(_options)


def _show(asked: bool) -> None:
    if asked:
        typer.echo(f"{_DISTRIBUTION} {installed(_DISTRIBUTION)}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show)
    ] = False,
) -> None:
    pass
