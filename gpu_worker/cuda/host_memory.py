"""The store's arena made readable for the GPU: kernels and copy engines take records from it as it is mapped.

Registering locks nothing anew (the store did that) but tells the driver where the pages are: 1.7 s for 20 GB,
measured on an H100. The mapping is read-only and stays so. Not done here: copying.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.arena import MappedArena
from common.errors import Unavailable
from common.units import format_bytes

_MAPPED, _READ_ONLY = 2, 8  # cudaHostRegisterMapped, cudaHostRegisterReadOnly


class RegisteredArena:
    """Owns the registration of an arena's frames with CUDA; nothing is registered for a CPU.

    Memory can be registered once at a time, so one of these must be closed before another is made of the same
    arena.
    """

    def __init__(self, arena: MappedArena, device: torch.device) -> None:
        """Raises Unavailable when the driver cannot register memory that is mapped read-only."""
        self.mapped, self._device = arena, device
        if device.type == "cuda":
            frames, runtime = arena.frames, torch.cuda.cudart()
            code = runtime.cudaHostRegister(frames.data_ptr(), frames.nbytes, _MAPPED | _READ_ONLY)
            if code != runtime.cudaError.success:
                raise Unavailable(
                    f"CUDA cannot register the store's {format_bytes(frames.nbytes)} of experts ({code}); "
                    "use --device cpu"
                )

    @property
    def frames(self) -> Tensor:
        """(frames, stride) uint8, on the host."""
        return self.mapped.frames

    @property
    def address(self) -> int:
        """Of frame 0, on the device: with unified addressing that of the host."""
        return self.frames.data_ptr()

    @property
    def frame_of(self) -> Tensor:
        """Where each expert lies: (layers, experts) int32; of an arena where all are READY for good."""
        return torch.from_numpy(self.mapped.frame_of())

    def followed_by(self, arena: MappedArena) -> RegisteredArena:
        """Of `arena`: this one still, or one of a store's successor in its stead."""
        if arena is self.mapped:
            return self
        successor = RegisteredArena(arena, self._device)
        self.close()
        return successor

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.cudart().cudaHostUnregister(self.address)
