"""`packed.json`: what a packed checkpoint claims about itself, and whether its files still agree.

Owns the manifest's form and version. Whether the claims fit the model is checked by `packed`, which opens the
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from common.checkpoint.checksum import FileEntry, checksum
from common.errors import CheckpointError
from common.json_input import parse_json

MANIFEST = "packed.json"
FORMAT, VERSION = "expert-serving packed checkpoint", 2


@dataclass(frozen=True)
class Manifest:
    """The record layout, where the weights came from, and every other file's size and checksum."""

    expert_bits: list[list[int]]  # up and down, layer by layer
    dense_bits: dict[str, int]  # of the dense matrices that are packed, by canonical name
    stride: int
    layout: str  # RecordLayouts.digest
    layers: int
    experts: int  # in each layer
    codebook: str  # of the codes: "converged" or "published"; or "source" (carried over), "mixed", "none"
    source: dict[str, str]
    files: dict[str, FileEntry]
    synthetic: bool = False  # random weights in a real shape, for benchmarks

    @property
    def fingerprint(self) -> str:
        """One hash for the contents of all files."""
        lines = sorted(f"{name} {entry.sha256}\n" for name, entry in self.files.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        described = {"format": FORMAT, "version": VERSION, **asdict(self), "fingerprint": self.fingerprint}
        return json.dumps(described, indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and validate `directory/packed.json`; raises CheckpointError."""
        path = directory / MANIFEST
        try:
            raw = parse_json(path.read_text())
            _check_version(path, raw)
            manifest = cls._from_raw(raw)
            whole = manifest.fingerprint == raw.get("fingerprint")  # ValueError: of lone surrogates
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, so this is no packed checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged: {error!r}") from None
        if not whole:
            raise CheckpointError(f"{path} is damaged: its fingerprint is not that of its checksums")
        return manifest

    @classmethod
    def _from_raw(cls, raw: dict[str, Any]) -> Manifest:
        files = {str(name): FileEntry(**entry) for name, entry in raw["files"].items()}
        values = {field.name: raw[field.name] for field in fields(cls)} | {"files": files}
        for name, kind in get_type_hints(cls).items():
            if not isinstance(values[name], getattr(kind, "__origin__", kind)):
                raise TypeError(f"{name} is {values[name]!r}")
        if outside := [name for name in files if Path(name).name != name]:  # it is foreign input
            raise ValueError(f"files lead out of the directory: {outside!r}")
        pairs = values["expert_bits"]
        if not all(isinstance(pair, list) and [type(bits) for bits in pair] == [int, int] for pair in pairs):
            raise TypeError(f"expert_bits is {pairs!r}")
        if not all(type(bits) is int for bits in values["dense_bits"].values()):
            raise TypeError(f"dense_bits is {values['dense_bits']!r}")
        if not isinstance(values["source"].get("name"), str):
            raise TypeError(f"source is {values['source']!r}")
        if not all(type(entry.bytes) is int and isinstance(entry.sha256, str) for entry in files.values()):
            raise TypeError("files have no sizes or no checksums")
        return cls(**values)

    def check_sizes(self, directory: Path) -> None:
        """Raise CheckpointError at the first file that is missing or of another size."""
        for _, complaint in self._files_with_complaints(directory):
            if complaint:
                raise CheckpointError(f"{directory}: {complaint}")

    def damaged_files(self, directory: Path, progress: Callable[[int, int], None]) -> list[str]:
        """Read everything again; one line for each file that is missing or differs from its checksum.

        `progress` gets bytes done and in all.
        """
        total = sum(entry.bytes for entry in self.files.values())
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        damaged = []
        for name, complaint in self._files_with_complaints(directory):
            if complaint:
                count(self.files[name].bytes)
            elif checksum(directory / name, count) != self.files[name].sha256:
                complaint = f"{name} differs from its checksum"
            if complaint:
                damaged.append(complaint)
        return damaged

    def _files_with_complaints(self, directory: Path) -> Iterator[tuple[str, str]]:
        """Every file's name, and what is wrong with its size or nothing."""
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                yield name, f"{name} is missing"
            elif (size := path.stat().st_size) != entry.bytes:
                yield name, f"{name} has {size} bytes instead of {entry.bytes}"
            else:
                yield name, ""


def _check_version(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a packed checkpoint")
    if raw["version"] != VERSION:
        remedy = "install a newer expert-serving, or pack" if raw["version"] > VERSION else "pack"
        raise CheckpointError(
            f"{path} is of version {raw['version']}, and this program reads version {VERSION}: "
            f"{remedy} the model again"
        )
