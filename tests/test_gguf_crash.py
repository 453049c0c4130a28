"""Crash safety of the GGUF writer: under the final name there is only ever a complete file."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stopping import die_at
from test_gguf_writer import DATA, F32, SPECS

from edgeq.errors import ResourceError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf, partfile


def write_all(path: Path, **options: bool) -> None:
    with GgufWriter(path, {"general.name": "new"}, SPECS, **options) as writer:
        for name, array in DATA.items():
            writer.write(name, array)


def is_new(path: Path) -> bool:
    with open_gguf(path) as file:
        whole = all(file.tensor(n).tobytes() == array.tobytes() for n, array in DATA.items())
        return whole and file.metadata["general.name"] == "new"


def write_half(path: Path) -> None:
    """As if Ctrl-C came after the first tensor."""
    with GgufWriter(path, {}, SPECS) as writer:
        writer.write("a", DATA["a"])
        part = path.with_name("x.gguf.part")
        assert part.stat().st_size == writer.nbytes  # claimed at once
        assert part.read_bytes()[:4] == partfile.MARK  # not a GGUF file yet
        assert not path.exists()
        raise KeyboardInterrupt


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


CALLS = ("open", "ftruncate", "posix_fallocate", "pwrite", "pread", "fsync", "replace", "close")
FAILURES: dict[str, tuple[BaseException, bool]] = {  # and whether the call has its effect first
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), False),
    "card fails": (OSError(errno.EIO, "Input/output error"), False),
    "Ctrl-C before": (KeyboardInterrupt(), False),
    "Ctrl-C after": (KeyboardInterrupt(), True),
}


def fail_at(
    monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException, late: bool
) -> list[str]:
    """Let the nth system call of the writer fail; gives the list of calls, filled as they come."""
    made: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            failing = len(made) == nth
            # Of a file just opened nobody knows yet, and close takes effect even when it fails.
            acts = name == "close" or (late and name != "open") or not failing
            result = real(*args, **kwargs) if acts else None
            if failing:
                raise error
            return result

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name))
    return made


@pytest.mark.parametrize("old", [False, True], ids=["new name", "replaces a file"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_at_every_system_call(
    failure: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the name has the old content or the complete new one, and no .part stays."""
    path = tmp_path / "x.gguf"
    error, late = FAILURES[failure]
    expected = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    for nth in range(1, 100):
        path.unlink(missing_ok=True)
        if old:
            path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            made = fail_at(patch, nth, error, late)
            done = outcome(path, force=old)
        assert [entry.name for entry in tmp_path.iterdir()] in ([], ["x.gguf"]), made
        committed = "replace" in made[: nth if late else nth - 1]
        if committed:
            assert is_new(path), made
        else:
            assert (path.read_bytes() if path.exists() else None) == (b"old" if old else None)
        if len(made) < nth:
            assert (done, committed) == (None, True)
            return
        assert type(done) is expected, made
    pytest.fail("the writer never came to its end")


def test_data_is_durable_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fail_at(monkeypatch, 0, KeyboardInterrupt(), False)
    write_all(tmp_path / "x.gguf")
    tail = [call for call in made if call in ("pwrite", "fsync", "replace")]
    assert tail[-6:] == ["pwrite", "fsync", "pwrite", "fsync", "replace", "fsync"]


def outcome(path: Path, *, force: bool) -> BaseException | None:
    try:
        write_all(path, force=force)
    except BaseException as error:
        return error
    return None


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    write_all(tmp_path / "x.gguf")
    assert is_new(tmp_path / "x.gguf")


def test_long_writes_are_synced_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(partfile, "_PIECE", 100)
    monkeypatch.setattr(partfile, "_SYNC_EVERY", 200)
    monkeypatch.setattr(os, "fdatasync", synced.append)
    write_all(tmp_path / "x.gguf")
    assert synced
    assert is_new(tmp_path / "x.gguf")


def test_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ResourceError, match=r"x\.gguf: exists already"):
        write_all(path)
    assert path.read_bytes() == b"old"
    write_all(path, force=True)
    assert is_new(path)


def test_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GgufWriter(path, {}, SPECS).__enter__()
    for name, array in DATA.items():
        writer.write(name, array)
    path.write_bytes(b"other")
    with pytest.raises(ResourceError, match="exists already"):
        writer.__exit__(None, None, None)
    assert path.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="create the folder first"):
        write_all(tmp_path / "none" / "x.gguf")
    with pytest.raises(ResourceError, match="is a folder"):
        write_all(tmp_path, force=True)


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with GgufWriter(path, {"general.name": "new"}, SPECS) as writer:
        with pytest.raises(ResourceError, match="another process is writing it"):
            write_all(path)
        for name, array in DATA.items():
            writer.write(name, array)
    assert is_new(path)


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_rest_of_a_killed_run_is_overwritten(tmp_path: Path, nth: int) -> None:
    """Killed at a system call, so that nothing can be tidied up."""
    child = os.fork()
    if not child:
        die_at(nth, ("ftruncate", "posix_fallocate", "pwrite", "fsync"))
        write_all(tmp_path / "x.gguf")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "x.gguf.part").exists()
    write_all(tmp_path / "x.gguf")
    assert is_new(tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf.part").exists()


@pytest.mark.parametrize("content", [b"precious", b"GGUF" * 10_000, bytes(4096), b"x"])
def test_part_of_something_else_is_kept(tmp_path: Path, content: bytes) -> None:
    """Browsers name unfinished downloads so."""
    (tmp_path / "x.gguf.part").write_bytes(content)
    for force in (False, True):
        with pytest.raises(ResourceError, match=r"x\.gguf\.part: exists and was not made by edgeq"):
            write_all(tmp_path / "x.gguf", force=force)
    assert (tmp_path / "x.gguf.part").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf.part"]


def test_systems_without_fdatasync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partfile, "_SYNC_EVERY", 200)
    monkeypatch.delattr(os, "fdatasync")
    write_all(tmp_path / "x.gguf")
    assert is_new(tmp_path / "x.gguf")


def test_part_is_never_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "x.gguf.part").symlink_to("victim")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_all(tmp_path / "x.gguf")
    assert (tmp_path / "victim").read_bytes() == b"precious"


# ---- full disks


def test_full_disk_is_seen_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=700)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"needs \d+ bytes, 700 are free: free some space"):
        write_all(tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_limit_on_file_size(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(ResourceError, match="forbids files of this size"):
            write_all(tmp_path / "x.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_really_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_disk / "x.gguf"
    large = [TensorSpec("a", (1 << 18,), F32), TensorSpec("b", (5,), F32)]  # 1 MiB and a bit
    with pytest.raises(ResourceError, match=r"needs \d+ bytes, 1048576 are free"):
        GgufWriter(path, {}, large).__enter__()
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # and where the count is wrong
    with pytest.raises(ResourceError, match="free some space"):
        GgufWriter(path, {}, large).__enter__()
    assert list(small_disk.iterdir()) == []
    write_all(path)
    assert is_new(path)
