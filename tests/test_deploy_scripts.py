"""The scripts of a bundle, run as they are on a board, with a pip that installs nothing real."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgeq import deploy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")

SCRIPTS = Path(__file__).resolve().parents[1] / "devices" / "deploy"
PIP = """
import pathlib, sys
edgeq = pathlib.Path(sys.prefix, "bin", "edgeq")
edgeq.write_text('#!/bin/sh\\necho "edgeq $*"\\n')
edgeq.chmod(0o755)
"""
MACHINE = os.uname().machine


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "models" / "a model.gguf").write_text("GGUF")
    with zipfile.ZipFile(folder / "wheels" / "pip-1-py3-none-any.whl", "w") as file:
        file.writestr("pip/__main__.py", PIP)
    deploy._copy_scripts(folder)
    seal(folder, MACHINE)
    return folder


def seal(folder: Path, machine: str) -> None:
    for name in ("SHA256SUMS", "manifest.json"):
        (folder / name).unlink(missing_ok=True)
    deploy._seal(folder, machine, ["3.11"], None)


def run(
    script: Path, *words: str, first: Path | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script of a bundle for a user without rights; first: folder to look for programs."""
    home = script.parents[1]
    env = {"HOME": str(home / "me"), "PATH": f"{first or home}:{os.environ['PATH']}"}
    if script.name == "install.sh":
        words = ("--user", "--python", sys.executable, *words)
    done = subprocess.run(["sh", script, *words], capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stderr
    return done


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "venv-" not in str(p)}


def test_installing_twice_using_and_removing(bundle: Path) -> None:
    me = bundle.parent / "me"
    first = run(bundle / "install.sh")
    assert "installing to" in first.stderr
    venvs = sorted(me.glob(".local/share/edgeq/venv-*"))
    assert len(venvs) == 1
    assert "installing to" not in run(bundle / "install.sh").stderr
    assert sorted(me.glob(".local/share/edgeq/venv-*")) == venvs
    assert (me / ".local/share/edgeq/models/a model.gguf").read_text() == "GGUF"
    command = me / ".local/bin/edgeq"
    assert subprocess.run([command, "x"], capture_output=True, text=True).stdout == "edgeq x\n"
    started = run(bundle / "start.sh", "-n", "4")
    assert started.stdout == f"edgeq run {bundle}/models/a model.gguf -n 4\n"

    (bundle / "new file").touch()  # another version: the old one goes when the new one is there
    seal(bundle, MACHINE)
    run(bundle / "install.sh")
    assert len(list(me.glob(".local/share/edgeq/venv-*"))) == 1
    assert sorted(me.glob(".local/share/edgeq/venv-*")) != venvs

    run(bundle / "install.sh", "--uninstall")
    left = {Path(name).name for name in tree(me) if (me / name).is_file()}
    assert left == {"a model.gguf", ".edgeq-installed"}
    run(bundle / "install.sh")
    run(bundle / "install.sh", "--uninstall", "--purge")
    assert not [name for name in tree(me) if (me / name).is_file()]
    assert "not installed" in run(bundle / "start.sh", code=2).stderr


def program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho {says}\n")
    (folder / name).chmod(0o755)
    return folder


def test_other_machines_are_refused(bundle: Path, tmp_path: Path) -> None:
    narrow = program(tmp_path / "narrow", "getconf", "32")
    assert "32-bit" in run(bundle / "install.sh", first=narrow, code=2).stderr
    old = program(tmp_path / "old", "uname", '"$([ "$1" = -s ] && echo Linux || echo armv7l)"')
    assert "this system is 32-bit (armv7l)" in run(bundle / "install.sh", first=old, code=2).stderr
    seal(bundle, "aarch64" if MACHINE == "x86_64" else "x86_64")
    assert f"this machine is {MACHINE}" in run(bundle / "install.sh", code=2).stderr
    assert not (tmp_path / "me").exists()


def test_damaged_and_foreign(bundle: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for words in (["--prefix", str(taken)], ["--prefix", str(taken), "--uninstall"]):
        assert "not made by this script" in run(bundle / "install.sh", *words, code=2).stderr
    assert [path.name for path in taken.iterdir()] == ["file"]
    (bundle / "models" / "a model.gguf").write_text("GGUH")
    assert "damaged" in run(bundle / "install.sh", code=2).stderr
    (bundle / "SHA256SUMS").unlink()
    assert "no bundle" in run(bundle / "install.sh", code=2).stderr
    assert not (tmp_path / "me").exists()


def test_help_and_unknown_words(bundle: Path) -> None:
    assert run(bundle / "install.sh", "--help").stdout.startswith("usage: install.sh [--user]")
    assert "--nonsense: unknown" in run(bundle / "install.sh", "--nonsense", code=2).stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_unit_is_hardened_and_lets_kernels_compile() -> None:
    lines = (SCRIPTS / "edgeq-warm@.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    assert "MemoryDenyWriteExecute" not in settings
    assert "ProcSubset" not in settings
    for name in ("NoNewPrivileges", "PrivateNetwork", "ProtectHome", "RestrictNamespaces"):
        assert settings[name] == "yes"
    assert settings["ProtectSystem"] == "strict"
    assert settings["CapabilityBoundingSet"] == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (SCRIPTS / "edgeq-warm@.service").read_text()
    unit = tmp_path / "edgeq-warm@.service"
    unit.write_text(text.replace("/opt/edgeq/venv/bin/edgeq", "/bin/true"))
    verify = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
