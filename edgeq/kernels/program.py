"""A program: the flat list of ops that a model becomes, and the threads that walk it."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from edgeq import cpus
from edgeq.errors import KernelError, ResourceError
from edgeq.kernels import cache, load
from edgeq.kernels.layout import (
    BLOCK_WORDS,
    CANCEL,
    CPU,
    LINE,
    STOP,
    SYNC_WORDS,
    WALK,
    WHERE,
    WORDS_PER_OP,
    YIELD,
)

__all__ = ["Op", "Program", "Team", "aligned", "arguments"]

# Some 0.1 ms, longer than threads differ at a barrier; then yield the core. Yielding at once costs
# dear beside other programs: each time they take a whole turn of milliseconds. Two threads and two
# busy loops on two cores: 2 tokens/s with 100 spins, 6 with 1000, 20 with 10000; 45 alone.
BARRIER_SPINS = 10_000
TEAM_KERNELS = ("walk", "lead", "serve")
STACK = 1 << 20  # bytes for a worker: a kernel's frame is at most a few KiB. Less than a huge page,
# which Linux before 6.7 may put under the first byte that a thread touches of the usual 8 MiB.
IDLE_SPINS = 20_000  # about half a millisecond between two tokens, then sleep


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed uint8[nbytes] that starts on a cache line."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def arguments(names: Sequence[str], **values: int | float) -> np.ndarray:
    """Argument block: one int64 word per name; a float becomes f32 bits.

    >>> arguments(("rows", "eps"), rows=4, eps=1.0).tolist()
    [4, 1065353216]
    """
    if set(names) != set(values):
        raise KernelError(f"argument block: got {sorted(values)}: expected {sorted(names)}")
    words = [values[name] for name in names]
    bits = [int(np.float32(w).view(np.uint32)) if isinstance(w, float) else w for w in words]
    return np.array(bits, np.int64)


@dataclass(frozen=True)
class Op:
    """One kernel call; `barrier`: all threads must have finished it before the next op starts."""

    kernel: str
    args: np.ndarray
    barrier: bool = True
    within: tuple["Op", ...] = ()  # ops whose argument blocks `args` names, and which it replaces
    feeds: tuple[str, ...] = ()  # weights whose input is complete after it, for who watches


class Program:
    """Ops with their kernels' addresses, ready to be walked by `threads` threads of a team."""

    def __init__(
        self, ops: Iterable[Op], addresses: dict[str, int], team: "Team", threads: int
    ) -> None:
        self._ops = list(ops)
        words = [(addresses[op.kernel], op.args.ctypes.data, int(op.barrier)) for op in self._ops]
        if words:
            words[-1] = (*words[-1][:2], 1)  # the caller goes on only when everybody has finished
        self._table = np.array(words, np.int64).reshape(-1, WORDS_PER_OP)
        spins = team.spins(threads)
        block = [self._table.ctypes.data, len(words), team.sync.ctypes.data, 0, spins]
        self._block = np.array(block, np.int64)
        assert len(block) == BLOCK_WORDS
        assert 1 <= threads <= team.threads
        self._team, self._threads = team, threads

    def run(self, *, interruptible: bool = False) -> None:
        """Walk the ops; returns when all threads are done.

        interruptible: a signal ends it at the next op, for programs that run long (Python handles
        signals only when native code has returned).
        """
        if not self._ops:
            return
        run = self._team.run_interruptible if interruptible else self._team.run
        run(self._block.ctypes.data, self._threads)


def _system_calls() -> tuple[int, int]:
    """Addresses of the system's functions that yield a core, and that tell which one it is."""
    if os.name == "nt":
        library = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
        names = ("SwitchToThread", "GetCurrentProcessorNumber")
    else:
        library, names = ctypes.CDLL(None), ("sched_yield", "sched_getcpu")
        if not hasattr(library, names[1]):  # macOS: as if each thread had its own
            names = ("sched_yield", "pthread_self")
    found = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
    yields, cpu = (int(address or 0) for address in found)
    return yields, cpu


def _outlast(done: threading.Event) -> None:
    """Wait for an event that is about to come, whatever else is pressed meanwhile."""
    while not done.is_set():
        with contextlib.suppress(KeyboardInterrupt):
            done.wait()


class Team:
    """`threads` threads: the caller's and threads - 1 workers, which spin between tokens for a
    moment and then sleep. A program for fewer threads leaves the last ones asleep.

    cores: threads that can run at the same time. home(thread): CPUs that a thread stays on, empty
    for any; the caller's thread only while a program runs.
    """

    def __init__(
        self,
        isa: ModuleType,
        threads: int,
        cores: int,
        progress: Callable[[str, int, int], None] | None = None,
        home: Callable[[int], Collection[int]] = lambda thread: (),
    ):
        self.threads, self._cores, self._home = threads, cores, home
        kernels = load(TEAM_KERNELS, isa, progress)
        self._walk, self._lead, self._serve = (cache.callable_at(kernels[k]) for k in TEAM_KERNELS)
        self.sync = aligned(8 * (SYNC_WORDS + LINE * threads)).view(np.int64)
        self.sync[WHERE:] = -1
        self.sync[WALK] = kernels["walk"]
        self.sync[YIELD], self.sync[CPU] = _system_calls()
        self._lock = threading.Lock()
        self._asleep: dict[int, threading.Event] = {}
        self._needed = 0  # threads that a program is about to need or needs: these stay awake
        self._workers = [
            threading.Thread(target=self._work, args=(i,), name=f"edgeq-{i}", daemon=True)
            for i in range(1, threads)
        ]
        before = threading.stack_size(STACK)
        try:
            for worker in self._workers:
                worker.start()
        finally:
            threading.stack_size(before)

    def spins(self, threads: int) -> int:
        """How long threads of a program spin at a barrier before they yield: not at all where there
        are more of them than cores, since they would keep the one they wait for from running.
        """
        return BARRIER_SPINS if threads <= self._cores else 0

    def run(self, block: int, threads: int) -> None:
        """Walk the program at `block` with `threads` threads.

        An exception (Ctrl-C) may come before or after the walk, never between its threads. Raises
        ResourceError after `close`.
        """
        if self.sync[STOP]:
            raise ResourceError("this model is closed: load it again")
        before = cpus.stay_on(self._home(0))
        try:
            if threads == 1:
                self._walk(block, 0, 1)
                return
            with self._lock:
                self._needed = threads
                self._wake(threads)
            self._lead(block, 0, threads)
        finally:
            self._needed = 0
            cpus.stay_on(before)

    def run_interruptible(self, block: int, threads: int) -> None:
        """`run` on a thread of its own, while this one can receive signals."""
        failures: list[BaseException] = []
        begun, done = threading.Lock(), threading.Event()

        def native() -> None:
            if begun.acquire(blocking=False):
                try:
                    self.run(block, threads)
                except BaseException as error:
                    failures.append(error)
                done.set()

        try:
            threading.Thread(target=native, daemon=True).start()
            done.wait()  # not `join`: Python 3.11 and 3.12 take an interrupted one for the end
        except BaseException:
            self.sync[CANCEL] = 1
            if not begun.acquire(blocking=False):  # otherwise it never will begin
                _outlast(done)
            raise
        finally:
            self.sync[CANCEL] = 0
        if failures:
            raise failures[0]

    def _wake(self, threads: int) -> None:
        """Wake those of the first `threads` threads that sleep; the lock is held."""
        for thread in [thread for thread in self._asleep if thread < threads]:
            self._asleep.pop(thread).set()

    def _work(self, thread: int) -> None:
        cpus.stay_on(self._home(thread))
        spins = IDLE_SPINS if thread < self._cores else 0
        own = np.array([self.sync.ctypes.data, 0, spins], np.int64)
        event = threading.Event()
        while not self.sync[STOP]:
            self._serve(own.ctypes.data, thread, 0)
            with self._lock:
                if thread < self._needed or self.sync[STOP]:
                    continue
                event.clear()
                self._asleep[thread] = event
            event.wait()

    def close(self) -> None:
        """Stop the workers."""
        with self._lock:
            self.sync[STOP] = 1
            self._wake(self.threads)
        for worker in self._workers:
            worker.join()
