"""Runs the soak on a pair of its own and a gateway, or on those named, and says what was seen.

    scripts/soak_clients [--clients 64] [--seconds 600] [--worker ADDRESS --store ADDRESS [--gateway URL]]

Its own pair serves the demo model on the CPU, with frames and slots for a part of the experts, eight places
and a small prefix cache, so that everything there is has to be shared. Prints figures as JSON, and whatever
must not be; exits 1 if there was any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.addresses import Address
from tests.soak.pair import soak_pair
from tests.soak.soak import GROWTH, Plan, soak

_SOON = 300.0  # seconds; what is shorter says nothing of growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--gateway-clients", type=int, default=8, help="of these, if there is a gateway")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Address.parse, help="a worker that runs")
    parser.add_argument("--store", type=Address.parse, help="its store")
    parser.add_argument("--gateway", help="URL of a gateway before it")
    args = parser.parse_args()
    growth = GROWTH if args.seconds >= _SOON else None
    shape = (args.clients, args.gateway_clients, args.seconds, args.seed)
    with _addresses(args) as (worker, store, gateway):
        outcome = asyncio.run(soak(Plan(worker, store, gateway, *shape, growth=growth)))
    print(json.dumps(outcome.figures(), indent=1))
    for fault in outcome.faults[:50]:
        print("!!", fault[:2000])
    sys.exit(bool(outcome.faults))


@contextmanager
def _addresses(args: argparse.Namespace) -> Iterator[tuple[Address, Address, str | None]]:
    if args.worker is not None:
        yield args.worker, args.store or Address.default("store"), args.gateway
        return
    with tempfile.TemporaryDirectory() as directory, soak_pair(Path(directory) / "run") as running:
        yield running


if __name__ == "__main__":
    main()
