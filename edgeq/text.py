"""Text of files: read, written, and made safe to show on a terminal or in an error; sizes for
people.
"""

import os
from pathlib import Path

from edgeq.errors import FormatError, ResourceError

__all__ = ["human", "printable", "read_text", "write_text"]


def human(size: float) -> str:
    """Bytes for people, in powers of 1024.

    >>> human(1536), human(4_747_936), human(7)
    ('1.5 KiB', '4.5 MiB', '7 B')
    """
    units = ["KiB", "MiB", "GiB", "TiB"]
    if size < 1024:
        return f"{size:.0f} B"
    while (size := size / 1024) >= 1024 and len(units) > 1:
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def read_text(path: Path | str) -> str:
    """Content of a UTF-8 file without a byte order mark; line ends stay what they are.

    Raises ResourceError when it cannot be read, FormatError when it is not UTF-8.

    >>> read_text("no-such.txt")
    Traceback (most recent call last):
        ...
    edgeq.errors.ResourceError: no-such.txt: cannot be read: No such file or directory
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"{path}: line {line}, byte {error.start}: {error.reason}: expected a UTF-8 text"
        ) from error


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file; under its name there is all of it, or what was there before.

    Raises ResourceError.

    >>> write_text("no-such-folder/a.txt", "")
    Traceback (most recent call last):
        ...
    edgeq.errors.ResourceError: no-such-folder/a.txt: cannot be written: No such file or directory
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error


def printable(text: object, limit: int = 80) -> str:
    """`text` cut to `limit` characters; control, bidirectional and undecodable ones escaped.

    >>> printable("name" + chr(27) + "[2J")
    'name\\\\x1b[2J'
    >>> printable("x" * 100, limit=5)
    'xxxxx...'
    """
    whole = str(text)
    cut = whole[:limit] + ("..." if len(whole) > limit else "")
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
