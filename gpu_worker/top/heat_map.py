"""Hit rates of all layers, coloured from red to green; shaded where there is no colour."""

from __future__ import annotations

from rich.console import RenderableType
from rich.rule import Rule
from rich.text import Text

from gpu_worker.top.history import HitRates

_SHADES = " ░▒▓█"  # of a fifth each
_WIDTH = 9


def heat_map(rates: HitRates, width: int, coloured: bool) -> list[RenderableType]:
    """A title, and as many layers a line as fit; nothing for a model without layers."""
    if not rates.layers:
        return []
    whole = "none" if rates.all is None else f"{rates.all:.1%}"
    title = Text(f"hit rate by layer, last {rates.seconds:.0f} s; together {whole}", style="dim")
    cells = _cells(rates.layers, max(1, width // _WIDTH), coloured)
    return [Rule(title, align="left", style="dim"), cells]


def _cells(layers: list[float | None], columns: int, coloured: bool) -> Text:
    columns = _even(len(layers), columns)
    text = Text(no_wrap=True)
    for layer, rate in enumerate(layers):
        if layer and layer % columns == 0:
            text.append("\n")
        text.append(f"{layer:>3} ", style="dim")
        if rate is None:
            text.append("  - ", style="dim")
        else:
            shade = " " if coloured else _SHADES[min(len(_SHADES) - 1, int(rate * len(_SHADES)))]
            text.append(f"{rate * 100:>3.0f}{shade}", style=_colour(rate))
        text.append(" ")
    return text


def _even(count: int, columns: int) -> int:
    """Columns for lines of nearly equal length."""
    lines = -(-count // columns)
    return -(-count // lines)


def _colour(rate: float) -> str:
    """Black on red, yellow, green; half-way in between."""
    red, green = min(1.0, 2 * (1 - rate)), min(1.0, 2 * rate)
    return f"black on rgb({round(60 + 180 * red)},{round(60 + 150 * green)},70)"
