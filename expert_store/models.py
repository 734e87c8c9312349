"""What the user calls MODEL, resolved to a packed checkpoint on this disk.

A directory, a Hugging Face id or the word `demo`. What is not packed yet is packed once into a cache
directory, under a name that changes with the source, the bits and the packed form, and found there later.
Owns the cache directory and its locks; packing itself is `common.checkpoint`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import platformdirs
from rich.console import Console

from common.checkpoint import PackedCheckpoint, is_packed, open_checkpoint
from common.checkpoint.manifest import VERSION
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, ConfigError, NotFound, Unavailable
from common.record import RECORD_FORMAT
from expert_store.config import DEMO
from expert_store.progress_bar import progress_bar

# Weights and text only; nothing that a library would execute, and no copies in other formats.
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
_LOCK_TIMEOUT = 3600.0  # seconds; far longer than packing takes


class ModelLocation(NamedTuple):
    """A checkpoint's directory, and a short name for what the user asked for."""

    directory: Path
    name: str


def resolve_model(model: str, bits: int | None, console: Console) -> PackedCheckpoint:
    """Open MODEL, packing it first if need be; `bits` is for that case, as in `make_plan`."""
    location = locate_model(model)
    if not is_packed(location.directory):
        return _packed_copy(location, bits, console)
    checkpoint = PackedCheckpoint.open(location.directory)
    if make_plan(checkpoint, bits) != checkpoint.plan:
        raise ConfigError(
            f"{location.name} is packed already, at {checkpoint.plan.describe()}: leave --bits away, or make "
            f"another copy with `expert-store pack --bits {bits}`"
        )
    return checkpoint


def locate_model(model: str) -> ModelLocation:
    """The directory of MODEL, downloaded if need be; raises NotFound or Unavailable."""
    directory = Path(model).expanduser()
    if model == DEMO:
        return ModelLocation(_demo_directory(), DEMO)
    if directory.is_dir():
        directory = directory.resolve()  # workers open it too, from wherever they run
        return ModelLocation(directory, directory.name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return ModelLocation(_download(model), model.replace("/", "--"))
    raise NotFound(f"{model} is neither a directory nor a Hugging Face id (owner/name) nor 'demo'")


def cache_directory() -> Path:
    """Where packed copies are kept: EXPERT_SERVING_CACHE, or the platform's place for caches."""
    chosen = os.environ.get("EXPERT_SERVING_CACHE") or platformdirs.user_cache_dir("expert-serving")
    return Path(chosen).expanduser().resolve()


def _demo_directory() -> Path:
    directory = Path(str(files("expert_store"))) / DEMO
    if not directory.is_dir():
        raise NotFound(f"this installation lacks the demo model ({directory})")
    return directory


def _download(model: str) -> Path:
    # Imported here: a local model should not wait for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"]))
    except RepositoryNotFoundError:
        raise NotFound(
            f"{model} is not a directory here, and Hugging Face either has no such model or wants a login "
            "(hf auth login)"
        ) from None
    except OSError as error:  # what huggingface_hub raises when it is offline or the network fails
        reason = " ".join(str(error).split())
        raise Unavailable(f"cannot download {model} from Hugging Face: {reason}") from error


def _packed_copy(location: ModelLocation, bits: int | None, console: Console) -> PackedCheckpoint:
    source = open_checkpoint(location.directory)
    plan = make_plan(source, bits)
    described = f"{source.identity} {plan} {RECORD_FORMAT} {VERSION}"
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    destination = cache_directory() / "packed" / f"{location.name}-{key}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the directory for packed copies {destination.parent}: {error.strerror}; "
            "EXPERT_SERVING_CACHE names another place"
        ) from None
    with _locked(destination.with_name(destination.name + ".lock"), console):
        if not destination.exists():
            with progress_bar(console, f"packing {location.name} at {plan.describe()}") as progress:
                return pack(source, destination, plan, progress, location.name)
    try:
        return PackedCheckpoint.open(destination)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (a packed copy; remove {destination} to have it made again)"
        ) from None


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Hold the lock file, which the system releases should this process die; the file itself stays."""
    deadline = time.monotonic() + _LOCK_TIMEOUT
    with path.open("w") as lock:
        if not _try_lock(lock.fileno()):
            console.print(
                f"waiting for another process that is packing the same model ({path})", markup=False
            )
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise Unavailable(f"another process has held {path} for {_LOCK_TIMEOUT:.0f} s")
            time.sleep(0.1)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
