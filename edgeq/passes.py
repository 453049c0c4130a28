"""Passes over a model's weights: the KV cache, the programs for few and for many tokens, and the
threads that walk them.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from edgeq.cache import KvCache
from edgeq.cpus import Cpus
from edgeq.errors import RequestError
from edgeq.kernels import load as load_kernels
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team
from edgeq.models import rope
from edgeq.models.arch import Arch
from edgeq.models.transformer import FEW, Transformer
from edgeq.models.weights import Weights
from edgeq.tuning import tuned

__all__ = ["BATCH", "OUTPUTS", "Passes"]

BATCH = 512  # prompt tokens per pass
OUTPUTS = 64  # positions per pass when all logits are wanted
Progress = Callable[[str, int, int], None]


class Passes:
    """What stands between a list of ids and logits. `seen`: ids whose keys and values are cached.

    ctx: positions that may be used. threads: (for few tokens, for many). on_compile: see
    `edgeq.load`.
    """

    def __init__(
        self,
        arch: Arch,
        weights: Weights,
        kv: KvCache,
        isa: ModuleType,
        *,
        ctx: int,
        threads: tuple[int, int],
        machine: Cpus,
        on_compile: Progress | None,
    ) -> None:
        self.batch = min(BATCH, kv.context)
        self.outputs = min(OUTPUTS, self.batch)
        self.seen: list[int] = []
        self._ctx, self._threads = ctx, threads
        self._frequencies = rope.frequencies(arch.rope, weights.rope_freqs)
        self._magnitude = rope.magnitude(arch.rope)
        self.net = Transformer(
            arch,
            weights,
            kv,
            isa,
            threads=max(threads),
            decoders=threads[0],
            batch=self.batch,
            outputs=self.outputs,
            tuning=tuned(isa, threads[0], machine.usable, on_compile),
        )
        self._start(isa, machine, on_compile)

    def _start(self, isa: ModuleType, machine: Cpus, on_compile: Progress | None) -> None:
        """Compile or load kernels, start threads, assemble the programs."""
        net = self.net
        few, many = net.body(many=False), net.body(many=True)
        few_head, many_head = net.head(many=False), net.head(many=True)
        names = [op.kernel for op in (*few, *many, *few_head, *many_head)]
        self._kernels = load_kernels([*names, *TEAM_KERNELS], isa, on_compile)
        self._team = Team(isa, max(self._threads), machine.usable, home=machine.home)
        program = self._program
        # (many tokens?, logits of: none, few, many positions)
        self._programs = {
            (False, "few"): program(few + few_head),
            (False, "none"): program(few),
            (True, "none"): program(many, many=True),
            (True, "few"): program(many + few_head, many=True),
            (True, "many"): program(many + many_head, many=True),
            (True, "head"): program(many_head, many=True),
        }

    def _program(self, ops: list[Op], *, many: bool = False) -> Program:
        return Program(ops, self._kernels, self._team, self._threads[many])

    def evaluate(self, ids: Sequence[int], outputs: int) -> NDArray[np.float32]:
        """Append one batch to the cache; view of the logits of its last `outputs` tokens.

        Raises RequestError when the context is full.
        """
        many = len(ids) > FEW
        self._place(ids, outputs)
        kind = "none" if not outputs else "few" if outputs <= FEW else "many"
        self._programs[many, kind].run(interruptible=many)
        self.seen.extend(ids)
        return self.net.logits[:outputs]

    def _place(self, ids: Sequence[int], outputs: int) -> None:
        """Say to the next program which tokens it is about, after those of the cache."""
        net, n, first = self.net, len(ids), len(self.seen)
        self.check_room(n)
        net.ids[:n] = ids
        net.cos[:n], net.sin[:n] = rope.tables(self._frequencies, self._magnitude, first, n)
        net.state[:] = n, first
        net.out_state[0] = outputs
        net.start()

    def head(self, start: int, stop: int) -> NDArray[np.float32]:
        """View of the logits of tokens start..stop of the last batch, whose states are kept."""
        net = self.net
        net.state[0], net.out_state[0] = stop, stop - start
        net.start()
        self._programs[True, "head"].run(interruptible=True)
        return net.logits[: stop - start]

    def inputs(
        self, ids: Sequence[int], wanted: Collection[str] | None
    ) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
        """Append ids to the cache, piece by piece: see `Model.inputs`."""
        watched = self.net.watched(wanted)
        pieces = [(self._program(ops, many=True), names, x) for ops, names, x in watched]
        for first in range(0, len(ids), self.batch):
            part = ids[first : first + self.batch]
            self._place(part, 0)
            for program, names, x in pieces:
                program.run()
                yield names, x[: len(part)]
            self.seen.extend(part)

    def check_room(self, count: int) -> None:
        """Refuse more tokens than the context holds: kernels do not check positions, they would
        write past the cache.
        """
        total = len(self.seen) + count
        if total > self._ctx:
            raise RequestError(f"{total} tokens: the context holds {self._ctx}")

    def close(self) -> None:
        """Stop the worker threads."""
        self._team.close()
