"""A position in untrusted bytes: every step is checked against the end before it is taken."""

import mmap
import struct

from edgeq.errors import FormatError
from edgeq.gguf.layout import MAX_METADATA_BYTES, U64
from edgeq.text import printable


class Cursor:
    """Reads `data` from its start; `source` names the file in error messages."""

    def __init__(self, data: bytes | mmap.mmap, source: str) -> None:
        self.data = data
        self.source = source
        self.pos = 0
        self.end = min(len(data), MAX_METADATA_BYTES)

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self.end - self.pos

    def fail(self, message: str) -> FormatError:
        """Error that names the file and the current byte; the caller raises it."""
        return FormatError(f"{self.source}: byte {self.pos}: {message}")

    def need(self, size: int, what: str) -> None:
        """Raise FormatError unless `size` more bytes are there."""
        if size <= self.left:
            return
        if self.end == MAX_METADATA_BYTES:
            raise self.fail(f"{what}: metadata is larger than {MAX_METADATA_BYTES >> 20} MiB")
        raise self.fail(
            f"{what} needs {size} bytes, {self.left} are left: the file is truncated or damaged"
        )

    def skip(self, size: int, what: str) -> int:
        """Step over `size` bytes; gives their start."""
        self.need(size, what)
        start = self.pos
        self.pos += size
        return start

    def number(self, layout: struct.Struct, what: str) -> int:
        """One integer."""
        start = self.skip(layout.size, what)
        value: int = layout.unpack_from(self.data, start)[0]
        return value

    def string(self, what: str, limit: int) -> bytes:
        """Bytes with their length in front, at most `limit`."""
        size = self.number(U64, f"length of {what}")
        if size > limit:
            raise self.fail(f"{what} has {size} bytes: expected at most {limit}")
        start = self.skip(size, what)
        return self.data[start : start + size]

    def identifier(self, what: str, limit: int) -> str:
        """A key or a name: 1 to `limit` bytes of printable UTF-8."""
        raw = self.string(what, limit)
        text = raw.decode("utf-8", "surrogateescape")
        if not text or not text.isprintable():
            shown = printable(text)
            raise self.fail(f"{what} is '{shown}': expected printable text, not empty")
        return text
