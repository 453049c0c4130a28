"""What the commands share about the terminal: text that cannot harm it, a status line."""

import os
import re
import sys
from collections.abc import Callable

from edgeq.text import human

__all__ = ["Status", "dim", "harmless", "human", "is_terminal", "note"]

# Control characters but tab and newline, and halves of characters from undecodable bytes.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def harmless(text: str) -> str:
    r"""Text with control characters shown, not obeyed: a model must not drive the terminal.

    >>> harmless("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def is_terminal(stream: object) -> bool:
    """Whether a person looks at this stream."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())


def dim(text: str) -> str:
    """Text in a faint colour on a terminal that wants colour (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not is_terminal(sys.stderr) else f"\x1b[2m{text}\x1b[0m"


def note(text: str) -> None:
    """One line to the person at the terminal: stderr, since stdout carries results only."""
    print(dim(harmless(text)), file=sys.stderr, flush=True)


class Status:
    """A line on stderr that is rewritten in place on a terminal, and written once elsewhere."""

    def __init__(self) -> None:
        self._live = is_terminal(sys.stderr)
        self._shown = False

    def __call__(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[K{dim(harmless(text))}", end="", file=sys.stderr, flush=True)
        elif not self._shown:
            print(harmless(text), file=sys.stderr, flush=True)
        self._shown = True

    def clear(self) -> None:
        if self._shown and self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = False

    def compiling(self) -> Callable[[str, int, int], None]:
        """Callback for `edgeq.load(on_compile=...)`: says what takes time, and why only now."""

        def report(kernel: str, done: int, total: int) -> None:
            self(f"compiling kernels for this CPU, once: {done}/{total} {kernel}".rstrip())

        return report
