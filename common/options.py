"""Checks of command line options that both programs have."""

from __future__ import annotations

import typer

from common.errors import ConfigError


def check_bits_option(bits: int | None) -> int | None:
    """A number of bits that matrices cannot have is a usage error."""
    if bits is None:
        return None
    from common.hlwq.planes import check_bits  # PyTorch comes with it, and most commands do not need that

    try:
        check_bits(bits)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return bits
