"""What an unfinished file says about itself, so that the work on it can go on.

It lies after the last byte of the file that is being made, and is cut off in the end: the identity
of the work (JSON), a record for each part that is finished, and a footer by which it is found.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from edgeq.errors import FormatError

__all__ = ["MEMO_BYTES", "Checksum", "Journal", "identity_of"]

MEMO_BYTES = 24  # that whoever wrote a part may keep with it

_MAGIC = b"edgeq journal 1\n"
_FOOTER = struct.Struct("<QQ16s")  # bytes of the identity, number of records, magic
_RECORD = struct.Struct(f"<II{MEMO_BYTES}s")  # 1 when finished, checksum, memo
_MAX_IDENTITY = 1 << 20  # bytes
_PAGE = 4096  # bytes


class Journal:
    """Layout and records of a journal for `count` parts. identity: what must be the same to go on.

    >>> journal = Journal({"recipe": "Q4_K_M"}, 2)
    >>> len(journal.blank()) == journal.size, journal.place(1) - journal.place(0)
    (True, 32)
    """

    def __init__(self, identity: Mapping[str, str], count: int) -> None:
        """Raises FormatError when the identity is too long."""
        self.identity, self._count = dict(identity), count
        self._text = json.dumps(self.identity).encode()
        if len(self._text) > _MAX_IDENTITY:
            raise FormatError(f"identity of {len(self._text)} bytes: expected {_MAX_IDENTITY}")
        self.size = len(self._text) + count * _RECORD.size + _FOOTER.size

    def blank(self) -> bytes:
        """The journal before anything is finished."""
        footer = _FOOTER.pack(len(self._text), self._count, _MAGIC)
        return self._text + bytes(self._count * _RECORD.size) + footer

    def place(self, i: int) -> int:
        """First byte of record `i`, from the start of the journal."""
        return len(self._text) + i * _RECORD.size

    @staticmethod
    def record(total: "Checksum", memo: bytes) -> bytes:
        """Record of a finished part with the checksum of its bytes."""
        return _RECORD.pack(1, total.value(memo), memo)

    @staticmethod
    def parse(record: bytes) -> tuple[int, bytes] | None:
        """Checksum and memo; None for a part that is not finished."""
        done, found, memo = _RECORD.unpack(record)
        return (found, memo) if done == 1 else None

    record_bytes = _RECORD.size


class Checksum:
    """CRC-32 of the sums of pages of 4 KiB: finds pages that never reached the disk, at its speed.

    >>> one, two = Checksum(), Checksum()
    >>> one.add(memoryview(b"abc" * 5000)); two.add(memoryview(b"abc" * 5000 + b"d"))
    >>> one.value(b"memo") == two.value(b"memo")
    False
    """

    def __init__(self) -> None:
        self._crc, self._rest = 0, b""

    def add(self, data: memoryview) -> None:
        """The next bytes."""
        if self._rest:
            missing = _PAGE - len(self._rest)
            self._rest += bytes(data[:missing])
            data = data[missing:]
            if len(self._rest) < _PAGE:
                return
            self._fold(memoryview(self._rest))
        whole = len(data) // _PAGE * _PAGE
        self._fold(data[:whole])
        self._rest = bytes(data[whole:])

    def _fold(self, pages: memoryview) -> None:
        sums = np.frombuffer(pages, "<u8").reshape(-1, _PAGE // 8).sum(axis=1, dtype=np.uint64)
        self._crc = zlib.crc32(sums.tobytes(), self._crc)

    def value(self, memo: bytes) -> int:
        """Checksum of all bytes so far and of what is kept with them."""
        return zlib.crc32(memo.ljust(MEMO_BYTES, b"\0"), zlib.crc32(self._rest, self._crc))


def identity_of(fd: int) -> dict[str, str] | None:
    """Identity in the journal at the end of an open file; None when there is no journal."""
    size = os.fstat(fd).st_size
    if size < _FOOTER.size:
        return None
    text, count, magic = _FOOTER.unpack(os.pread(fd, _FOOTER.size, size - _FOOTER.size))
    start = size - _FOOTER.size - count * _RECORD.size - text
    if magic != _MAGIC or text > _MAX_IDENTITY or start < 0:
        return None
    try:
        found = json.loads(os.pread(fd, text, start))
    except ValueError:
        return None
    plain = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if plain else None
