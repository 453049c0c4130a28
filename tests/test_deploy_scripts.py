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
edgeq.write_text('#!/bin/sh\\necho "edgeq $*" ${MALLOC_ARENA_MAX+"arenas $MALLOC_ARENA_MAX"}\\n')
edgeq.chmod(0o755)
pathlib.Path(sys.prefix, "asked").write_text("\\n".join(sys.argv))
"""
ROOTS = {  # programs that a root's install calls
    "id": 'if [ "$1" = -u ]; then echo 0; else [ -e "$EDGEQ_ROOT/user" ]; fi',
    "useradd": 'touch "$EDGEQ_ROOT/user"',
    "userdel": 'rm "$EDGEQ_ROOT/user"',
    "install": """echo "$@" >>"$EDGEQ_ROOT/calls"
PATH=${PATH#*:}; if [ "$4" = -o ]; then shift 7; install -d "$@"; else install "$@"; fi""",
    "sudo": 'echo "sudo $*"',
}
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
    model = me / ".local/share/edgeq/models/a model.gguf"
    assert f"edgeq run {model} --raw -n 4 " in first.stderr
    venvs = sorted(me.glob(".local/share/edgeq/venv-*"))
    assert len(venvs) == 1
    assert "installing to" not in run(bundle / "install.sh").stderr
    assert sorted(me.glob(".local/share/edgeq/venv-*")) == venvs
    assert (me / ".local/share/edgeq/models/a model.gguf").read_text() == "GGUF"
    command = me / ".local/bin/edgeq"
    assert subprocess.run([command, "x"], capture_output=True, text=True).stdout == "edgeq x\n"
    started = run(bundle / "start.sh", "-n", "4")
    assert started.stdout == f"edgeq run {bundle}/models/a model.gguf -n 4 arenas 2\n"

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


def program(folder: Path, name: str, does: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{does}\n")
    (folder / name).chmod(0o755)
    return folder


def test_other_machines_are_refused(bundle: Path, tmp_path: Path) -> None:
    narrow = program(tmp_path / "narrow", "getconf", "echo 32")
    assert "32-bit" in run(bundle / "install.sh", first=narrow, code=2).stderr
    old = program(tmp_path / "old", "uname", "[ $1 = -s ] && echo Linux || echo armv7l")
    assert "this system is 32-bit (armv7l)" in run(bundle / "install.sh", first=old, code=2).stderr
    seal(bundle, "aarch64" if MACHINE == "x86_64" else "x86_64")
    assert f"this machine is {MACHINE}" in run(bundle / "install.sh", code=2).stderr
    assert not (tmp_path / "me").exists()


def as_root(script: Path, *words: str, code: int = 0, **env: str) -> str:
    """Run install.sh as it runs for root, in a folder in place of /; what it said."""
    root, fakes = script.parents[1] / "root", script.parents[1] / "fakes"
    for name in ("usr/local/bin", "etc/systemd/system"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, does in ROOTS.items():
        program(fakes, name, does)
    env |= {"EDGEQ_ROOT": str(root), "PATH": f"{fakes}:{os.environ['PATH']}"}
    command = ["sh", script, "--python", sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, umask=0o077)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_root_installs_for_all_and_removes(bundle: Path, tmp_path: Path) -> None:
    root, script = tmp_path / "root", bundle / "install.sh"
    assert "each user compiles" in as_root(script)
    model = root / "var/lib/edgeq/models/a model.gguf"
    assert (
        f"-d -m 0755 -o root -g root {model.parents[1]} {model.parent}\n"
        in (root / "calls").read_text()
    )
    assert model.stat().st_mode & 0o777 == 0o644
    assert (root / "opt/edgeq/venv/bin").stat().st_mode & 0o777 == 0o755
    assert (root / "usr/local/bin/edgeq").resolve().is_file()
    unit = root / "etc/systemd/system/edgeq-warm@.service"
    assert f"ExecStart={root}/opt/edgeq/venv/bin/edgeq run" in unit.read_text()
    assert (root / "user").exists()

    said = as_root(script, SUDO_USER="someone")
    assert f"sudo -H -u someone -- {root}/opt/edgeq/venv/bin/edgeq run {model} --raw" in said
    as_root(script, "--uninstall")
    assert model.exists()
    assert not unit.exists()
    as_root(script, "--uninstall", "--purge")
    left = [path for path in root.rglob("*") if not path.is_dir()]
    assert left == [root / "calls"]


def test_prefixes(bundle: Path, tmp_path: Path) -> None:
    root, script = tmp_path / "root", bundle / "install.sh"
    for place, why in (
        ("a|b", "expected letters"),
        ("50%", "expected letters"),
        ("a b", "letters"),
    ):
        assert why in as_root(script, "--prefix", str(root / "srv" / place), code=2)
    assert "hidden from services" in as_root(script, "--prefix", f"{root}/tmp/edgeq", code=2)
    assert not (root / "srv").exists()
    as_root(script, "--prefix", f"{root}/home/A b&c", "--no-service", "--no-warm")
    as_root(script, "--prefix", f"{root}/home/A b&c//", "--uninstall", "--purge")
    assert not (root / "home/A b&c").exists()


def test_nothing_is_purged_where_nothing_was_installed(bundle: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "me" / ".cache" / "edgeq"
    kernels.mkdir(parents=True)
    for words in (["--purge"], ["--uninstall", "--purge"]):
        run(bundle / "install.sh", *words, code=2)
    assert kernels.is_dir()


def test_only_what_the_sums_list_is_used(bundle: Path, tmp_path: Path) -> None:
    (bundle / "wheels" / "pip-0-py3-none-any.whl").write_text("evil")
    (bundle / "wheels" / "numpy-9-py3-none-any.whl").write_text("evil")
    (bundle / "models" / "evil.gguf").write_text("evil")
    run(bundle / "install.sh")
    installed = tmp_path / "me/.local/share/edgeq"
    asked = (installed / "venv" / "asked").read_text().splitlines()
    assert [Path(name).name for name in asked if name.endswith(".whl")] == [
        "pip-1-py3-none-any.whl"
    ]
    assert str(bundle / "wheels") not in asked
    assert [path.name for path in (installed / "models").iterdir()] == ["a model.gguf"]


def test_online_is_for_a_checkout(bundle: Path, tmp_path: Path) -> None:
    assert "expected a checkout" in run(bundle / "install.sh", "--online", code=2).stderr
    assert not (tmp_path / "me").exists()


def test_a_python_with_a_space(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "a python"
    link.symlink_to(sys.executable)
    run(bundle / "install.sh", "--python", str(link))
    assert "no such" in run(bundle / "install.sh", "--python", "no such", code=2).stderr


def test_damaged_and_foreign(bundle: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for words in (["--prefix", str(taken)], ["--prefix", str(taken), "--uninstall", "--purge"]):
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
    assert "[Install]" not in lines  # of no use at each start, before there is a server


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (SCRIPTS / "edgeq-warm@.service").read_text()
    unit = tmp_path / "edgeq-warm@.service"
    unit.write_text(text.replace("/opt/edgeq/venv/bin/edgeq", "/bin/true"))
    verify = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
