"""`gpu-worker key add`: makes the API keys that a worker or a gateway asks for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.api_keys import add_key

app = typer.Typer(help="API keys of clients.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """Without this, the only command would stand for the group."""


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; appears in messages.", metavar="NAME")],
    api_keys: Annotated[
        Path, typer.Option(help="The file that --api-keys names to the worker.", metavar="FILE")
    ],
    admin: Annotated[
        bool, typer.Option("--admin", help="May also see the worker's statistics and stop it.")
    ] = False,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Of one request.", metavar="N")] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Of one request, all samples together.", metavar="N")
    ] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(help="At a time.", metavar="N")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="In any 60 seconds.", metavar="N")] = None,
    max_priority: Annotated[
        int | None, typer.Option(help="The highest that a request may ask for.", metavar="N")
    ] = None,
) -> None:
    """Make a key, print it once, and append its hash and limits to FILE.

    The key itself is kept nowhere. A running worker takes it up on SIGHUP; to
    take a key away, remove its table from FILE and send SIGHUP.

    Example: gpu-worker key add alice --api-keys keys.toml --requests-per-minute 60
    """
    key = add_key(
        api_keys,
        name,
        admin=admin,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        max_concurrent_requests=max_concurrent_requests,
        requests_per_minute=requests_per_minute,
        max_priority=max_priority,
    )
    print(key)
    print("Note it now, it is not stored. Clients: EXPERT_SERVING_API_KEY=...", file=sys.stderr)
