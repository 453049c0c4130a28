"""Object code made runnable: a linker for the ELF files that kernels are on Linux.

LLVM has one, but loading its library takes 40 MB of memory and, from a memory card, seconds. A
kernel is compiled for any place (LLVM's large code model), calls a few functions of the C library,
and has constants but no state, so little is left to do. Memory is never writable and executable at
once: systems that forbid it (MemoryDenyWriteExecute= of systemd) do not mind.

Relocations: System V ABI, AMD64 supplement, 4.4; ELF for the Arm 64-bit Architecture (aaelf64),
5.7.
"""

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import IO

from edgeq.errors import KernelError
from edgeq.kernels.store import root

__all__ = ["Image", "Loader"]

PROT_READ, PROT_EXEC, MAP_SHARED, FAILED = 1, 4, 1, 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1
RELOCATABLE, X86_64, AARCH64 = 1, 62, 183  # of e_type and e_machine
WRITABLE, ALLOCATED = 1, 2  # of sh_flags
SYMBOLS, RELOCATIONS, ZEROS = 2, 4, 8  # of sh_type
UNDEFINED, COMMON = 0, 0xFFF2  # of st_shndx
PAGE = 4096
MOST = 64 << 20  # bytes of a kernel: a thousand times what the largest has

ABSOLUTE = {(X86_64, 1), (AARCH64, 257)}  # 64 bits
RELATIVE = {(X86_64, 2): 4, (X86_64, 24): 8, (AARCH64, 260): 8, (AARCH64, 261): 4}  # bytes
CALLS = {282, 283}  # b, bl: 26 bits of words
MOVES = {263: 0, 264: 0, 265: 16, 266: 16, 267: 32, 268: 32, 269: 48}  # movz, movk: which 16 bits
PAGE_OF = 275  # adrp: 21 bits of pages
LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # add, ldr: how far they shift
FAR_CALL = struct.pack("<II", 0x58000050, 0xD61F0200)  # ldr x16, .+8; br x16; then the address


class Loader:
    """Maps object code into the process; the code lives as long as that."""

    def add(self, symbol: str, code: bytes) -> int:
        """Address of the function `symbol` of an object file.

        Raises KernelError when it cannot be linked, OSError when the system has no memory for code.
        """
        image = Image(code, _of_this_process)
        try:
            return _map(_memory, image) + image.offset(symbol)
        except OSError:
            return _map(_disk, image) + image.offset(symbol)


def _memory() -> IO[bytes]:
    """A file in memory; raises OSError where Python or the system has none."""
    if not hasattr(os, "memfd_create"):  # built with a C library before 2.27
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return open(os.memfd_create("edgeq-kernel"), "wb", 0)


def _disk() -> IO[bytes]:
    """A file without a name."""
    return TemporaryFile("wb", 0, dir=root())


def _map(make: Callable[[], IO[bytes]], image: "Image") -> int:
    """Address of an image in memory that cannot be written.

    The C library maps it, not Python, which would keep the file open.
    """
    with make() as file:
        file.truncate(image.size)
        base = _mmap(None, image.size, PROT_READ | PROT_EXEC, MAP_SHARED, file.fileno(), 0)
        if base == FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # Before the bytes are there no page may be touched: when a page is first mapped as code,
        # Linux makes an Arm core's instruction cache agree with memory; not later.
        if file.write(image.at(base)) < image.size:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return base


def _mmap(*arguments: int | None) -> int:
    function = ctypes.CDLL(None, use_errno=True).mmap
    size, number = ctypes.c_size_t, ctypes.c_int
    function.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    function.restype = size
    return int(function(*arguments))


def _of_this_process(name: str) -> int:
    """Address of a function of the C library."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        raise KernelError(f"a kernel calls {name!r}, which this system lacks") from None
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


class Image:
    """What an object file becomes in memory. find(name): address of a function that it lacks.

    Raises KernelError for what no kernel has.
    """

    def __init__(self, code: bytes, find: Callable[[str], int]) -> None:
        self._code, self._find = code, find
        with _damage():
            self._sections = self._table()
            self._place, self.size = self._layout()
            self._symbols = list(self._read_symbols())
        if not 0 < self.size <= MOST:
            raise KernelError(f"object code: {self.size} bytes, expected 1 to {MOST}")

    def offset(self, symbol: str) -> int:
        """Where a function of the file starts."""
        for name, place, _ in self._symbols:
            if name == symbol and place is not None and place < self.size:
                return place
        raise KernelError(f"object code: no function {symbol!r}")

    def at(self, base: int) -> bytes:
        """The bytes, to be run at address `base`."""
        out = bytearray(self.size)
        with _damage():
            for i, place in self._place.items():
                _, kind, _, _, offset, length, *_ = self._sections[i]
                if kind != ZEROS:
                    out[place : place + length] = self._code[offset : offset + length]
            for stub, address in self._stubs.values():
                out[stub : stub + 16] = FAR_CALL + struct.pack("<Q", address)
            for section, entry in self._entries(RELOCATIONS):
                if section[7] in self._place:
                    self._relocate(out, base, self._place[section[7]], entry)
        if len(out) != self.size:
            raise KernelError("object code is damaged: a part is cut short")
        return bytes(out)

    # -- reading -----------------------------------------------------------------------------------
    def _table(self) -> list[tuple[int, ...]]:
        """Sections: name, type, flags, address, offset, size, link, info, alignment, entry size."""
        magic, kind, self._machine = struct.unpack_from("<6s10xHH", self._code)
        if (magic, kind) != (b"\x7fELF\2\1", RELOCATABLE) or self._machine not in (X86_64, AARCH64):
            raise KernelError("object code: expected a 64-bit ELF file for x86-64 or aarch64")
        (start,) = struct.unpack_from("<Q", self._code, 0x28)
        (count,) = struct.unpack_from("<H", self._code, 0x3C)
        return [struct.unpack_from("<IIQQQQIIQQ", self._code, start + 64 * i) for i in range(count)]

    def _layout(self) -> tuple[dict[int, int], int]:
        """(place by number of section, size of all)"""
        places, size = {}, 0
        for i, (_, _, flags, _, _, length, _, _, alignment, _) in enumerate(self._sections):
            if flags & ALLOCATED:
                if flags & WRITABLE and length:
                    raise KernelError("object code: has variables")
                places[i] = -(-size // max(alignment, 1)) * max(alignment, 1)
                size = places[i] + length
        return places, size

    def _entries(self, kind: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """(section, file offset of an entry of 24 bytes) in sections of a type."""
        for section in self._sections:
            if section[1] == kind:
                for at in range(section[4], section[4] + section[5], 24):
                    yield section, at

    def _read_symbols(self) -> Iterator[tuple[str, int | None, int]]:
        """(name, place in the image, address): one of the last two, in the order of the table."""
        self._stubs: dict[str, tuple[int, int]] = {}  # by function: place and address
        for section, at in self._entries(SYMBOLS):
            start, _, _, home, value, size = struct.unpack_from("<IBBHQQ", self._code, at)
            start += self._sections[section[6]][4]
            name = self._code[start : self._code.index(b"\0", start)].decode()
            if home in self._place:
                yield name, self._place[home] + value, 0
            elif home == COMMON:  # Numba's environments, which nothing in a kernel uses
                yield name, self._reserve(size, value), 0
            elif home == UNDEFINED and name:
                self._stubs[name] = self._reserve(16, 8), self._find(name)
                yield name, None, self._stubs[name][1]
            else:
                yield "", None, 0

    def _reserve(self, size: int, alignment: int) -> int:
        place = -(-self.size // max(alignment, 1)) * max(alignment, 1)
        self.size = place + size
        return place

    # -- relocating --------------------------------------------------------------------------------
    def _relocate(self, out: bytearray, base: int, start: int, entry: int) -> None:
        offset, info, addend = struct.unpack_from("<QQq", self._code, entry)
        kind, at = info & 0xFFFFFFFF, start + offset
        name, place, address = self._symbols[info >> 32]
        if place is None and kind in CALLS and self._machine == AARCH64:
            place, _ = self._stubs[name]
        target = (address if place is None else base + place) + addend
        here = base + at
        if (self._machine, kind) in ABSOLUTE:
            struct.pack_into("<Q", out, at, target)
        elif (self._machine, kind) in RELATIVE:
            size = RELATIVE[self._machine, kind]
            _within(8 * size, target - here)
            out[at : at + size] = (target - here).to_bytes(size, "little", signed=True)
        elif self._machine == AARCH64:
            (word,) = struct.unpack_from("<I", out, at)
            struct.pack_into("<I", out, at, word | _field(kind, here, target))
        else:
            raise KernelError(f"object code: relocation {kind} is not known")


def _field(kind: int, here: int, target: int) -> int:
    """The bits of an AArch64 instruction that depend on a place."""
    if kind in MOVES:
        return (target >> MOVES[kind] & 0xFFFF) << 5
    if kind in CALLS:
        _within(28, target - here)
        return (target - here >> 2) & 0x3FFFFFF
    if kind in LOW_BITS:
        return (target % PAGE >> LOW_BITS[kind]) << 10
    if kind == PAGE_OF:
        pages = target // PAGE - here // PAGE
        _within(21, pages)
        pages &= 0x1FFFFF
        return (pages & 3) << 29 | (pages >> 2) << 5
    raise KernelError(f"object code: relocation {kind} is not known")


def _within(bits: int, distance: int) -> None:
    if not -(1 << bits - 1) <= distance < 1 << bits - 1:
        raise KernelError(f"object code: {distance} does not fit into {bits} bits")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns what reading nonsense raises into KernelError."""
    try:
        yield
    except (struct.error, LookupError, ValueError, ArithmeticError) as error:
        raise KernelError(f"object code is damaged: {error}") from error
