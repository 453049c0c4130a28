#!/usr/bin/env python3
"""Prepare an emulated 64-bit Arm Debian with Python and edgeq's dependencies; print its folder.

It is kept in the user's cache folder and made once for each state of this file and of
pyproject.toml, and what other states left unused is removed; to free the disk, delete `edgeq-arm`
there. Needs Debian (apt-get, dpkg-deb), pip and their network, no rights and no chroot: packages
are only unpacked.

In it, `venv/bin/python` is an Arm Python that a program of this machine can start like any other:
a script that calls the emulator. So what runs there can start `sys.executable` as usual. QEMU_CPU
says which CPU it has; see `run`.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
DEBIAN = ["base-files", "python3", "python3-venv", "libstdc++6"]
TESTS = ("hypothesis", "pytest")  # of the development extras
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (17, 26, 27, 28)] + [
    "manylinux2014_aarch64"
]
DAY = 24 * 3600  # seconds
EMULATOR = "usr/bin/qemu-aarch64-static"  # a link to one without -static since Debian 13

APT = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "{host}"; }};
APT::Sandbox::User "root";
Dir::State "{home}/state";
Dir::State::status "{home}/status";
Dir::Cache "{home}/cache";
"""
WRAPPER = """#!/bin/sh
exec "{home}/{emulator}" -L "{home}/debian" -0 "$0" "{home}/debian/usr/bin/{python}" "$@"
"""


def home() -> Path:
    """Where it is, or will be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    state = b"".join(path.read_bytes() for path in (Path(__file__), PROJECT))
    return base / "edgeq-arm" / hashlib.sha256(state).hexdigest()[:12]


def main() -> None:
    place = home()
    if not place.exists():
        check()
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="making-") as beside:
            made = Path(beside) / "made"
            make(made, place)
            try:
                made.rename(place)
            except OSError:
                if not place.exists():  # otherwise somebody else was faster
                    raise
        forget(place)
    os.utime(place)
    print(place)


def forget(place: Path) -> None:
    """Remove what was made for other states of those files, unless it was used in the last day."""
    for old in place.parent.iterdir():
        if old != place and time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)


def check() -> None:
    release = platform.freedesktop_os_release() if sys.platform == "linux" else {}
    if release.get("ID") != "debian":
        fail(f"needs Debian and its Arm packages: this is {release.get('ID', sys.platform)}")
    if platform.machine() == "aarch64":
        fail("this machine is a 64-bit Arm: run tests and edgeq without it")
    missing = [tool for tool in ("apt-get", "dpkg", "dpkg-deb", "tar") if not shutil.which(tool)]
    if missing:
        fail(f"{', '.join(missing)}: not found")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        fail(f"{sys.executable} has no pip: sudo apt install python3-pip, or set PYTHON")


def make(place: Path, home: Path) -> None:
    """Everything in `place`, as it must be when it is moved to `home`."""
    root = place / "debian"
    for package in fetch(place / "apt"):
        if package.name.startswith("qemu-user"):
            only = "tar -x --wildcards './usr/bin/*aarch64*'"
            command("sh", "-c", f'cd "$1" && dpkg-deb --fsys-tarfile "$0" | {only}', package, place)
        else:
            command("dpkg-deb", "-x", package, root)
    shutil.rmtree(place / "apt")
    python = (root / "usr/bin/python3").readlink().name
    site = place / "venv" / "lib" / python / "site-packages"
    wheels(site, python.removeprefix("python"))
    (place / "venv/bin").mkdir()
    (place / "venv/pyvenv.cfg").write_text(f"home = {home}/debian/usr/bin\n")
    wrapper = place / "venv/bin/python"
    wrapper.write_text(WRAPPER.format(home=home, emulator=EMULATOR, python=python))
    wrapper.chmod(0o755)


def fetch(place: Path) -> list[Path]:
    """The emulator for this machine, and the Arm packages with all they depend on; base-files,
    with the links that others go through, first.
    """
    (place / "state/lists/partial").mkdir(parents=True)
    (place / "cache/archives/partial").mkdir(parents=True)
    (place / "status").touch()  # nothing is installed
    host = output("dpkg", "--print-architecture").strip()
    (place / "conf").write_text(APT.format(home=place, host=host))
    os.environ["APT_CONFIG"] = str(place / "conf")
    command("apt-get", "-q", "update")
    if not any((place / "state/lists").glob("*_Packages*")):  # for apt-get that is no error
        fail("apt-get update found no packages: is there a network to Debian?")
    quiet = ["-q", "--yes", "--no-install-recommends", "--download-only"]
    command("apt-get", *quiet, "install", f"qemu-user-static:{host}", *DEBIAN)
    found = (place / "cache/archives").glob("*.deb")
    return sorted(found, key=lambda path: (not path.name.startswith("base-files"), path.name))


def wheels(site: Path, version: str) -> None:
    """Install what pyproject.toml asks for, as it is for Arm."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = [line for line in project["optional-dependencies"]["dev"] if line.startswith(TESTS)]
    options = [f"--platform={name}" for name in PLATFORMS]
    options += ["--only-binary=:all:", "--no-compile", "--quiet", "--disable-pip-version-check"]
    where = [f"--python-version={version}", f"--target={site}"]
    pip = [sys.executable, "-m", "pip", "install"]
    command(*pip, *options, *where, *project["dependencies"], *extras)


def command(*words: str | Path) -> None:
    output(*words)


def output(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        fail(f"{words[0]} failed: {last}")
    return done.stdout


def fail(message: str) -> None:
    sys.exit(f"tests/arm/prepare.py: {message}")


if __name__ == "__main__":
    main()
