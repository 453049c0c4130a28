"""The work of a calibration: chunks of a text through a model, in one pass or several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.sums import Group, Outer, Sums, passes
from edgeq.checks import whole
from edgeq.engine import Model
from edgeq.evaluate import tokens, windows
from edgeq.imatrix import Imatrix

__all__ = ["Progress", "Settings", "Work", "collect"]

# (chunks done, chunks to do, in all passes)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to collect.

    ctx: tokens per chunk, by default 512 or what the model was trained on. chunks: how many at
    most. process_output: also the output matrix. parse_special: control tokens in the text count as
    such. hessians: also those.
    """

    ctx: int | None = None
    chunks: int | None = None
    process_output: bool = False
    parse_special: bool = False
    hessians: bool = False


def collect(
    model: Model, text: str, settings: Settings | None = None, *, progress: Progress | None = None
) -> Imatrix:
    """Importance matrix of an open model from a text, without Hessians.

    Raises RequestError when the text is shorter than two windows, ModelError naming the weight when
    an input is not finite.

    >>> import edgeq
    >>> path = edgeq.convert("examples/tiny-home", "calibrated.gguf", "Q8_0")
    >>> with edgeq.load(path, ctx=32) as model:
    ...     found = collect(model, "The device is on. " * 20, Settings(ctx=32))
    >>> found.chunk_count, found.sums["blk.0.attn_q.weight"].shape
    (3, (1, 256))
    """
    work = Work(model, text, settings or Settings(), budget=0)
    for _ in work.steps():
        if progress is not None:
            progress(work.done, work.total)
    return work.sums.imatrix((), len(work.chunks), work.ctx)


class Work:
    """A calibration under way; its arrays can be saved between two steps, and loaded again."""

    def __init__(self, model: Model, text: str, settings: Settings, budget: int) -> None:
        self.model, self.sums, self.outer = model, Sums(), Outer([])
        self.budget = budget
        self.ctx = _context(settings.ctx, model)
        self.chunks = _chunks(model, text, self.ctx, settings)
        # One token shows which weights share an input, and how wide it is.
        seen = [(names, x.shape[1]) for names, x in model.inputs([0])]
        self.groups = [g for g in seen if settings.process_output or g[0][0].startswith("blk.")]
        self.passes = passes(self.groups, budget) if settings.hessians else [[]]
        self.at, self.chunk = 0, 0  # pass and chunk that come next

    @property
    def done(self) -> int:
        return self.at * len(self.chunks) + self.chunk

    @property
    def total(self) -> int:
        return len(self.passes) * len(self.chunks)

    def steps(self) -> Iterator[bool]:
        """Read a chunk per step; true after the last one of a pass."""
        while self.at < len(self.passes):
            groups = self.passes[self.at]
            if self.chunk == 0:
                self.outer = Outer(groups)
            self._read(groups)
            self.chunk += 1
            last = self.chunk == len(self.chunks)
            if last:
                self.at, self.chunk = self.at + 1, 0
            yield last

    def _read(self, groups: Sequence[Group]) -> None:
        first = self.at == 0
        wanted = {name for names, _ in (self.groups if first else groups) for name in names}
        for names, x in self.model.inputs(self.chunks[self.chunk], wanted):
            if first:
                self.sums.add(names, x)
            self.outer.add(names, x)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that a later run needs to go on."""
        return {
            "at": np.array([self.at, self.chunk]),
            "budget": np.array(self.budget),
            **{f"sums/{name}": values for name, values in self.sums.sums.items()},
            **{f"counts/{name}": values for name, values in self.sums.counts.items()},
            **{f"outer/{name}": values for name, values in self.outer.sums.items() if self.chunk},
        }

    def resume(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Go on where `arrays` was called."""
        if not arrays:
            return
        self.at, self.chunk = (int(value) for value in arrays["at"])
        self.sums.sums, self.sums.counts, self.outer.sums = (
            {name[len(kind) :]: a for name, a in arrays.items() if name.startswith(kind)}
            for kind in ("sums/", "counts/", "outer/")
        )


def _context(wanted: int | None, model: Model) -> int:
    return model.ctx if wanted is None else whole("ctx", wanted, 8, model.ctx)


def _chunks(model: Model, text: str, ctx: int, settings: Settings) -> list[list[int]]:
    ids, bos = tokens(model, text, ctx, special=settings.parse_special)
    return [window for window, _ in windows(ids, ctx, bos)][: settings.chunks]
