"""Threads that walk one program together: a barrier, a walker, and how workers wait for a program.

The words of the shared block that several threads write lie on cache lines of their own.
"""

from types import ModuleType
from typing import Any

from edgeq.kernels.layout import (
    ARRIVED,
    BLOCK,
    CANCEL,
    CPU,
    GENERATION,
    HALT,
    LINE,
    STOP,
    TASK,
    TASK_SHIFT,
    WALK,
    WHERE,
    WORDS_PER_OP,
    YIELD,
)
from edgeq.kernels.words import add_at, call0, call3, load, pause, peek, poke, store

__all__ = ["lead", "serve", "walk"]


def walk(isa: ModuleType) -> Any:
    """kernel(block, thread, threads): run a program's ops in order, with its barriers.

    After CANCEL is set, all threads leave at the same barrier: the last to arrive decides for all.
    HALT is the number of the last task that ended so, and only grows: a thread that looks late,
    when others are in a later task already, still finds that its own is over.

    At a barrier a thread spins, so as not to lose its core to other programs for a whole turn. But
    where it shares a core with another thread of the program, it yields at once.
    """
    hint = pause(isa)

    def kernel(args, thread, threads):
        ops, count, sync, task = load(args, 0), load(args, 1), load(args, 2), load(args, 3)
        for i in range(count):
            op = ops + 8 * WORDS_PER_OP * i
            call3(load(op, 0), load(op, 1), thread, threads)
            if threads > 1 and load(op, 2) != 0:
                generation = peek(sync, GENERATION)
                cpu = call0(load(sync, CPU))
                store(sync, WHERE + LINE * thread, cpu)
                if add_at(sync, ARRIVED, 1) == threads - 1:
                    poke(sync, ARRIVED, 0)
                    if peek(sync, CANCEL) != 0:
                        poke(sync, HALT, task)
                    add_at(sync, GENERATION, 1)
                else:
                    spins = load(args, 4)
                    for t in range(threads):
                        if t != thread and load(sync, WHERE + LINE * t) == cpu:
                            spins = 0
                    while peek(sync, GENERATION) == generation:
                        if spins > 0:
                            spins -= 1
                            hint()
                        else:
                            call0(load(sync, YIELD))
                if peek(sync, HALT) >= task:
                    return
            elif threads == 1 and peek(sync, CANCEL) != 0:
                return

    return kernel


def lead(isa: ModuleType) -> Any:
    """kernel(block, _, threads): make a program the workers' next task and walk it as thread 0.

    One native call, so that no interrupt of the interpreter comes between.
    """

    def kernel(args, thread, threads):
        sync = load(args, 2)
        task = (((peek(sync, TASK) >> TASK_SHIFT) + 1) << TASK_SHIFT) + threads
        store(args, 3, task)
        poke(sync, BLOCK, args)
        poke(sync, TASK, task)
        call3(load(sync, WALK), args, 0, threads)

    return kernel


def serve(isa: ModuleType) -> Any:
    """kernel(own, thread, _): run tasks as they come; return when idle for a while or told to stop.

    own = [sync block, number of the last task seen, spins when idle]. The task number alone says
    whether a task is for this thread. Only then does it look at the block: such a task lasts until
    this thread has walked it, so the block is this task's. Any other task may be over by now, and
    the block freed, or already the next task's, which this thread would then walk twice.
    """
    hint = pause(isa)

    def kernel(args, thread, threads):
        sync = load(args, 0)
        while True:
            seen, spins = load(args, 1), load(args, 2)
            if peek(sync, WHERE) == call0(load(sync, CPU)):
                spins = 0  # the caller's thread needs this core
            while peek(sync, TASK) == seen and spins > 0:
                spins -= 1
                hint()
            task = peek(sync, TASK)
            if task == seen or peek(sync, STOP) != 0:
                return
            store(args, 1, task)
            members = task & ((1 << TASK_SHIFT) - 1)
            if thread < members:
                call3(load(sync, WALK), peek(sync, BLOCK), thread, members)

    return kernel
