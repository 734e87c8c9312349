"""Makes disks, memory and clocks fail inside of real processes: the library of shim.c and its switches."""

from __future__ import annotations

import mmap
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
_CONTROL = struct.Struct("<iiiiq")  # struct control of shim.c


class Shim:
    """What processes started with `environment` suffer; calm at first. Needs gcc."""

    def __init__(self, directory: Path) -> None:
        library, control = directory / "shim.so", directory / "faults"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        control.write_bytes(bytes(_CONTROL.size))
        self.environment = {"LD_PRELOAD": str(library), "FAULT_CONTROL": str(control)}
        with control.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), _CONTROL.size)

    def set(
        self,
        *,
        read_errors: int = 0,
        read_delay_ms: int = 0,
        allocations_left: int | None = None,
        clock_offset: int = 0,
    ) -> None:
        """From now on; whatever is not named is well.

        `read_errors`: per cent of the reads of records; `read_delay_ms`: the longest delay of one;
        `allocations_left`: so many more frames get memory; `clock_offset`: seconds the wall clock is off.
        """
        scarce = allocations_left is not None
        values = read_errors, read_delay_ms, scarce, allocations_left or 0, clock_offset
        self._mapped[:] = _CONTROL.pack(*values)

    def close(self) -> None:
        self._mapped.close()
