"""Tables of results, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | float | int | None
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]
"""Header and rows."""


def text_table(table: Table) -> str:
    """Columns padded with spaces; numbers to the right.

    Example:
        >>> print(text_table((("op", "us"), [("sce", 1.25), ("pgd", 100.0), ("kl", None)])))
        op     us
        sce  1.25
        pgd   100
        kl      -
    """
    header, rows = table
    cells = [list(header), *([show(cell) for cell in row] for row in rows)]
    numeric = [all(not isinstance(row[j], str) or row[j] == "" for row in rows) for j in range(len(header))]
    widths = [max(len(line[j]) for line in cells) for j in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(table: Table) -> str:
    """A Markdown table; numbers to the right.

    Example:
        >>> print(markdown_table((("op", "us"), [("sce", 1.25)])))
        | op | us |
        |---|---:|
        | sce | 1.25 |
    """
    header, rows = table
    numeric = [all(not isinstance(row[j], str) for row in rows) for j in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(show(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def show(cell: Cell) -> str:
    """Three significant digits, whole numbers from 100 on.

    Example:
        >>> [show(x) for x in (0.01234, 1.25, 99.96, 1234.5, 7, None, "text")]
        ['0.0123', '1.25', '100', '1234', '7', '-', 'text']
    """
    if cell is None:
        return "-"
    if isinstance(cell, str | int):
        return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 99.95 else f"{cell:.3g}"
