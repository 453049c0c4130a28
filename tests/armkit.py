"""Emitted code for Arm, run on another machine: compiled and linked here, executed by the Unicorn
emulator on this process's own memory, so that the tests of emitted code serve Arm as they are.
"""

import ctypes
import mmap
import struct
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from edgeq.kernels.link import Image

HAVE_EMULATOR = find_spec("unicorn") is not None
TRIPLE = "aarch64-unknown-linux-gnu"
STACK, PAGE = 1 << 18, 4096


def machine(cpu: str, features: str = "") -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLE)
    return target.create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )


def linked(code: bytes, find: Callable[[str], int] | None = None) -> tuple[np.ndarray, int]:
    """An object file in memory, and the address of its function `f`."""
    image = Image(code, find or {}.__getitem__)
    memory = np.frombuffer(mmap.mmap(-1, image.size), np.uint8)
    memory[:] = np.frombuffer(image.at(memory.ctypes.data), np.uint8)
    return memory, memory.ctypes.data + image.offset("f")


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
        self.fault = ""
        self.core.hook_add(unicorn.UC_HOOK_INTR, self._smmla)
        self._seen: set[int] = set()

    def _smmla(self, core: Any, number: int, _: Any) -> None:
        """Products of matrices, which the emulator does not know (Arm ARM, C7.2: SMMLA)."""
        here = core.reg_read(self.names.UC_ARM64_REG_PC)
        word = struct.unpack("<I", core.mem_read(here, 4))[0]
        if word & 0xFFE0FC00 != 0x4E80A400:
            self.fault = f"exception {number} at {word:08x}"
            core.emu_stop()
            return
        to, first, second = (self.names.UC_ARM64_REG_Q0 + (word >> at & 31) for at in (0, 5, 16))
        read = [core.reg_read(register).to_bytes(16, "little") for register in (to, first, second)]
        a, b = (np.frombuffer(v, np.int8).reshape(2, 8).astype(np.int32) for v in read[1:])
        total = np.frombuffer(read[0], np.int32).reshape(2, 2) + a @ b.T
        core.reg_write(to, int.from_bytes(total.astype("<i4").tobytes(), "little"))
        core.reg_write(self.names.UC_ARM64_REG_PC, here + 4)

    def show(self, array: np.ndarray) -> int:
        start = array.ctypes.data
        for page in range(start // PAGE, -(-(start + array.nbytes) // PAGE)):
            if page not in self._seen:
                self._seen.add(page)
                at = page * PAGE
                self.core.mem_map_ptr(at, PAGE, self._all, ctypes.c_void_p(at))
        return start


def emulated(
    code: bytes,
    arguments: str,
    result: bool,
    find: Callable[[str], int] | None = None,
    library: np.ndarray | None = None,
) -> Callable[..., Any]:
    """Function `f` of an object file; arguments as kernelkit.native takes them. find: addresses of
    functions that it calls, in `library`.
    """
    memory, entry = linked(code, find)
    stack = np.frombuffer(mmap.mmap(-1, STACK), np.uint8)

    def call(*values: Any) -> Any:
        cpu = _Cpu()
        stop, top = cpu.show(stack), stack[STACK // 2 :]  # it returns to a place it must not run
        for part in [memory] if library is None else [memory, library]:
            cpu.show(part)
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
        cpu.core.emu_start(entry, stop)
        assert not cpu.fault, cpu.fault
        if result:
            bits = cpu.core.reg_read(cpu.names.UC_ARM64_REG_S0) & 0xFFFFFFFF
            return float(np.uint32(bits).view(np.float32))
        return None

    return call
