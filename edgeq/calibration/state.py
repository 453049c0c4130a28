"""What an interrupted calibration leaves beside its output, so that the next run goes on from it.

A folder OUT.state: progress.npz with the sums so far, pass-N.npz with the Hessians of each finished
pass, model.gguf where a checkpoint had to be converted. A file is complete or not there.
"""

import contextlib
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError, ResourceError

__all__ = ["State"]

Arrays = Mapping[str, NDArray[Any]]

_PROGRESS, _RUN, MODEL = "progress.npz", "run.json", "model.gguf"
_NEW = "new-"  # what is being written


class State:
    """The folder of one run, locked while it is in use; `identity` tells runs apart.

    Raises ResourceError when another process uses the folder, it holds files of somebody else, or
    it belongs to another run and `force` is not set: then it is emptied.
    """

    def __init__(self, out: Path, identity: Mapping[str, object], *, force: bool = False) -> None:
        self.folder = out.with_name(out.name + ".state")
        self.model = self.folder / MODEL
        with _reported(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._lock()
            self._claim(json.dumps(identity, sort_keys=True, indent=1), force)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            advice = "wait for it, or write to another name"
            raise ResourceError(f"{self.folder}: another process works here: {advice}") from error
        except OSError:  # some network file systems have no locks: go on without
            pass

    def _claim(self, identity: str, force: bool) -> None:
        run = self.folder / _RUN
        found = run.read_text(encoding="utf-8", errors="replace") if run.exists() else None
        if found == identity:
            return
        if found is None:
            self._refuse_foreign()
        elif not force:
            raise ResourceError(
                f"{self.folder}: is of a run with another model, text or settings, or of another "
                "edgeq: finish that one, remove the folder, or use force to start again"
            )
        self._empty()
        self._replace(run, lambda path: path.write_text(identity, encoding="utf-8"))

    def _refuse_foreign(self) -> None:
        """Only what was stopped at once has no run.json yet."""
        known = {_NEW + _RUN}
        if any(path.name not in known for path in self.folder.iterdir()):
            advice = "move it away, or write to another name"
            raise ResourceError(f"{self.folder}: was not made by a calibration: {advice}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # What fails by itself would fail again; and without progress nothing is worth keeping.
        saved = (self.folder / _PROGRESS).exists()
        if error is not None and (isinstance(error, ModelError) or not saved):
            self.remove()
        os.close(self._fd)

    def save(self, arrays: Arrays) -> None:
        """Replace the progress by these arrays."""
        self._replace(self.folder / _PROGRESS, lambda path: _savez(path, arrays))

    def load(self) -> dict[str, NDArray[Any]]:
        """The arrays of the last `save`, empty when there was none. Raises ResourceError."""
        path = self.folder / _PROGRESS
        return dict(self._read(path)) if path.exists() else {}

    def save_pass(self, number: int, arrays: Arrays) -> None:
        """Keep what a finished pass found."""
        self._replace(self.folder / f"pass-{number}.npz", lambda path: _savez(path, arrays))

    def load_pass(self, number: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """What `save_pass` kept, one array at a time. Raises ResourceError."""
        return self._read(self.folder / f"pass-{number}.npz")

    def remove(self) -> None:
        """The run is finished: nothing of it stays."""
        self._empty()
        with contextlib.suppress(OSError):  # somebody put a file of his own there
            self.folder.rmdir()

    def _empty(self) -> None:
        passes = [path.name for path in self.folder.glob("pass-*.npz")]
        new = [path.name for path in self.folder.glob(_NEW + "*")]
        for name in (*new, *passes, _PROGRESS, MODEL, MODEL + ".part", _RUN):  # whose it is: last
            (self.folder / name).unlink(missing_ok=True)

    def _replace(self, path: Path, write: Any) -> None:
        part = path.with_name(_NEW + path.name)
        with _reported(path):
            try:
                write(part)
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
                os.fsync(self._fd)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _read(self, path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                for name in found.files:
                    yield name, found[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            advice = f"remove {self.folder} and start again"
            raise ResourceError(f"{path}: cannot be read: {advice}") from error


def _savez(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]


@contextlib.contextmanager
def _reported(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error
