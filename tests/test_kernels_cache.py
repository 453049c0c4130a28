"""Compiled kernels on disk: damaged entries, unusable folders, what a second start loads."""

import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import kernelkit as kit
import pytest

from edgeq import kernels
from edgeq.errors import KernelError
from edgeq.kernels import cache
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


# -- the folder ------------------------------------------------------------------------------------
@pytest.fixture
def fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder that stands in for one that cannot be used."""
    there = tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(there))
    cache._temporary.cache_clear()
    yield there
    cache._temporary.cache_clear()


def test_the_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "a" / "b"))
    assert cache.root() == tmp_path / "a" / "b"
    if os.name == "posix":
        assert stat.S_IMODE(cache.root().stat().st_mode) == 0o700


@posix
def test_others_lose_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    assert cache.root() == tmp_path
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "edgeq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert cache.root() == tmp_path / "me" / ".cache" / "edgeq"


def assert_falls_back(fallback: Path) -> None:
    root = cache.root()
    assert root.parent == fallback
    assert cache.root() == root  # the same for the whole process
    if os.name == "posix":
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "edgeq"):
        monkeypatch.setenv("EDGEQ_CACHE", str(where))
        assert_falls_back(fallback)


@posix
def test_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: Path
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "fixed"))
    (tmp_path / "fixed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # whom permissions do not bind
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_falls_back(fallback)


@posix
def test_somebody_elses_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: Path
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "theirs"))
    assert cache.root() == tmp_path / "theirs"
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert_falls_back(fallback)


def test_folders_differ_by_what_changes_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {cache._digest(isa) for isa in isas.modules().values()}
    assert len(found) == len(isas.modules())
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    found.add(cache._digest(ISA))
    monkeypatch.setattr(cache, "_version", lambda package: "0.0")
    found.add(cache._digest(ISA))
    assert len(found) == len(isas.modules()) + 2


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
heavy = [m for m in ("numba", "edgeq.kernels.compile") if m in sys.modules]
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
    was damaged. None of them imports Numba itself.
    """
    seen, heavy = start(tmp_path, NAMES)
    assert heavy == []
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
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".o"}  # nothing half written


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
