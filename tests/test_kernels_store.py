"""The folder of compiled kernels: where it is, who may write there, what a full disk leaves."""

import errno
import os
import stat
from pathlib import Path

import pytest

from edgeq.errors import KernelError
from edgeq.kernels import store

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.mark.parametrize("step", ["builtins.open", "os.replace"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        store.keep(tmp_path / "table.json", {"a": 1})
        with pytest.raises(OSError, match="no space left"):
            store.write(tmp_path / "code.o", b"code")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, where kernels go when theirs cannot be used."""
    there = tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(there))
    return there


def assert_falls_back(temporary: Path) -> None:
    root = store.root()
    assert root.parent == temporary
    assert store.root() == root  # every start finds the same
    if os.name == "posix":
        assert root.name == f"edgeq-{os.getuid()}"
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_the_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "a" / "b"))
    assert store.root() == tmp_path / "a" / "b" / "edgeq"
    if os.name == "posix":
        assert stat.S_IMODE(store.root().stat().st_mode) == 0o700


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.root() == tmp_path / "edgeq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert store.root() == tmp_path / "me" / ".cache" / "edgeq"


@posix
def test_the_place_that_was_given_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDGEQ_CACHE=/tmp must not take /tmp from everybody else."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    tmp_path.chmod(0o1777)
    assert store.root() == tmp_path / "edgeq"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777


@posix
@pytest.mark.parametrize("mode", [0o777, 0o720], ids=oct)
def test_a_shared_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path, mode: int
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    (tmp_path / "edgeq").mkdir()
    (tmp_path / "edgeq").chmod(mode)
    assert_falls_back(temporary)
    assert stat.S_IMODE((tmp_path / "edgeq").stat().st_mode) == mode
    assert not list((tmp_path / "edgeq").iterdir())


def test_a_file_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    (tmp_path / "edgeq").write_text("")
    for where in (tmp_path, tmp_path / "edgeq", tmp_path / "edgeq" / "deeper"):
        monkeypatch.setenv("EDGEQ_CACHE", str(where))
        assert_falls_back(temporary)


@posix
def test_a_link_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "edgeq").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    assert_falls_back(temporary)


@posix
def test_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    fixed, access = tmp_path / "edgeq", os.access
    fixed.mkdir(mode=0o500)
    if os.geteuid() == 0:  # whom permissions do not bind
        monkeypatch.setattr(os, "access", lambda path, mode: path != fixed and access(path, mode))
    assert_falls_back(temporary)


@posix
def test_somebody_elses_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    """One line of advice when the temporary one is not ours either."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    assert store.root() == tmp_path / "edgeq"
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(KernelError, match=r"^no place .*set EDGEQ_CACHE to a folder of your own$"):
        store.root()
