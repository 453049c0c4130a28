"""Programs for some threads of a team: who walks them, who sleeps, and threads that come late."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

import kernelkit as kit
import numpy as np
import pytest

from edgeq.kernels import cache as kernel_cache
from edgeq.kernels import isa as isas
from edgeq.kernels import layout, load
from edgeq.kernels.llvm import I64, Emit, Value
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team, aligned

ISA = isas.choose(kit.BEST)
WAIT = 300 if "QEMU_CPU" in os.environ else 30  # seconds until a hang is a failure


def spend(e: Emit, args: Value, thread: Value, threads: Value) -> None:
    """args: [calls, loops]: count the call, then take some time."""
    e.b.atomic_rmw("add", e.pointer(args), I64(1), "monotonic")

    def step(i: Value, state: list[Value]) -> list[Value]:
        e.b.atomic_rmw("add", e.pointer(args), I64(0), "monotonic")
        return state

    e.loop(e.load(I64, e.pointer(args), 8), [], step)


@cache
def compiled() -> Callable[..., None]:
    return kit.native(spend, "iii", ISA)


def address() -> int:
    return int(compiled().address)  # type: ignore[attr-defined]


class Counted:
    """A program of `length` ops for `threads` threads, which counts its calls."""

    def __init__(self, team: Team, threads: int, length: int, loops: int = 0) -> None:
        self.blocks = [np.array([0, loops], np.int64) for _ in range(length)]
        ops = [Op("spend", block) for block in self.blocks]
        self.program = Program(ops, {"spend": address()}, team, threads)
        self.threads, self.runs = threads, 0

    def run(self) -> None:
        self.runs += 1
        self.program.run()

    def check(self) -> None:
        assert {int(block[0]) for block in self.blocks} == {self.threads * self.runs}


@pytest.fixture
def team() -> Iterator[Callable[..., Team]]:
    made: list[Team] = []

    def make(threads: int, cores: int = 2, **more: object) -> Team:
        made.append(Team(ISA, threads, cores, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        in_time(each.close)


def in_time(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive(), f"hangs for {WAIT} s"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("threads", [3, 5])
def test_programs_for_some_of_the_threads(team: Callable[..., Team], threads: int) -> None:
    """Whatever their order, each is walked once by each of its threads, and by no others."""
    group = team(threads)
    programs = [Counted(group, n, 3) for n in range(1, threads + 1)]

    def rounds() -> None:
        for i in range(600):
            programs[i * i % 7 % threads].run()
            programs[i % threads].run()

    in_time(rounds)
    for each in programs:
        each.check()


def kernels() -> dict[str, Callable[[int, int, int], None]]:
    return {k: kernel_cache.callable_at(v) for k, v in load(TEAM_KERNELS, ISA).items()}


def of_three(team: Callable[..., Team]) -> Team:
    """A team with room for three threads, of which only the caller's is there."""
    group = team(1)
    group.threads, few = 3, group.sync
    group.sync = aligned(8 * (layout.SYNC_WORDS + 3 * layout.LINE)).view(np.int64)
    group.sync[layout.WHERE :] = -1
    group.sync[: len(few)] = few
    return group


def test_who_is_not_called_does_not_look_at_the_block(team: Callable[..., Team]) -> None:
    """The moment between two tasks: the next one's block is there, the number still the last's."""
    group = of_three(team)  # nobody else is there: this test is thread 2
    coming = Counted(group, 3, 1)
    sync = group.sync
    sync[layout.BLOCK] = coming.program._block.ctypes.data
    sync[layout.TASK] = (5 << layout.TASK_SHIFT) + 2  # for threads 0 and 1
    own = np.array([sync.ctypes.data, 4 << layout.TASK_SHIFT, 0], np.int64)
    in_time(lambda: kernels()["serve"](own.ctypes.data, 2, 0))
    assert own[1] == sync[layout.TASK]
    assert not coming.blocks[0].any()
    sync[layout.TASK] = (6 << layout.TASK_SHIFT) + 3
    sync[layout.ARRIVED] = 2  # the others are at the barrier already
    in_time(lambda: kernels()["serve"](own.ctypes.data, 2, 0))
    assert coming.blocks[0][0] == 1


@pytest.mark.parametrize("cancelled", [True, False])
def test_who_leaves_a_barrier_late_knows_whether_its_task_is_over(
    team: Callable[..., Team], cancelled: bool
) -> None:
    """Others may have passed barriers of later tasks before it looks."""
    group = of_three(team)
    chain = Counted(group, 3, 2)
    sync, block = group.sync, chain.program._block
    task = block[3] = (7 << layout.TASK_SHIFT) + 3
    walk = kernels()["walk"]
    late = threading.Thread(target=walk, args=(block.ctypes.data, 2, 3), daemon=True)
    late.start()
    until(lambda: sync[layout.ARRIVED] == 1)
    sync[layout.HALT] = task if cancelled else task - 1
    sync[layout.ARRIVED] = 0
    sync[layout.GENERATION] += 5
    if not cancelled:  # it goes on to the second op, and waits there
        until(lambda: sync[layout.ARRIVED] == 1)
        sync[layout.GENERATION] += 1
    late.join(WAIT)
    assert not late.is_alive()
    assert [block[0] for block in chain.blocks] == [1, 0 if cancelled else 1]


def test_threads_that_are_not_needed_sleep(team: Callable[..., Team]) -> None:
    """While a long program runs on the others, and through many short ones."""
    group = team(4, 4)
    all_of_them = Counted(group, 4, 1)
    all_of_them.run()
    long = Counted(group, 2, 10_000, 100_000)  # ends when cancelled
    runner = threading.Thread(target=long.run, daemon=True)
    runner.start()
    until(lambda: {2, 3} <= set(group._asleep))
    assert runner.is_alive()
    group.sync[layout.CANCEL] = 1
    runner.join(WAIT)
    group.sync[layout.CANCEL] = 0
    short = Counted(group, 2, 1)
    for _ in range(100):
        short.run()
        assert {2, 3} <= set(group._asleep)
    all_of_them.run()
    for each in (short, all_of_them):
        each.check()


def test_spinning_is_for_programs_that_have_the_cores(team: Callable[..., Team]) -> None:
    group = team(3, 2)
    assert group.spins(2) > 0
    assert group.spins(3) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_stay_at_home_and_the_callers_comes_back(team: Callable[..., Team]) -> None:
    before = os.sched_getaffinity(0)
    home = {min(before)}
    group = team(3, home=lambda thread: home if thread < 2 else ())
    places = [os.sched_getaffinity(worker.native_id or 0) for worker in group._workers]
    until(lambda: os.sched_getaffinity(group._workers[0].native_id or 0) == home)
    assert places[1] == before
    long, during = Counted(group, 2, 200, 20_000), []
    caller = threading.get_native_id()

    def watch() -> None:
        while not done.is_set():
            during.append(os.sched_getaffinity(caller))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    long.run()
    after = os.sched_getaffinity(0)
    done.set()
    watcher.join()
    assert after == before
    assert (home in during) or before == home


def test_a_program_needs_no_more_threads_than_there_are(team: Callable[..., Team]) -> None:
    with pytest.raises(AssertionError):
        Program([], {}, team(1), 2)
