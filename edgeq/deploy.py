"""A folder with everything that a board without internet needs to run edgeq: wheels for its kind of
CPU, the model, and scripts that install and start it.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeq import wheel
from edgeq.data import find
from edgeq.errors import RequestError, ResourceError
from edgeq.gguf import open_gguf
from edgeq.text import human, printable

__all__ = ["MACHINES", "PYTHONS", "Bundle", "check", "make"]

MACHINES = ("aarch64", "x86_64")
PYTHONS = ("3.11", "3.13")  # of Debian and Raspberry Pi OS 12 and 13
GLIBC = 36  # 2.36, of Debian 12: wheels for this one or older
MARK = ".edgeq-bundle"  # in an unfinished folder of ours
KIND = "edgeq bundle 1"
WHEELS_BYTES = 100 << 20  # for one version of Python: some 90 MiB
OFFLINE = ("Connection", "Retrying", "timed out", "name resolution")  # in what pip says
PIECE = 16 << 20

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is going on


@dataclass(frozen=True)
class Bundle:
    """What was made. size: bytes of all files."""

    folder: Path
    machine: str
    pythons: tuple[str, ...]
    files: int
    size: int
    model: str | None


def make(
    folder: Path,
    *,
    model: Path | None = None,
    machine: str = "aarch64",
    pythons: Sequence[str] = PYTHONS,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Collect a bundle. The folder has its name only when everything is in it; an earlier bundle is
    replaced with `force`, anything else never.

    Raises RequestError for a model, machine or version that is none, ResourceError when the folder
    is taken, the disk lacks the space, or packages cannot be downloaded.
    """
    folder = folder.resolve()  # of a link to a bundle, the bundle is replaced
    check(folder, machine=machine, pythons=pythons, force=force)
    if model is not None:
        _check_model(model)
        _check_space(folder, len(pythons) * WHEELS_BYTES + model.stat().st_size)
    steps = len(pythons) + 2
    say = progress or (lambda done, total, text: None)
    with _unfinished(folder) as part:
        wheels = part / "wheels"
        wheels.mkdir()
        own = wheel.build(wheels)
        for i, python in enumerate(pythons):
            _download(own, wheels, machine, python, partial(say, i, steps))
        if model is not None:
            _copy_model(model, part / "models", partial(say, steps - 2, steps))
        _copy_scripts(part)
        say(steps - 1, steps, "check sums")
        files = _seal(part, machine, pythons, model)
        _replace(part, folder)
    name = None if model is None else model.name
    return Bundle(folder, machine, tuple(pythons), len(files), sum(files.values()), name)


# -- before ----------------------------------------------------------------------------------------
def check(
    folder: Path,
    *,
    machine: str = "aarch64",
    pythons: Sequence[str] = PYTHONS,
    force: bool = False,
) -> None:
    """Refuse now what `make` could not finish, whatever the model: before one is downloaded.

    Raises as `make`.

    >>> check(Path("pi"), machine="armv6l")
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: machine 'armv6l': expected aarch64 or x86_64
    """
    if machine not in MACHINES:
        raise RequestError(f"machine {machine!r}: expected {' or '.join(MACHINES)}")
    for python in pythons:
        major, _, minor = python.partition(".")
        if major != "3" or not minor.isdecimal() or int(minor) < 11:
            raise RequestError(f"python {python!r}: expected a version from 3.11 on, such as 3.13")
    if folder.exists():
        _check_taken(folder, force)
    if importlib.util.find_spec("pip") is None:
        raise ResourceError(f"{sys.executable} has no pip: python -m ensurepip, or install it")
    if not folder.parent.is_dir():
        raise ResourceError(f"{folder.parent}: no such folder: create it first")
    _check_space(folder, len(pythons) * WHEELS_BYTES)


def _check_model(model: Path) -> None:
    with open_gguf(model) as gguf:
        if not gguf.tensors:
            raise RequestError(f"{printable(model)}: holds no model")
    if not model.name.isprintable() or "\\" in model.name:  # lists of sums have lines
        raise RequestError(f"{printable(model)}: rename it: expected plain characters")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ResourceError(
            f"{folder}: needs about {human(needed)}, {human(free)} are free: use another disk"
        )


def _check_taken(folder: Path, force: bool) -> None:
    if not _is_bundle(folder):
        raise ResourceError(f"{folder}: exists and is no bundle of edgeq: give another name")
    if not force:
        raise ResourceError(f"{folder}: exists: use --force to replace this bundle")


def _is_bundle(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_bytes())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """FOLDER.part, empty and ours alone; after an error it is gone."""
    part = folder.with_name(folder.name + ".part")
    taken = part.exists() or part.is_symlink()
    if taken and not (part / MARK).is_file():
        raise ResourceError(f"{part}: exists and was not made by edgeq: move it away")
    part.mkdir(exist_ok=True)
    with open(part / MARK, "wb") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"{part}: another process is making this bundle") from None
        for path in part.iterdir():
            if path.name != MARK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


# -- what goes in ----------------------------------------------------------------------------------
def _download(
    own: Path, wheels: Path, machine: str, python: str, say: Callable[[str], None]
) -> None:
    """Wheels of what edgeq needs, and of pip to install them with."""
    systems = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)]
    systems += [f"manylinux2014_{machine}", f"linux_{machine}"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--only-binary", ":all:", "--dest", str(wheels)]
    command += ["--implementation", "cp", "--python-version", python]
    command += [part for system in systems for part in ("--platform", system)]
    last, offline = "", False
    with subprocess.Popen(
        [*command, str(own), "pip"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                offline |= any(word in line for word in OFFLINE)
                last = line.strip() if line.startswith("ERROR") or not last else last
                say(f"Python {python}: {line.strip()[:60]}")
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise ResourceError(
            f"pip cannot download the packages for Python {python} on {machine}: "
            f"{printable(last, 300)}{': is this machine online?' if offline else ''}"
        )


def _copy_model(model: Path, folder: Path, say: Callable[[str], None]) -> None:
    folder.mkdir()
    size, done = model.stat().st_size, 0
    with open(model, "rb") as source, open(folder / model.name, "wb") as target:
        while piece := source.read(PIECE):
            target.write(piece)
            done += len(piece)
            say(f"{model.name} {100 * done // max(size, 1)} %")


def _copy_scripts(part: Path) -> None:
    for source in sorted((find("devices") / "deploy").iterdir()):
        if source.is_file():
            shutil.copyfile(source, part / source.name)
            (part / source.name).chmod(0o755 if source.suffix == ".sh" else 0o644)


# -- finishing -------------------------------------------------------------------------------------
def _seal(part: Path, machine: str, pythons: Sequence[str], model: Path | None) -> dict[str, int]:
    """Write manifest and sums, and everything to the disk; sizes by name."""
    names = [p.relative_to(part) for p in sorted(part.rglob("*")) if p.is_file()]
    sums = {name.as_posix(): _sum(part / name) for name in names if name.name != MARK}
    sizes = {name: (part / name).stat().st_size for name in sums}
    manifest = {
        "kind": KIND,
        "machine": machine,
        "pythons": list(pythons),
        "model": None if model is None else f"models/{model.name}",
        "files": {name: {"bytes": sizes[name], "sha256": sums[name]} for name in sums},
    }
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    sums["manifest.json"] = _sum(part / "manifest.json")
    (part / "SHA256SUMS").write_text("".join(f"{sums[n]}  {n}\n" for n in sorted(sums)))
    os.sync()  # before the folder gets its name
    return sizes


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(part: Path, folder: Path) -> None:
    """Give the finished folder its name; an earlier bundle goes when the new one is there. Until it
    has its name the mark says whose it is.
    """
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    (folder / MARK).unlink()
    shutil.rmtree(old, ignore_errors=True)
