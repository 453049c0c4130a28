"""Opening files of an untrusted model folder: regular files only, bounded size, strict JSON."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from edgeq.errors import FormatError, ResourceError

__all__ = ["member", "open_regular", "parse_json", "read_json", "read_small"]


def open_regular(path: Path) -> tuple[int, int]:
    """File descriptor (read only) and size in bytes of a regular file.

    Raises ResourceError when it cannot be opened, FormatError for a folder, FIFO or device; nothing
    is read from those.

    >>> open_regular(Path("/dev/zero"))
    Traceback (most recent call last):
        ...
    edgeq.errors.FormatError: /dev/zero: not a regular file: give a file on disk
    """
    try:
        # Without O_NONBLOCK a FIFO would block here for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FormatError(f"{path}: not a regular file: give a file on disk")
    return fd, status.st_size


def read_small(path: Path, limit: int) -> bytes:
    """Whole content of a regular file of at most `limit` bytes.

    Raises FormatError when it is larger, ResourceError when it cannot be read.
    """
    fd, size = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if size > limit:
            raise FormatError(f"{path}: {size} bytes: expected at most {limit}")
        return file.read(size)


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Object in a JSON file. Duplicate keys, other top-level values and deep nesting are errors.

    Raises FormatError, ResourceError.
    """
    value = parse_json(read_small(path, limit), str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(data: bytes, where: str) -> Any:
    """Value of a JSON text in UTF-8; `where` opens every error message.

    Raises FormatError. Unlike the standard library it refuses duplicate keys, whose meaning differs
    from parser to parser.

    >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
    Traceback (most recent call last):
        ...
    edgeq.errors.FormatError: config.json: duplicate key 'a'
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(f"{where}: duplicate key {twice!r}")
        return table

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise FormatError(f"{where}: JSON is nested too deeply") from error
    except ValueError as error:  # syntax, or an integer of thousands of digits
        raise FormatError(f"{where}: not valid JSON: {error}") from error


def member(folder: Path, name: str) -> Path:
    """Path of the file `name` in `folder`, for names that come from an untrusted index.

    Symbolic links may lead elsewhere in the folder or to the hub cache's `blobs`, nowhere else.
    Raises FormatError.

    >>> member(Path("/models"), "../../etc/passwd")
    Traceback (most recent call last):
        ...
    edgeq.errors.FormatError: /models: shard name '../../etc/passwd': expected a plain file name
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise FormatError(f"{folder}: shard name {name!r}: expected a plain file name")
    real = folder.resolve()
    target = (real / name).resolve()
    # The hub cache is models--org--name/{snapshots/<revision>/, blobs/}.
    homes = (real, real.parent.parent / "blobs") if real.parent.name == "snapshots" else (real,)
    if not any(target.is_relative_to(home) for home in homes):
        raise FormatError(f"{folder / name}: symbolic link leaves the folder: copy the file there")
    return folder / name
