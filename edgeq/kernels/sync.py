"""Threads that walk one program together: a barrier, a walker, and how workers wait for a program.

The words of the shared block that several threads write lie on cache lines of their own.
"""

from types import ModuleType
from typing import Any

from edgeq.kernels.layout import (
    ARRIVED,
    BLOCK,
    CANCEL,
    GENERATION,
    HALT,
    IDLE_SPIN,
    SPIN,
    STOP,
    TASK,
    WALK,
    WORDS_PER_OP,
    YIELD,
)
from edgeq.kernels.words import add_at, call0, call3, load, pause, peek, poke, store

__all__ = ["lead", "serve", "walk"]


def walk(isa: ModuleType) -> Any:
    """kernel(block, thread, threads): run a program's ops in order, with its barriers.

    After CANCEL is set, all threads leave at the same barrier: the last to arrive decides for all.
    """
    hint = pause(isa)

    def kernel(args, thread, threads):
        ops, count, sync = load(args, 0), load(args, 1), load(args, 2)
        for i in range(count):
            op = ops + 8 * WORDS_PER_OP * i
            call3(load(op, 0), load(op, 1), thread, threads)
            if threads > 1 and load(op, 2) != 0:
                generation = peek(sync, GENERATION)
                if add_at(sync, ARRIVED, 1) == threads - 1:
                    poke(sync, ARRIVED, 0)
                    poke(sync, HALT, peek(sync, CANCEL))
                    add_at(sync, GENERATION, 1)
                else:
                    spins = load(sync, SPIN)
                    while peek(sync, GENERATION) == generation:
                        if spins > 0:
                            spins -= 1
                            hint()
                        else:
                            call0(load(sync, YIELD))
                if peek(sync, HALT) != 0:
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
        poke(sync, BLOCK, args)
        add_at(sync, TASK, 1)
        call3(load(sync, WALK), args, 0, threads)

    return kernel


def serve(isa: ModuleType) -> Any:
    """kernel(own, thread, _): run tasks as they come; return when idle for a while or told to stop.

    own = [sync block, number of the last task seen].
    """
    hint = pause(isa)

    def kernel(args, thread, threads):
        sync = load(args, 0)
        while True:
            spins, seen = load(sync, IDLE_SPIN), load(args, 1)
            while peek(sync, TASK) == seen and spins > 0:
                spins -= 1
                hint()
            task = peek(sync, TASK)
            if task == seen or peek(sync, STOP) != 0:
                return
            store(args, 1, task)
            block = peek(sync, BLOCK)
            if thread < load(block, 3):
                call3(load(sync, WALK), block, thread, load(block, 3))

    return kernel
