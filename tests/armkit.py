"""Emitted code for Arm, run on another machine: compiled and linked here, executed by the Unicorn
emulator on this process's own memory, so that the tests of emitted code serve Arm as they are.

Relocations: ELF for the Arm 64-bit Architecture (github.com/ARM-software/abi-aa, aaelf64).
"""

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import llvmlite.binding as llvm
import numpy as np

HAVE_EMULATOR = find_spec("unicorn") is not None
TRIPLE = "aarch64-unknown-linux-gnu"
STACK, PAGE = 1 << 18, 4096

ALLOCATED, CODE, SYMBOLS, RELOCATIONS, ZEROS = 2, 4, 2, 4, 8  # of sh_flags and sh_type
PAGE_OF = 275  # adrp: the page of an address, relative to the instruction's own
LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # add, ldr: how far they shift


def machine(cpu: str) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLE)
    return target.create_target_machine(cpu=cpu, opt=3, reloc="static", codemodel="small")


# -- linking ---------------------------------------------------------------------------------------
class Linked:
    """An object file in memory, with its constants where the code expects them."""

    def __init__(self, code: bytes) -> None:
        self._file = code
        (start,) = struct.unpack_from("<Q", code, 0x28)
        (count,) = struct.unpack_from("<H", code, 0x3C)
        # name, type, flags, address, offset, size, link, info, alignment, size of an entry
        self._sections = [
            struct.unpack_from("<IIQQQQIIQQ", code, start + 64 * i) for i in range(count)
        ]
        self._load()
        symbols = self._symbols()
        self.entry = symbols["f"]
        self._relocate(list(symbols.values()))

    def _load(self) -> None:
        size, self._place = 0, {}
        for i, (_, _, flags, _, _, length, _, _, alignment, _) in enumerate(self._sections):
            if flags & ALLOCATED:
                self._place[i] = -(-size // alignment) * alignment
                size = self._place[i] + length
        self.memory = np.frombuffer(mmap.mmap(-1, size + PAGE), np.uint8)
        for i, place in self._place.items():
            _, kind, _, _, offset, length, *_ = self._sections[i]
            if kind != ZEROS:
                self.memory[place : place + length] = np.frombuffer(
                    self._file, np.uint8, length, offset
                )

    def _entries(self, kind: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """(section, file offset of an entry of 24 bytes) in sections of a type."""
        for section in self._sections:
            if section[1] == kind:
                for at in range(section[4], section[4] + section[5], 24):
                    yield section, at

    def _symbols(self) -> dict[Any, int]:
        """Address by name (by number where there is none), in the order of the table."""
        found: dict[Any, int] = {}
        for section, at in self._entries(SYMBOLS):
            name, _, _, home, value = struct.unpack_from("<IBBHQ", self._file, at)
            start = self._sections[section[6]][4] + name
            text = self._file[start : self._file.index(b"\0", start)].decode()
            base = self.memory.ctypes.data + self._place.get(home, 0)
            found[text if text not in ("", *found) else len(found)] = base + value
        return found

    def _relocate(self, addresses: list[int]) -> None:
        for section, at in self._entries(RELOCATIONS):
            home = section[7]
            if home in self._place and self._sections[home][2] & CODE:
                offset, info, addend = struct.unpack_from("<QQq", self._file, at)
                where = self._place[home] + offset
                target = addresses[info >> 32] + addend
                word = self.memory[where : where + 4].view("<u4")
                word[0] |= _bits(info & 0xFFFFFFFF, target, self.memory.ctypes.data + where)


def _bits(kind: int, target: int, here: int) -> int:
    if kind == PAGE_OF:
        pages = (target // PAGE - here // PAGE) & 0x1FFFFF
        return (pages & 3) << 29 | pages >> 2 << 5
    return (target % PAGE >> LOW_BITS[kind]) << 10


# -- running ---------------------------------------------------------------------------------------
class _Cpu:
    """An emulated core that sees only the memory it is shown."""

    def __init__(self) -> None:
        import unicorn
        from unicorn import arm64_const

        self.names, self._all = arm64_const, unicorn.UC_PROT_ALL
        self.core = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.core.ctl_set_cpu_model(arm64_const.UC_CPU_ARM64_MAX)
        self.core.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors on
        self._seen: set[int] = set()

    def show(self, array: np.ndarray) -> int:
        start = array.ctypes.data
        for page in range(start // PAGE, -(-(start + array.nbytes) // PAGE)):
            if page not in self._seen:
                self._seen.add(page)
                at = page * PAGE
                self.core.mem_map_ptr(at, PAGE, self._all, ctypes.c_void_p(at))
        return start


def emulated(code: bytes, arguments: str, result: bool) -> Callable[..., Any]:
    """Function `f` of an object file; arguments as kernelkit.native takes them."""
    linked, stack = Linked(code), np.frombuffer(mmap.mmap(-1, STACK), np.uint8)

    def call(*values: Any) -> Any:
        cpu = _Cpu()
        stop, top = cpu.show(stack), stack[STACK // 2 :]  # it returns to a place it must not run
        cpu.show(linked.memory)
        words = [cpu.show(v) if isinstance(v, np.ndarray) else v for v in values]
        whole = [int(w) for w, letter in zip(words, arguments) if letter == "i"]
        real = [np.float32(w) for w, letter in zip(words, arguments) if letter == "f"]
        top[: 8 * len(whole[8:])].view(np.int64)[:] = whole[8:]
        registers = {cpu.names.UC_ARM64_REG_X0 + i: w % 2**64 for i, w in enumerate(whole[:8])}
        registers |= {
            cpu.names.UC_ARM64_REG_S0 + i: int(x.view(np.uint32)) for i, x in enumerate(real)
        }
        registers |= {cpu.names.UC_ARM64_REG_SP: top.ctypes.data, cpu.names.UC_ARM64_REG_X30: stop}
        for register, value in registers.items():
            cpu.core.reg_write(register, value)
        cpu.core.emu_start(linked.entry, stop)
        if result:
            bits = cpu.core.reg_read(cpu.names.UC_ARM64_REG_S0) & 0xFFFFFFFF
            return float(np.uint32(bits).view(np.float32))
        return None

    return call
