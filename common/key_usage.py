"""What the requests of one API key are using, held against the limits of that key.

The server's interceptor (`common.key_guard`) begins and ends requests; whoever counts their tokens calls
`check_allowance`, and `allowed_output` where nobody said how many are wanted. What no waiting would make
allowed is PermissionDenied, all else Exhausted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING

from common.errors import Exhausted, PermissionDenied

if TYPE_CHECKING:
    from common.api_keys import KeyRules

# gRPC metadata: of how many calls this is one, which their client makes at once and wants all of.
TOGETHER = "x-requests-together"
_MINUTE = 60.0


class KeyUsage:
    """Requests now and within the last minute. Used on one event loop."""

    def __init__(self, name: str, rules: KeyRules) -> None:
        self.name, self.rules = name, rules
        self.running = 0
        self._begun: deque[float] = deque()

    def begin(self, count: int = 1) -> None:
        """Requests arrive, to which `end` belongs; Exhausted, saying when to try again, if they may not."""
        self._check_concurrency(count)
        self._check_rate(count)
        self.running += count
        _current.set(self)

    def end(self, count: int = 1) -> None:
        self.running -= count
        assert self.running >= 0

    def check_possible(self, count: int) -> None:
        """Raises PermissionDenied for more requests at once than this key may ever have."""
        who, why = f"key {self.name!r} may", f"not {count} at once: send fewer prompts in one request"
        most, rate = self.rules.max_concurrent_requests, self.rules.requests_per_minute
        if most is not None and count > most:
            raise PermissionDenied(f"{who} have {most} requests at a time, {why}")
        if rate is not None and count > rate:
            raise PermissionDenied(f"{who} begin {rate} requests a minute, {why}")

    def allowed_output(self, wanted: int, samples: int) -> int:
        """Tokens for each of so many samples: what is wanted, or less if this key may not have that many."""
        most = self.rules.max_output_tokens
        return wanted if most is None else min(wanted, max(1, most // samples))

    def check_allowance(self, prompt: int, output: int, priority: int | None) -> None:
        """Raises PermissionDenied for more tokens, or before more others, than this key may ask for.

        `priority`: None where none can be asked for.
        """
        rules, who = self.rules, f"key {self.name!r} may"
        if rules.max_prompt_tokens is not None and prompt > rules.max_prompt_tokens:
            raise PermissionDenied(f"{who} have {rules.max_prompt_tokens} tokens read, not {prompt}")
        if rules.max_output_tokens is not None and output > rules.max_output_tokens:
            raise PermissionDenied(
                f"{who} ask for {rules.max_output_tokens} tokens a request, not for {output}: "
                "lower max_new_tokens, or the number of samples"
            )
        if rules.max_priority is not None and priority is not None and priority > rules.max_priority:
            raise PermissionDenied(f"{who} ask for a priority of {rules.max_priority}, not of {priority}")

    def _check_concurrency(self, count: int) -> None:
        most = self.rules.max_concurrent_requests
        if most is not None and self.running + count > most:
            raise Exhausted(f"key {self.name!r} may have {most} requests at a time; wait for one to end")

    def _check_rate(self, count: int) -> None:
        """Counts requests that may begin."""
        most = self.rules.requests_per_minute
        if most is None:
            return
        now = time.monotonic()
        while self._begun and now - self._begun[0] >= _MINUTE:
            self._begun.popleft()
        if (over := len(self._begun) + count - most) > 0:
            wait = math.ceil(_MINUTE - (now - self._begun[over - 1] if over <= len(self._begun) else 0))
            text = f"key {self.name!r} may begin {most} requests a minute; try again in {wait} s"
            raise Exhausted(text, retry_after=wait)
        self._begun += [now] * count


_current: ContextVar[KeyUsage | None] = ContextVar("key_usage", default=None)


def check_allowance(prompt: int, output: int = 0, priority: int | None = 0) -> None:
    """The same for the key of the request being answered, if keys are asked for."""
    usage = _current.get()
    if usage is not None:
        usage.check_allowance(prompt, output, priority)


def allowed_output(wanted: int, samples: int) -> int:
    """The same of `KeyUsage.allowed_output`."""
    usage = _current.get()
    return wanted if usage is None else usage.allowed_output(wanted, samples)
