"""Runs the fault matrix and says what was seen.

    scripts/faults [--rounds 20] [--seed 0] [--cases TEXT ...] [--out faults.json]

Each case has processes of its own. Prints a table; exits 1 if anything was seen that must not be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults import deaths, gateway, messages, resources
from tests.faults.case import Case, Round, play
from tests.faults.rig import rig_of
from tests.faults.shim import Shim
from tests.helpers.models import make_hf_model, pack_model

CASES: list[Case] = [*deaths.CASES, *gateway.CASES, *resources.CASES, *messages.CASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", help="those whose names contain any of these; default: all")
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    args = parser.parse_args()
    chosen = [c for c in CASES if not args.cases or any(text in c.name for text in args.cases)]
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as directory:
        shim = Shim(Path(directory))
        # For the process that all others are forked from, and so for these: starts are most of the time.
        os.environ.update(shim.environment)
        source = make_hf_model(
            Path(directory) / "hf", 1, hybrid_override_pattern="MEME*EME-", n_routed_experts=10
        )
        stride = pack_model(source, Path(directory) / "packed").layout.stride
        for case in chosen:
            seeds = range(args.seed, args.seed + args.rounds)
            rounds += run(case, Path(directory), stride, shim, seeds)
            args.out.write_text(json.dumps([vars(seen) for seen in rounds], indent=1))
    print("\n".join(["", *table(chosen, rounds)]))
    sys.exit(any(seen.faults for seen in rounds))


def run(case: Case, directory: Path, record_bytes: int, shim: Shim, seeds: range) -> list[Round]:
    rounds = []
    place = Path(tempfile.mkdtemp(dir=directory))
    with rig_of(place, case.model or directory / "packed", record_bytes, shim, case.frames) as rig:
        for seed in seeds:
            rounds.append(seen := play(case, rig, seed))
            errors = dict(seen.errors.most_common(2))
            times = f"slowest {seen.slowest:.1f} s, recovered {seen.recovered:.1f} s"
            print(f"{case.name} {seed}: {seen.right} right, {errors or 'no errors'}, {times}", flush=True)
            for fault in seen.faults[:5]:
                print("   !!", fault, flush=True)
            if rig.dead():
                print(*(f"{p.log}:\n{p.log.read_text()[-3000:]}" for p in rig.pair.processes), sep="\n")
                break
    return rounds


def table(cases: list[Case], rounds: list[Round]) -> list[str]:
    """In Markdown, a line a case."""
    lines = [
        "| case | expected | rounds | right | errors | slowest | recovered in | must not be |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        seen = [r for r in rounds if r.case == case.name]
        kinds: Counter[str] = Counter()
        for one in seen:
            for text, count in one.errors.items():
                kinds[text.split(":")[0]] += count
        errors = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        cells = (
            case.name, case.expected, len(seen), sum(r.right for r in seen), errors,
            f"{max((r.slowest for r in seen), default=0):.1f} s",
            f"{max((r.recovered for r in seen), default=0):.1f} s",
            sum(bool(r.faults) for r in seen) or "nothing",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
