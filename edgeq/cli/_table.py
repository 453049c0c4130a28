"""Tables on stdout: for people who look, and as wide when nobody does."""

import sys
from typing import TYPE_CHECKING, Literal

from edgeq.cli._terminal import is_terminal

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80  # columns where there is no terminal
WIDEST = 200  # of a table that is not cut


def table(*columns: str, right: tuple[str, ...] = (), whole: bool = False) -> "Table":
    """An empty table; right: columns of numbers. Without any title there is no head. whole: closer
    together, and a cell is one line.
    """
    from rich import box
    from rich.table import Table

    head = box.SIMPLE_HEAD if any(columns) else None
    made = Table(box=head, pad_edge=False, padding=(0, 1, 0, 0) if whole else (0, 1))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=whole)
    return made


def show(made: "Table") -> None:
    """Print a table; a cell is text, not markup. One that is whole is as wide as it is: a terminal
    wraps lines, but cuts no numbers.
    """
    from rich.console import Console

    whole = any(column.no_wrap for column in made.columns)
    width = None if is_terminal(sys.stdout) else WIDTH
    Console(width=WIDEST if whole else width, markup=False).print(made)
