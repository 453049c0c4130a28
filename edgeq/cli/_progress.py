"""A progress bar on stderr that only a person sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]

Update = Callable[[int, int, str], None]  # done, in all, what to say


@contextmanager
def bar(doing: str) -> Iterator[Update]:
    """A bar with the time that is left; it vanishes in the end."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    said = TextColumn("[dim]{task.fields[said]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    shown = Progress(
        *columns, said, console=console, transient=True, disable=not console.is_terminal
    )
    with shown:
        task = shown.add_task(escape(doing), total=None, said="")

        def update(done: int, total: int, text: str) -> None:
            shown.update(task, completed=done, total=total, said=escape(text))

        yield update
