"""Measures the whole system on this GPU: rows as they come, then one JSON line.

    .venv/bin/python scripts/bench_gpu.py [--checkpoint DIR] [--groups pairs prefetch ...] [--json FILE]

Both processes are started as a user starts them, over the 30B's shape with random weights. What takes long
runs only when asked for: group `reference` by --reference or --make-reference, `offload` by its name.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import TypeVar

import torch

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import gpu_batch
import gpu_checkpoints
import gpu_link
import gpu_pairs
import gpu_transformers
import machine
from gpu_checkpoints import SKEW, full_store, given_or_made
from gpu_driver import device_name
from gpu_pairs import REFERENCE, UNBOUNDED, Worker, Workload, Yardsticks
from gpu_report import Report, Row
from pair import Ended, Store

from common.errors import ServingError

BUDGETS = (UNBOUNDED, "7.6GB", "12GB", "5GB", "16GB", "24GB")  # the first is what others are compared with
COMPARED = ("7.6GB", "12GB")  # where prefetch and policies are compared, and several sequences measured
PROMPTS = (128, 1024, 4096, 16384)
REFERENCE_PROMPT, REFERENCE_NEW = 128, 64
PUBLISHED = ("--slots", "8", "--expert-bits", "16", "--eager", "--sync-fetch")  # the published method
TRANSFORMERS_NEW = 32
OFFLOADED_NEW = 4  # every token moves the whole model
PAIRS, BATCH = ("pairs", "prefetch", "policies", "lane"), "batch"
KERNELS, TRANSFORMERS, OFFLOAD = "kernels", "transformers", "offload"
GROUPS = (*PAIRS, BATCH, KERNELS, TRANSFORMERS)
_REDUCTION = {"pattern": "ME*E", "experts": 8, "vocab": 8192}  # for trying this script on a CPU

AnyRow = TypeVar("AnyRow", bound=Row)


def main() -> None:
    args = _options()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here: nothing is measured")
    # Whoever stops this stops the processes that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    described = {"machine": machine.describe() | {"device": device_name()}, "arguments": sys.argv[1:]}
    report = Report(args.json, args.log, described)
    try:
        run(args, report)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except ServingError as error:  # such as a checkpoint that is none
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    finally:
        report.close()


def run(args: argparse.Namespace, report: Report) -> None:
    """Group by group; what others are compared with comes first."""
    yardsticks = Yardsticks()
    if args.device == "cuda":
        rows = _try("link", "host to device", gpu_link.benchmark(), report)
        yardsticks.link = max((row.bytes_per_second for row in rows), default=None)
    if REFERENCE in args.groups:
        _measure_reference(args, yardsticks, report)
    if {*PAIRS, BATCH} & {*args.groups}:
        made = given_or_made(args.checkpoint, report, **gpu_checkpoints.PACKED, skew=args.skew)
        with made as directory, full_store(directory, report) as store:
            workload = Workload(args.new, args.runs, max(args.prompts) + args.new, args.device)
            gpu_pairs.measure(store, workers(args), workload, yardsticks, report)
            if BATCH in args.groups:
                _measure_batch(store, args, yardsticks, report)
    if KERNELS in args.groups and args.device == "cuda":
        from gpu_kernels import benchmark  # Triton is for those who have a GPU

        _try(KERNELS, "steps", benchmark(args.slots, args.batch, args.steps), report)
    if TRANSFORMERS in args.groups:
        _measure_transformers(TRANSFORMERS, TRANSFORMERS_NEW, None, args, report)
    if OFFLOAD in args.groups:
        _measure_transformers(OFFLOAD, OFFLOADED_NEW, COMPARED[0], args, report)


def workers(args: argparse.Namespace) -> list[Worker]:
    """Those of the groups asked for, each once."""
    compared = [budget for budget in args.budgets if budget in COMPARED]
    compared = compared or [budget for budget in args.budgets if budget != UNBOUNDED][:1]
    prompts, few = tuple(args.prompts), (args.prompts[0],)
    auto, policy = "auto", args.policy
    wanted = {
        "pairs": [(budget, policy, auto, auto, prompts) for budget in args.budgets],
        "prefetch": [(budget, policy, mode, auto, few) for budget in compared for mode in ("off", auto)],
        "policies": [(budget, each, auto, auto, few) for budget in compared[:1] for each in ("lru", "lfru")],
        "lane": [(budget, policy, auto, threads, few) for budget in compared for threads in ("0", auto)],
    }
    chosen: dict[tuple[str, str, str, str], Worker] = {}
    for group, several in wanted.items():
        for *options, lengths in several if group in args.groups else ():
            budget, policy, prefetch, threads = options
            worker = Worker(group, budget, policy, prefetch, lengths, threads)
            chosen.setdefault((budget, policy, prefetch, threads), worker)
    return list(chosen.values())


def _measure_reference(args: argparse.Namespace, yardsticks: Yardsticks, report: Report) -> None:
    """Large enough to fail for want of room, which is no reason to measure nothing else."""
    worker = Worker(REFERENCE, "", "lru", "off", (REFERENCE_PROMPT,), "0", PUBLISHED)
    workload = Workload(REFERENCE_NEW, args.runs, REFERENCE_PROMPT + REFERENCE_NEW, args.device)
    made = given_or_made(args.reference, report, **gpu_checkpoints.REFERENCE, skew=args.skew)
    try:
        with made as directory, full_store(directory, report) as store:
            gpu_pairs.measure(store, [worker], workload, yardsticks, report)
    except (Ended, ServingError, CalledProcessError) as error:
        report.failed(REFERENCE, "its store", str(error))


def _measure_batch(store: Store, args: argparse.Namespace, yardsticks: Yardsticks, report: Report) -> None:
    budgets = [budget for budget in args.budgets if budget in (UNBOUNDED, COMPARED[0])]
    for budget in budgets or args.budgets[:1]:
        asked = args.batch, args.prompts[0], args.new, args.runs
        options = gpu_batch.Options(str(store.address), args.device, budget, args.policy, *asked)
        _try(BATCH, budget, gpu_batch.benchmark(options, yardsticks.link), report)


def _measure_transformers(
    group: str, new: int, offload: str | None, args: argparse.Namespace, report: Report
) -> None:
    reduction = None if args.device == "cuda" else _REDUCTION
    options = gpu_transformers.Options(args.device, REFERENCE_PROMPT, new, args.runs, offload, reduction)
    _try(group, offload or "resident", gpu_transformers.benchmark(group, options), report)


def _try(group: str, what: str, rows: Iterator[AnyRow], report: Report) -> list[AnyRow]:
    """Rows of a process of their own, which may fail without taking the others along."""
    report.note(f"{group}: {what}")
    done = []
    try:
        for row in rows:
            report.add(row)
            done.append(row)
    except Ended as ended:
        report.failed(group, what, str(ended))
    return done


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--groups", nargs="+", choices=(REFERENCE, *GROUPS, OFFLOAD), help=f"default: {' '.join(GROUPS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append rows to this file, a line each")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append what workers say to this file")
    made = parser.add_argument_group("checkpoints; what is not given is made, measured and removed")
    made.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a packed directory (30B at 5 bits: 21 GB)"
    )
    made.add_argument(
        "--skew", type=float, default=SKEW, help=f"of a made one (default: {SKEW}; 0: worst case)"
    )
    made.add_argument(
        "--reference", type=Path, metavar="DIR", help="a 16-bit one (63 GB) for group reference"
    )
    made.add_argument("--make-reference", action="store_true", help="make that one")
    asked = parser.add_argument_group("what is asked of each worker")
    budgets = f"of VRAM, in this order (default: {' '.join(BUDGETS)})"
    asked.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="SIZE", help=budgets)
    asked.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, metavar="TOKENS")
    asked.add_argument("--new", type=int, default=256, metavar="TOKENS", help="to generate (default: 256)")
    asked.add_argument("--runs", type=int, default=2, help="with prompts of their own, after one that warms")
    asked.add_argument("--policy", default="lfru", help="lru or lfru (default: lfru)")
    steps = parser.add_argument_group("batch and kernels")
    steps.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16], metavar="SEQUENCES")
    steps.add_argument("--slots", nargs="+", type=int, default=[24, 38, 128], help="a layer, of kernels")
    steps.add_argument("--steps", type=int, default=50, help="of kernels, after as many that warm")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    reference = args.make_reference or args.reference is not None
    args.groups = args.groups or [*([REFERENCE] if reference else []), *GROUPS]
    if (REFERENCE in args.groups) != reference:
        parser.error("group reference goes together with --reference DIR or --make-reference")
    if min(args.prompts) < 1 or args.new < 2 or args.runs < 1 or min(args.batch) < 1:
        parser.error("at least --prompts 1, --new 2, --runs 1 and --batch 1")
    return args


if __name__ == "__main__":
    main()
