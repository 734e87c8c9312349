"""The errors that cross a process boundary, and the gRPC status each one becomes.

Three classes of failure, as everywhere in this project: the caller asked wrongly; a peer or a
resource is missing; an invariant broke. Only the first two live here. The third is an
`AssertionError` or whatever the device raised, and ends the process loudly.
"""

from __future__ import annotations

import grpc


class ServingError(Exception):
    """An error with a meaning for the caller; its text says what is wrong and what to change."""

    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN


class InvalidRequest(ServingError, ValueError):
    """The caller asked for something that can never work."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class ConfigError(ServingError, ValueError):
    """A model config, a command line or a size that this system cannot serve."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class CheckpointError(ServingError, ValueError):
    """A checkpoint on disk that is damaged, incomplete or of a form nobody here reads."""

    status = grpc.StatusCode.DATA_LOSS


class NotFound(ServingError):
    """A named thing does not exist (any more), such as a lease that has expired."""

    status = grpc.StatusCode.NOT_FOUND


class Incompatible(ServingError):
    """Two peers that do not speak the same protocol version or record layout."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Unavailable(ServingError):
    """A peer is gone or did not answer within the stated time; trying again later may work."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Unavailable):
    """The caller's own time limit passed before the answer was complete; a longer one may do."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Exhausted(ServingError):
    """A bounded resource (memory, queue, leases) is used up."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, text: str, retry_after: int | None = None) -> None:
        """`retry_after`: seconds, where it is known when there is more."""
        super().__init__(text)
        self.retry_after = retry_after


class Unauthenticated(ServingError):
    """The caller did not show who it is, with an API key that is known."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServingError):
    """The caller is known, and may not do this; asking again will not help."""

    status = grpc.StatusCode.PERMISSION_DENIED
