"""A file that appears under its name only when it is complete.

The bytes go to NAME.part, allocated in full before the first is written, so a full disk shows at
once. Then: fsync, rename, fsync of the folder. Whatever stops the work before the rename leaves the
name as it was. Browsers keep their downloads under such names too: a file is ours when it begins
with MARK, which the owner overwrites last, or ends with a journal: then the work can go on after
the process was killed.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from edgeq.checks import replaceable
from edgeq.errors import ResourceError
from edgeq.gguf.journal import Checksum, Journal, identity_of
from edgeq.text import printable

__all__ = ["MARK", "PartFile"]

MARK = b"\0eq\n"  # the first bytes of an unfinished file; of no known kind of file

_MARGIN = 64 << 20  # bytes, at most, that stay free on the disk beyond the file's own
_PIECE = 16 << 20  # bytes per system call, so that Ctrl-C is seen in time
_SYNC_EVERY = 64 << 20  # bytes that go to the disk in the background while others are written


class PartFile:
    """NAME.part of `size` bytes, open for writing at any place.

    `commit`, `abort`, or with a journal `suspend` ends it. It begins with MARK: write the first
    bytes last. Raises ResourceError when `path` exists (unless `force`), the disk lacks the space,
    another process is writing the same file, NAME.part is somebody else's, or it is a file of ours
    with another identity (unless `force`). `header`: first bytes of the complete file.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        force: bool = False,
        journal: Journal | None = None,
        header: bytes = b"",
    ) -> None:
        self.path = path
        self.journal = journal
        self.resumed = False  # whether the file has parts of an earlier run
        self._header = header
        self.part = path.with_name(path.name + ".part")
        self.size = size
        self.force = force
        self._unsynced = 0
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="edgeq-sync")  # starts when needed
        self._syncing: Future[None] | None = None
        self._sync_lock = Lock()
        replaceable(path, force=force)
        self._fd = self._open()
        try:
            self._reserve()
        except BaseException:
            self.give_up()
            raise

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (bytes) at `offset`. Safe to call from several threads."""
        with _reported(self.part):
            for start in range(0, len(data), _PIECE):
                _write_all(self._fd, data[start : start + _PIECE], offset + start)
            self._count(len(data))

    def pread(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, as the file holds them."""
        with _reported(self.part):
            return os.pread(self._fd, size, offset)

    def finish(self, i: int, total: Checksum, memo: bytes) -> None:
        """Note in the journal that part `i` is written; total: of its bytes."""
        assert self.journal
        record = self.journal.record(total, memo)
        self.pwrite(self.size + self.journal.place(i), memoryview(record))

    def recall(self, i: int, offset: int, size: int) -> bytes | None:
        """Memo of part `i` at `offset` if an earlier run finished it and its bytes are all here."""
        if not self.resumed or not self.journal:
            return None
        place = self.size + self.journal.place(i)
        found = self.journal.parse(self.pread(place, self.journal.record_bytes))
        if found is None:
            return None
        total = Checksum()
        for start in range(0, size, _PIECE):
            total.add(memoryview(self.pread(offset + start, min(_PIECE, size - start))))
        return found[1] if total.value(found[1]) == found[0] else None

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with _reported(self.part):
            with self._sync_lock:
                self._wait_for_sync()
            os.fsync(self._fd)

    def commit(self) -> None:
        """Check the size, give the file its name and make both durable."""
        if self.journal:
            with _reported(self.part):
                os.ftruncate(self._fd, self.size)
        self.sync()
        found = os.fstat(self._fd).st_size
        if found != self.size:
            raise ResourceError(f"{self.part}: has {found} bytes: expected {self.size}")
        replaceable(self.path, force=self.force)
        with _reported(self.path):
            os.replace(self.part, self.path)
            self._close()
            _sync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove NAME.part, unless it has been committed."""
        if self._fd < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.part)
        self._close()

    def _count(self, written: int) -> None:
        """Start a flush in the background after so many bytes; one at a time."""
        with self._sync_lock:
            self._unsynced += written
            if self._unsynced >= _SYNC_EVERY:
                self._unsynced = 0
                self._wait_for_sync()
                flush = getattr(os, "fdatasync", os.fsync)  # macOS has fsync only
                self._syncing = self._syncer.submit(flush, self._fd)

    def _wait_for_sync(self) -> None:
        """Until the last flush in the background is done. Raises its OSError."""
        done, self._syncing = self._syncing, None
        if done is not None:
            done.result()

    def _close(self) -> None:
        self._syncer.shutdown()
        fd, self._fd = self._fd, -1
        os.close(fd)

    def suspend(self) -> None:
        """Leave NAME.part for a later run."""
        self._close()

    def give_up(self) -> None:
        """Before any work: leave what an earlier run has left, and nothing else."""
        if self.resumed:
            self.suspend()
        else:
            self.abort()

    def _open(self) -> int:
        with _reported(self.part):
            fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self._lock(fd)
            self._look(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lock(self, fd: int) -> None:
        """Own the file, or leave it alone: another process may be writing or just renaming it."""
        busy = ResourceError(f"{self.part}: another process is writing it: wait, or end that one")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:  # some network file systems have no locks: go on without
            pass
        try:
            named = os.stat(self.part, follow_symlinks=False)
        except FileNotFoundError as error:
            raise busy from error
        if not os.path.samestat(os.fstat(fd), named) or not stat.S_ISREG(named.st_mode):
            raise busy

    def _look(self, fd: int) -> None:
        """What an earlier run of ours left is continued or may go; something else must not."""
        with _reported(self.part):
            size, identity = os.fstat(fd).st_size, identity_of(fd)
            # Killed between the last write and the rename, a file has neither mark nor journal.
            whole = size == self.size and os.pread(fd, len(self._header), 0) == self._header
            ours = size == 0 or os.pread(fd, len(MARK), 0) == MARK or identity is not None
        if not ours and not (whole and self._header):
            self._refuse_foreign()
        if identity is None or self.journal is None:
            return
        if identity == self.journal.identity:
            self.resumed = size == self.size + self.journal.size
        elif not self.force:
            self._refuse_other(identity, self.journal.identity)

    def _refuse_other(self, theirs: dict[str, str], mine: dict[str, str]) -> None:
        keys = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        what = ", ".join(
            f"{printable(key)} {printable(theirs.get(key, 'none'), 80)} (now {mine.get(key)})"
            for key in keys[:3]
        )
        raise ResourceError(
            f"{self.part}: unfinished file of another conversion: {what}: finish that one, remove "
            "the file, or use force to start anew"
        )

    def _refuse_foreign(self) -> None:
        advice = "remove it, move it away, or write to another name"
        raise ResourceError(f"{self.part}: exists and was not made by edgeq: {advice}")

    def _reserve(self) -> None:
        if self.resumed:
            self.pwrite(0, memoryview(MARK))  # it may have been complete already
            return
        with _reported(self.part):
            os.ftruncate(self._fd, 0)  # what an earlier run left counts as free space
        free = shutil.disk_usage(self.path.parent).free
        total = self.size + (self.journal.size if self.journal else 0)
        needed = total + min(total // 20, _MARGIN)
        if free < needed:
            raise self._no_space(needed, free)
        with _reported(self.part):
            _write_all(self._fd, memoryview(MARK), 0)
            os.fsync(self._fd)  # after a power cut it must still be known as ours
        try:
            _allocate(self._fd, total)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space(total, free) from error
            raise _explained(self.part, error) from error
        if self.journal:
            self.pwrite(self.size, memoryview(self.journal.blank()))

    def _no_space(self, needed: int, free: int) -> ResourceError:
        advice = "free some space or write to another disk"
        return ResourceError(f"{self.path}: needs {needed} bytes, {free} are free: {advice}")


def _allocate(fd: int, size: int) -> None:
    """Claim the disk space of a file; file systems that cannot get the length only."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):
            raise
        os.ftruncate(fd, size)
    except AttributeError:  # macOS
        os.ftruncate(fd, size)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # FAT and some network file systems cannot
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: OSError) -> ResourceError:
    advice = {
        errno.ENOENT: ": create the folder first",
        errno.ENOSPC: ": free some space or write to another disk",
        errno.EFBIG: ": the file system or a limit of this session forbids files of this size",
        errno.EIO: ": the disk or card may be failing; do not trust it",
    }.get(error.errno or 0, "")
    return ResourceError(f"{path}: cannot be written: {error.strerror}{advice}")
