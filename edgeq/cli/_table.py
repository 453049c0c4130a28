"""Tables on stdout: for people who look, and as wide when nobody does."""

import sys
from typing import TYPE_CHECKING

from edgeq.cli._terminal import is_terminal

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80  # columns where there is no terminal


def table(*columns: str, right: tuple[str, ...] = ()) -> "Table":
    """An empty table; right: columns of numbers. Without any title there is no head."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD if any(columns) else None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def show(made: "Table") -> None:
    """Print a table; a cell is text, not markup."""
    from rich.console import Console

    Console(width=None if is_terminal(sys.stdout) else WIDTH, markup=False).print(made)
