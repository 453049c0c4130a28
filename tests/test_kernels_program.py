"""Programs and teams: barriers, sleeping workers, ends of teams, sums over threads."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

import kernelkit as kit
import numpy as np
import pytest

from edgeq.errors import KernelError, ResourceError
from edgeq.kernels import isa as isas
from edgeq.kernels.llvm import F32, I64, Emit, Value
from edgeq.kernels.program import Op, Program, Team, aligned, arguments

ISA = isas.choose(kit.BEST)
CORES = 2
WAIT = 30  # seconds; a team that hangs fails the test instead of the whole run


def add_atomic(e: Emit, address: Value, value: int) -> None:
    e.b.atomic_rmw("add", e.pointer(address), I64(value), "monotonic")


def count(e: Emit, args: Value, thread: Value, threads: Value) -> None:
    """args: [own counter, counter of the op before, expected there, early starts]."""
    own, before, expected, early = (e.load(I64, e.pointer(args), 8 * k) for k in range(4))
    there = e.load(I64, e.pointer(before))
    late = e.b.select(e.b.icmp_signed("<", there, expected), I64(1), I64(0))
    e.b.atomic_rmw("add", e.pointer(early), late, "monotonic")
    add_atomic(e, own, 1)


def partial_sum(e: Emit, args: Value, thread: Value, threads: Value) -> None:
    """args: [x, n, partial]: partial[thread] = sum of this thread's share of x."""
    x, n, partial = (e.load(I64, e.pointer(args), 8 * k) for k in range(3))
    ends = [e.b.udiv(e.b.mul(n, t), threads) for t in (thread, e.b.add(thread, I64(1)))]

    def step(i: Value, sums: list[Value]) -> list[Value]:
        offset = e.b.mul(e.b.add(ends[0], i), I64(4))
        return [e.b.fadd(sums[0], e.load(F32, e.pointer(x), offset))]

    total = e.loop(e.b.sub(ends[1], ends[0]), [F32(0.0)], step)[0]
    e.store(total, e.pointer(partial), e.b.mul(thread, I64(4)))


def total_sum(e: Emit, args: Value, thread: Value, threads: Value) -> None:
    """args: [partial, out]: every thread sums all partial sums into its own out."""
    partial, out = (e.load(I64, e.pointer(args), 8 * k) for k in range(2))

    def step(i: Value, sums: list[Value]) -> list[Value]:
        part = e.load(F32, e.pointer(partial), e.b.mul(i, I64(4)))
        return [e.b.fadd(sums[0], part)]

    total = e.loop(threads, [F32(0.0)], step)[0]
    e.store(total, e.pointer(out), e.b.mul(thread, I64(4)))


@cache
def compiled() -> dict[str, Callable[..., None]]:
    return {f.__name__: kit.native(f, "iii", ISA) for f in (count, partial_sum, total_sum)}


@pytest.fixture
def addresses() -> dict[str, int]:
    return {name: kernel.address for name, kernel in compiled().items()}  # type: ignore[attr-defined]


@pytest.fixture
def team() -> Iterator[Callable[..., Team]]:
    """Maker of teams; they are closed after the test."""
    made: list[Team] = []

    def make(threads: int, cores: int = CORES) -> Team:
        made.append(Team(ISA, threads, cores))
        return made[-1]

    yield make
    for each in made:
        in_time(each.close)


def in_time(action: Callable[[], object]) -> None:
    """Run an action on a thread of its own and fail when it does not end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive(), f"hangs for {WAIT} s"
    if failed:
        raise failed[0]


class Chain:
    """`length` ops, each of which counts its calls and how often it started too early."""

    def __init__(
        self,
        addresses: dict[str, int],
        team: Team,
        length: int,
        threads: int,
        gap: int = 1,
    ) -> None:
        """A barrier follows every `gap`-th op; an op looks at the last one before a barrier."""
        self.counters, self.early = np.zeros(length + 1, np.int64), np.zeros(1, np.int64)
        self.threads, self.runs = threads, 0
        self.blocks = [np.zeros(4, np.int64) for _ in range(length)]
        self.ops = [
            Op("count", block, barrier=i % gap == gap - 1) for i, block in enumerate(self.blocks)
        ]
        slot = self.counters.ctypes.data
        for i, block in enumerate(self.blocks):
            closed = i // gap * gap  # counters[0] belongs to no op
            block[:] = slot + 8 * (i + 1), slot + 8 * closed, 0, self.early.ctypes.data
        self.gap = gap
        self.program = Program(self.ops, addresses, team, threads)

    def run(self) -> None:
        self.runs += 1
        for block in self.blocks[self.gap :]:
            block[2] = self.runs * self.threads
        self.program.run()

    def check(self) -> None:
        assert self.early[0] == 0
        assert (self.counters[1:] == self.runs * self.threads).all()


@pytest.mark.parametrize(("threads", "cores"), [(1, 2), (2, 2), (3, 2), (5, 2), (3, 4), (2, 1)])
def test_barriers_hold(
    addresses: dict[str, int], team: Callable[..., Team], threads: int, cores: int
) -> None:
    """Thousands of tiny ops; more threads than cores, said so (cores = 2) or not (4)."""
    length = 3000 if threads <= CORES else 500
    chain = Chain(addresses, team(threads, cores), length, threads)

    def rounds() -> None:
        for _ in range(3):
            chain.run()

    in_time(rounds)
    chain.check()


@pytest.mark.parametrize("threads", [2, 3])
def test_ops_without_barrier(
    addresses: dict[str, int], team: Callable[..., Team], threads: int
) -> None:
    """Threads run ahead between barriers, but not over one, and the last op always has one."""
    for gap in (2, 3, 7, 50):
        chain = Chain(addresses, team(threads), 40, threads, gap)
        for _ in range(20):
            in_time(chain.run)
            chain.check()


def test_a_check_that_can_fail(addresses: dict[str, int], team: Callable[..., Team]) -> None:
    """The counters see an op that starts before the one it looks at is done."""
    chain = Chain(addresses, team(1), 3, 1)
    chain.blocks[0][2] = 1  # expects one more than there will ever be
    chain.run()
    assert chain.early[0] == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_workers_sleep_and_wake(
    addresses: dict[str, int], team: Callable[..., Team], threads: int
) -> None:
    """After a pause of any length the team works; while it waits longer it uses no CPU."""
    chain = Chain(addresses, team(threads), 5, threads)
    pauses = [0, 1e-5, 2e-4, 1e-3, 3e-3, 0.02, 0.05] * 4
    for pause in pauses:
        time.sleep(pause)
        in_time(chain.run)
    chain.check()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("edgeq-")]


@pytest.mark.parametrize("idle", [0, 0.02], ids=["busy", "asleep"])
def test_close_ends_the_workers(addresses: dict[str, int], idle: float) -> None:
    before = set(workers())
    for threads in (1, 2, 5):
        team = Team(ISA, threads, CORES)
        assert len(set(workers()) - before) == threads - 1
        in_time(Chain(addresses, team, 3, threads).run)
        time.sleep(idle)
        in_time(team.close)
        assert set(workers()) == before


def test_a_team_that_never_ran_closes() -> None:
    before = set(workers())
    team = Team(ISA, 3, CORES)
    in_time(team.close)
    assert set(workers()) == before


def test_many_teams(addresses: dict[str, int]) -> None:
    """One after the other, each with two programs; nothing is left over."""
    before = set(workers())

    def each() -> None:
        for i in range(40):
            team = Team(ISA, 1 + i % 3, CORES)
            chains = [Chain(addresses, team, n, team.threads) for n in (3, 11)]
            for _ in range(5):
                for chain in chains:
                    chain.run()
            team.close()
            for chain in chains:
                chain.check()

    in_time(each)
    assert set(workers()) == before


def test_two_teams_at_once(addresses: dict[str, int], team: Callable[..., Team]) -> None:
    chains = [Chain(addresses, team(2), 200, 2) for _ in range(2)]
    callers = [threading.Thread(target=lambda c=c: in_time(c.run)) for c in chains]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT)
    for chain in chains:
        chain.check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_sum_of_partial_sums(
    addresses: dict[str, int],
    team: Callable[..., Team],
    threads: int,
    rng: np.random.Generator,
) -> None:
    """What threads wrote before a barrier, all of them read after it, every time."""
    x, partial, out = (np.zeros(n, np.float32) for n in (1000, threads, threads))
    first = arguments(("x", "n", "partial"), x=x.ctypes.data, n=len(x), partial=partial.ctypes.data)
    second = arguments(("partial", "out"), partial=partial.ctypes.data, out=out.ctypes.data)
    program = Program(
        [Op("partial_sum", first), Op("total_sum", second)], addresses, team(threads), threads
    )
    for _ in range(200):
        x[:] = rng.integers(-1000, 1000, len(x))
        in_time(program.run)
        assert (out == x.sum()).all()


def test_a_closed_team_refuses(addresses: dict[str, int]) -> None:
    for threads in (1, 2):
        team = Team(ISA, threads, CORES)
        chain = Chain(addresses, team, 3, threads)
        team.close()
        with pytest.raises(ResourceError, match="closed"):
            in_time(chain.run)
        assert not chain.counters.any()


@pytest.mark.skipif(os.name != "posix", reason="Windows' locks do not wake up for Ctrl-C")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ctrl_c_ends_a_long_program(
    addresses: dict[str, int], team: Callable[..., Team], threads: int
) -> None:
    """At the next op, on all threads; the next program runs as if nothing had been."""
    group = team(threads)
    x, partial = np.zeros(1_000_000, np.float32), np.zeros(threads, np.float32)
    places = {"x": x.ctypes.data, "n": len(x), "partial": partial.ctypes.data}
    ops = [Op("partial_sum", arguments(tuple(places), **places))] * 5000  # some seconds
    long, chain = Program(ops, addresses, group, threads), Chain(addresses, group, 50, threads)
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        long.run(interruptible=True)
    assert time.monotonic() - start < 2
    timer.join()
    for _ in range(20):
        in_time(chain.run)
        chain.check()


# -- the small parts -------------------------------------------------------------------------------
def test_aligned() -> None:
    for nbytes in (1, 63, 64, 1000):
        array = aligned(nbytes)
        assert array.shape == (nbytes,)
        assert array.ctypes.data % 64 == 0
        assert not array.any()


def test_arguments_must_be_complete() -> None:
    assert arguments(("a", "b"), b=-1, a=2).tolist() == [2, -1]
    for given in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(KernelError, match=r"expected \['a', 'b'\]"):
            arguments(("a", "b"), **given)


def test_an_empty_program_ends(team: Callable[..., Team]) -> None:
    in_time(Program([], {}, team(1), 1).run)
