"""Markdown tables of figures."""

from collections.abc import Mapping
from typing import Any


def cells(measured: Mapping[str, Any], figures: tuple[str, ...]) -> list[str]:
    """'shipped (mean ± deviation)' of each figure."""
    cells = []
    for figure in figures:
        spread = measured["seeds"][figure]
        own = 100 * measured["shipped"][figure]
        cells.append(f"{own:.1f} ({100 * spread['mean']:.1f} ± {100 * spread['sd']:.1f})")
    return cells


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])
