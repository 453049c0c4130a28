"""Compiled kernels on disk: damaged entries, unusable folders, what a second start loads."""

import json
import os
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernelkit as kit
import pytest

from edgeq import kernels
from edgeq.errors import KernelError
from edgeq.kernels import cache, host
from edgeq.kernels import isa as isas

ISA = isas.choose(kit.BEST)
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")

CODE = bytes(range(256)) * 5


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def head(data: bytes) -> tuple[dict[str, object], bytes]:
    line, _, code = data[len(cache.MAGIC) :].partition(b"\n")
    return json.loads(line), code


def other_symbol(data: bytes) -> bytes:
    fields, code = head(data)
    return cache.MAGIC + json.dumps({**fields, "symbol": "exit"}).encode() + b"\n" + code


def without_digest(data: bytes) -> bytes:
    fields, code = head(data)
    return cache.MAGIC + json.dumps({"symbol": fields["symbol"]}).encode() + b"\n" + code


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "magic only": lambda data: cache.MAGIC,
    "wrong magic": flip(3),
    "other version": lambda data: data.replace(b"kernel 1", b"kernel 9"),
    "cut by one byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut in the head": lambda data: data[: len(cache.MAGIC) + 9],
    "longer": lambda data: data + b"\0",
    "first byte of the code": lambda data: flip(data.index(CODE[:9]))(data),
    "last byte": lambda data: flip(len(data) - 1)(data),
    "head is no JSON": flip(len(cache.MAGIC)),
    "head is no table": lambda data: cache.MAGIC + b"[1]\n" + CODE,
    "head is no text": lambda data: cache.MAGIC + b"\xff\xfe\n" + CODE,
    "no digest": without_digest,
    "other symbol": other_symbol,
    "zeros": lambda data: bytes(len(data)),
}


def test_an_entry_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "kernels-0"
    cache.write(folder, "matvec/Q4_0", "symbol", CODE)
    assert cache.read(folder, "matvec/Q4_0") == ("symbol", CODE)
    assert cache.read(folder, "matvec/Q4_1") is None
    cache.write(folder, "matvec/Q4_0", "other", b"")
    assert cache.read(folder, "matvec/Q4_0") == ("other", b"")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache.write(tmp_path, "op", "symbol", CODE)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert cache.read(tmp_path, "op") is None


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """No byte of an entry can change without the entry being refused or meaning the same."""
    cache.write(tmp_path, "op", "symbol", CODE[:40])
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    for at in range(len(sound)):
        file.write_bytes(flip(at)(sound))
        assert cache.read(tmp_path, "op") in (None, ("symbol", CODE[:40])), at


def test_an_entry_under_another_name_is_none(tmp_path: Path) -> None:
    cache.write(tmp_path, "matvec/Q4_0", "symbol", CODE)
    (tmp_path / "matvec-Q4_0.o").rename(tmp_path / "matvec-Q8_0.o")
    assert cache.read(tmp_path, "matvec/Q8_0") is None


def test_an_entry_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "op.o").mkdir()
    assert cache.read(tmp_path, "op") is None
    assert cache.read(tmp_path / "nowhere", "op") is None


@posix
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666], ids=oct)
def test_an_entry_that_others_could_write_is_none(tmp_path: Path, mode: int) -> None:
    cache.write(tmp_path, "op", "symbol", CODE)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(mode)
    assert cache.read(tmp_path, "op") is None
    file.chmod(0o644)
    assert cache.read(tmp_path, "op")
    tmp_path.chmod(0o777)
    assert cache.read(tmp_path, "op") is None


@posix
def test_somebody_elses_entry_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(tmp_path, "op", "symbol", CODE)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "real")
    (tmp_path / "op.o").symlink_to(tmp_path / "real")
    assert cache.read(tmp_path, "op") is None
    (tmp_path / "real").replace(tmp_path / "op.o")
    assert cache.read(tmp_path, "op")
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert cache.read(tmp_path, "op") is None


def test_folders_differ_by_what_changes_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {cache._digest(isa) for isa in isas.modules().values()}
    assert len(found) == len(isas.modules())
    monkeypatch.setenv("NUMBA_CPU_NAME", "another")
    found.add(cache._digest(ISA))
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    found.add(cache._digest(ISA))
    monkeypatch.setattr(host, "version", lambda package: "0.0")
    found.add(cache._digest(ISA))
    assert len(found) == len(isas.modules()) + 3


def test_the_oldest_cpu_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for this CPU are not taken for those that run on every one with EDGEQ_ISA."""
    monkeypatch.setattr(host, "name", lambda: "one with more")
    own = cache._digest(ISA)
    monkeypatch.setenv("EDGEQ_ISA", ISA.NAME)
    assert cache._digest(ISA) != own


# -- what a process loads --------------------------------------------------------------------------
LOAD = """
import json, sys
from edgeq import kernels
from edgeq.kernels import isa
from edgeq.kernels.program import Program, Team
names, seen = json.loads(sys.argv[1]), []
kernels.load(names, isa.choose(), lambda name, done, total: seen.append([name, done, total]))
team = Team(isa.choose(), 2, 2)
team.close()
heavy = [m for m in ("numba", "llvmlite.binding", "edgeq.kernels.compile") if m in sys.modules]
print(json.dumps([seen, heavy]))
"""
NAMES = ["walk", "lead", "serve", "embed/Q4_0"]


def start(folder: Path, names: list[str], **env: str) -> tuple[list[list[object]], list[str]]:
    """Load kernels in a process of its own: (calls of progress, heavy modules it imported)."""
    full = {**os.environ, "EDGEQ_CACHE": str(folder), **env}
    full["PYTHONPATH"] = str(Path(kernels.__file__).parents[2])
    command = [sys.executable, "-c", LOAD, json.dumps(names)]
    shown = subprocess.run(command, capture_output=True, text=True, env=full, timeout=120)
    assert shown.returncode == 0, shown.stderr
    seen, heavy = json.loads(shown.stdout)
    return seen, heavy


def test_starts(tmp_path: Path) -> None:
    """The first start compiles everything and says so, the second one nothing; after damage, what
    was damaged. None of them imports Numba itself, and only the first one LLVM's library.
    """
    seen, heavy = start(tmp_path, NAMES)
    assert set(heavy) <= {"llvmlite.binding"}  # to ask for the CPU's name, which it keeps
    assert seen[0] == ["", 0, len(NAMES)]
    assert sorted(name for name, _, _ in seen[1:]) == sorted(NAMES)
    assert [done for _, done, _ in seen] == list(range(len(NAMES) + 1))

    assert start(tmp_path, NAMES) == ([], [])

    files = {path.stem: path for path in tmp_path.rglob("*.o")}
    assert set(files) == {name.replace("/", "-") for name in NAMES}
    files["lead"].write_bytes(b"")
    files["walk"].write_bytes(other_symbol(files["walk"].read_bytes()))
    seen, _ = start(tmp_path, NAMES)
    assert sorted(name for name, _, _ in seen) == ["", "lead", "walk"]
    assert start(tmp_path, NAMES) == ([], [])
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {
        ".o",
        ".json",
    }  # nothing half written


def test_compiling_nothing_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    with pytest.raises(KernelError, match="unknown"):
        kernels.load(["no such kernel"], ISA)
    assert kernels.missing(["a", "a", "b"], ISA) == ["a", "b"]


def test_a_broken_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of what the child said, and nothing is left running."""
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    monkeypatch.setattr(sys, "executable", "false" if os.name == "posix" else sys.executable)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KernelError, match=r"^compiling kernels for \S+ failed: exit code 1$"):
            kernels.load(["lead"], ISA)


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled by forks on Linux only")
@pytest.mark.parametrize("whole", [True, False], ids=["all", "fork"])
def test_a_killed_compiler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """As when a board runs out of memory: the process that compiles, or its fork for one kernel."""
    kill = "import os, sys; os.kill(os.getpid(), 9)\n"
    fork = f"from edgeq.kernels import compile; compile._apart(lambda: exec({kill!r}))\n"
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{kill if whole else fork}")
    script.chmod(0o700)
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(KernelError, match=r"failed: killed by signal 9: not enough memory\?.*zram"):
        kernels.load(["lead"], ISA)


@posix
def test_a_compiler_that_says_a_lot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds, while nobody reads: `timeout` ends the test if that blocks."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntimeout 5 sh -c 'yes | head -c 300000; echo end' >&2; exit 3\n")
    script.chmod(0o700)
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(KernelError, match=r"failed: end$"):
        kernels.load(["lead", "walk"], ISA)


def test_modules_in_the_current_folder_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A numba.py lying there, as in a folder of downloads, whichever way Python was started."""
    trap = tmp_path / "downloads"
    trap.mkdir()
    (trap / "numba.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(1)")
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path / "cache")
    monkeypatch.chdir(trap)
    for first in ("", ".", str(trap)):
        monkeypatch.setattr(sys, "path", [first, *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{trap}{os.pathsep}")
    kernels._compile(["walk"], ISA, None)
    assert cache.read(tmp_path / "cache", "walk")
    assert not (tmp_path / "ran").exists()


@posix
def test_an_interrupted_compilation_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C does not wait for what is still to be compiled, and leaves no process behind."""
    children: list[subprocess.Popen[str]] = []
    make = kernels._child

    def child(*args: Any) -> subprocess.Popen[str]:
        children.append(make(*args))
        return children[-1]

    def interrupt(name: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    monkeypatch.setattr(kernels, "_child", child)
    with pytest.raises(KeyboardInterrupt):
        kernels.load(
            ["walk", "rope/f16.f16", *(f"attend/{n}.f16.f16" for n in (8, 4, 2, 1))], ISA, interrupt
        )
    assert len(children) == min(2, os.cpu_count() or 1)
    assert [c.returncode for c in children] == [-signal.SIGKILL] * len(children)


# -- what was measured -----------------------------------------------------------------------------
def test_measurements_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = tmp_path / "kernels"
    monkeypatch.setattr(cache, "folder", lambda isa: where)
    assert cache.recall("limits-2", ISA) is None
    cache.remember("limits-2", ISA, {"threads": 2, "speed": 1.5})
    assert cache.recall("limits-2", ISA) == {"threads": 2, "speed": 1.5}
    assert [path.name for path in where.iterdir()] == ["limits-2.json"]
    for broken in (b"", b"{", b"[1]", b"\xff"):
        (where / "limits-2.json").write_bytes(broken)
        assert cache.recall("limits-2", ISA) is None


def test_a_measurement_that_cannot_be_kept_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path / "file")
    cache.remember("limits-2", ISA, {"threads": 2})
    assert cache.recall("limits-2", ISA) is None
