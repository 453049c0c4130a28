"""Linking object code: for this machine by running it, for Arm on an emulated core."""

import ctypes
import errno
import io
import os
from pathlib import Path
from typing import Any

import armkit
import llvmlite.binding as llvm
import numpy as np
import pytest

from edgeq import kernels
from edgeq.errors import KernelError
from edgeq.kernels import host, link
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


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refuse(*_: object) -> int:
    raise OSError(errno.EACCES, "refused")


@needs_linux
@pytest.mark.parametrize("how", ["missing", "refused", "short"])
def test_code_goes_to_a_file_where_memory_has_none(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pythons for old systems lack the call, and systems may refuse it."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    if how == "missing":
        monkeypatch.delattr(os, "memfd_create")
    elif how == "refused":
        monkeypatch.setattr(os, "memfd_create", refuse)
    else:
        full = os.open("/dev/null", os.O_WRONLY)  # cannot be made longer
        monkeypatch.setattr(os, "memfd_create", lambda name: full)
    value, before = np.array([-2], np.int64), open_files()
    address = Loader().add("f", compiled(CALLS))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(value.ctypes.data)
    assert value[0] == 40
    assert open_files() == before - (how == "short")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@needs_linux
def test_a_short_write_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:100])

    def short() -> Short:
        return Short(os.memfd_create("short"), "w")

    monkeypatch.setattr(link, "_memory", short)
    monkeypatch.setattr(link, "_disk", short)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        Loader().add("f", compiled(CALLS))


@needs_linux
def test_llvm_links_where_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        ctypes.set_errno(errno.EACCES)
        return link.FAILED

    monkeypatch.setattr(link, "_mmap", refused)
    with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
        Loader().add("f", compiled(CALLS))
    value = np.array([-2], np.int64)
    address = kernels._add("f", compiled(CALLS))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(value.ctypes.data)
    assert value[0] == 40


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


@pytest.mark.parametrize("triple", ["", armkit.TRIPLE])
def test_damage_raises_nothing_else(triple: str, rng: np.random.Generator) -> None:
    code = compiled(CALLS, triple)
    outcomes = set()
    for _ in range(3000):
        data = bytearray(code)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            image = Image(bytes(data), lambda name: 1 << 40)
            assert len(image.at(1 << 30)) == image.size > image.offset("f") >= 0
            outcomes.add(True)
        except KernelError:
            outcomes.add(False)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("kind", "reach"), [(282, 1 << 27), (283, 1 << 27), (275, 1 << 32)], ids=["b", "bl", "adrp"]
)
def test_no_distance_is_too_far(kind: int, reach: int) -> None:
    here = 1 << 40
    assert link._field(kind, here, here + reach - link.PAGE)
    assert link._field(kind, here, here - reach)
    for target in (here + reach, here - reach - link.PAGE):
        with pytest.raises(KernelError, match="does not fit"):
            link._field(kind, here, target)


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
