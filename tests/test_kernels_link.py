"""Linking object code: for this machine by running it, for Arm on an emulated core."""

import ctypes
from pathlib import Path

import armkit
import llvmlite.binding as llvm
import numpy as np
import pytest

from edgeq.errors import KernelError
from edgeq.kernels import host
from edgeq.kernels.link import Image, Loader

CALLS = """
declare i64 @labs(i64)
@c = private constant [4 x i64] [i64 10, i64 20, i64 30, i64 40], align 64
define i64 @g(i64 %x) noinline { %y = add i64 %x, 1  ret i64 %y }
define void @f(ptr %p) {
  %x = load i64, ptr %p
  %y = call i64 @labs(i64 %x)
  %z = call i64 @g(i64 %y)
  %q = getelementptr i64, ptr @c, i64 %z
  %v = load i64, ptr %q
  store i64 %v, ptr %p
  ret void
}
"""


def compiled(text: str, triple: str = "", cpu: str = "") -> bytes:
    """Object code as Numba lets LLVM make it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple or llvm.get_process_triple())
    machine = target.create_target_machine(cpu=cpu, opt=2, codemodel="jitdefault", jit=True)
    return bytes(machine.emit_object(llvm.parse_assembly(text)))


needs_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="ELF is Linux's")


@needs_linux
def test_functions_and_constants_are_found() -> None:
    loader, value = Loader(), np.array([-2], np.int64)
    address = loader.add("f", compiled(CALLS))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(value.ctypes.data)
    assert value[0] == 40
    (line,) = [x for x in Path("/proc/self/maps").read_text().splitlines() if holds(x, address)]
    assert line.split()[1] == "r-xs"  # nothing can write there


def holds(line: str, address: int) -> bool:
    first, last = (int(part, 16) for part in line.split()[0].split("-"))
    return first <= address < last


@pytest.mark.skipif(not armkit.HAVE_EMULATOR, reason="needs unicorn")
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_arm(cpu: str) -> None:
    """A function of another library is anywhere, too far for a call instruction."""
    library = "define i64 @f(i64 %x) { %y = sub i64 0, %x  ret i64 %y }"
    memory, labs = armkit.linked(compiled(library, armkit.TRIPLE, cpu))
    value = np.array([-2], np.int64)
    code = compiled(CALLS, armkit.TRIPLE, cpu)
    run = armkit.emulated(code, "i", False, {"labs": labs}.__getitem__, memory)
    run(value)
    assert value[0] == 40


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("@x = global i64 7\ndefine i64 @f() { %v = load i64, ptr @x ret i64 %v }", "variables"),
        ("declare void @no_such()\ndefine void @f() { call void @no_such() ret void }", "no_such"),
        ("define void @other() { ret void }", "no function 'f'"),
    ],
)
@needs_linux
def test_what_no_kernel_has_is_refused(text: str, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        Loader().add("f", compiled(text))


def test_damaged_files_are_refused() -> None:
    code = compiled(CALLS)
    for size in (0, 3, 40, 64, 300, len(code) // 2):
        with pytest.raises(KernelError, match="object code"):
            Image(code[:size], lambda name: 0).at(0)


def test_the_cpu_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept facts are believed if they are sound, else LLVM is asked again."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    real = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    for kept in (None, "", '{"cpu": 1, "features": ""}', '{"cpu": "x", "features": "; rm"}', "[]"):
        for file in tmp_path.rglob("*.json"):
            file.write_text(kept or "")
        host._facts.cache_clear()
        assert (host.name(), host.features()) == real
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == Path("/proc/cpuinfo").exists()
    for file in files:
        file.write_text('{"cpu": "x", "features": "+a,-b"}')
        host._facts.cache_clear()
        assert (host.name(), host.features()) == ("x", "+a,-b")
    host._facts.cache_clear()
