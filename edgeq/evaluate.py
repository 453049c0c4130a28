"""How good a model is: perplexity as llama-perplexity defines it, and distance from a reference."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.checks import whole
from edgeq.divergence import Divergence, Scores, likelihood, pair
from edgeq.errors import ModelError, RequestError
from edgeq.estimate import Estimate, mean

if TYPE_CHECKING:
    from edgeq.engine import Model

__all__ = ["CONTEXT", "Evaluation", "evaluate", "evaluate_all", "perplexity", "tokens", "windows"]

CONTEXT = 512  # tokens per window, where the model allows so many
Progress = Callable[[int, int, float], None]  # windows done, in all, perplexity so far


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result for one model and one text."""

    ctx: int  # tokens per window
    windows: int
    tokens: int  # that were predicted and scored
    perplexity: Estimate
    divergence: Divergence | None  # from the reference, where there was one
    seconds: float  # for all models that were evaluated together


def windows(ids: Sequence[int], ctx: int, bos: int | None) -> Iterator[tuple[list[int], int]]:
    """(window, first scored target) pairs: non-overlapping windows of `ctx` ids, the tail dropped.

    The first id of a window is overwritten by BOS where there is one; targets at positions ctx/2 +
    1 .. ctx - 1 are scored.
    """
    for first in range(0, len(ids) - ctx + 1, ctx):
        window = list(ids[first : first + ctx])
        if bos is not None:
            window[0] = bos
        yield window, ctx // 2 + 1


def tokens(
    model: "Model", text: str, ctx: int, *, special: bool = False
) -> tuple[list[int], int | None]:
    """Ids of a text that fill two windows of `ctx` at least, and the BOS that windows open with.

    special: control tokens in the text count as such. Raises RequestError.
    """
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, special=special, bos=True)
    if len(ids) < 2 * ctx:
        raise RequestError(
            f"text of {len(ids)} tokens: expected at least {2 * ctx}, two windows of {ctx}: "
            "give more text or a smaller ctx"
        )
    return ids, tokenizer.bos_id if tokenizer.add_bos else None


def perplexity(
    model: "Model", text: str, ctx: int = 512, *, progress: Callable[[int, int], None] | None = None
) -> float:
    """exp of the mean negative log-likelihood of the second half of each window of `ctx` tokens.

    As llama.cpp's llama-perplexity with its default stride (tools/perplexity): the numbers compare
    with its own, not with those of full-window evaluations. progress(windows done, windows in all).

    Raises RequestError when the text is shorter than two windows or ctx exceeds the model's.
    """
    shown = (lambda done, total, _: progress(done, total)) if progress else None
    return evaluate(model, text, ctx, progress=shown).perplexity.value


def evaluate(
    model: "Model",
    text: str,
    ctx: int | None = None,
    *,
    reference: "Model | None" = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, with its error, and the divergence from a reference model.

    See `evaluate_all`. From the folder of a checkout:

    >>> import edgeq
    >>> path, base = (edgeq.convert("examples/tiny-home", f"{r}.gguf", r) for r in ("Q8_0", "F16"))
    >>> with edgeq.load(path) as model, edgeq.load(base) as reference:
    ...     found = evaluate(model, "The device is on. " * 20, ctx=32, reference=reference)
    >>> found.tokens, 0 < found.divergence.kld.value < 0.01
    (45, True)
    """
    given = {"reference": reference, "chunks": chunks}
    return evaluate_all([model], text, ctx, progress=progress, **given)[0]  # type: ignore[arg-type]


def evaluate_all(
    models: Sequence["Model"],
    text: str,
    ctx: int | None = None,
    *,
    reference: "Model | None" = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`evaluate` for several models that step through the text together, the reference once.

    ctx: tokens per window; default CONTEXT, or what the models hold. chunks: use the first so many
    windows only. The logits are never kept: some positions at a time, of all models, are scored
    and forgotten.

    Raises RequestError when ctx exceeds a model's, the text is shorter than two windows, or the
    vocabularies differ; ModelError for logits that are no numbers.
    """
    everyone = [*models, *([reference] if reference is not None else [])]
    room = min(model.ctx for model in everyone)
    size = min(CONTEXT, room) if ctx is None else whole("ctx", ctx, 4, room)
    parts = list(_windows(everyone, text, size))[:chunks]
    started, found = time.monotonic(), [_Tally(model) for model in models]
    for done, (window, first) in enumerate(parts, 1):
        for views, base, targets in _together(models, reference, window, first):
            for tally, logits in zip(found, views):
                tally.add(logits, base, targets)
        if progress:
            progress(done, len(parts), found[-1].running)
    seconds = time.monotonic() - started
    return [tally.result(size, len(parts), seconds) for tally in found]


def _windows(models: Sequence["Model"], text: str, ctx: int) -> Iterator[tuple[list[int], int]]:
    """Windows of the text, on whose ids all models must agree."""
    first = models[0]
    ids, bos = tokens(first, text, ctx)
    for other in models[1:]:
        same = other.arch.vocab_size == first.arch.vocab_size
        if not same or other.tokenizer.encode(text, special=False, bos=True) != ids:
            raise RequestError(
                f"{other.gguf.path}: not the vocabulary of {first.gguf.path}: their probabilities "
                "cannot be compared: use a reference from the same model"
            )
    return windows(ids, ctx, bos)


Views = list[NDArray[np.float32]]


def _together(
    models: Sequence["Model"], reference: "Model | None", window: list[int], first: int
) -> Iterator[tuple[Views, NDArray[np.float32] | None, list[int]]]:
    """Logits of all models and of the reference for the same targets, until the window is over."""
    everyone = {id(model): model for model in (*models, reference) if model is not None}
    for model in everyone.values():
        model.reset()
    streams = [model.parts(window[:-1], first - 1) for model in everyone.values()]
    for views in zip(*streams, strict=True):
        of = dict(zip(everyone, views))
        targets = window[first : first + len(views[0])]
        first += len(targets)
        yield [of[id(model)] for model in models], of.get(id(reference)), targets


class _Tally:
    """Scores of one model as they come."""

    def __init__(self, model: "Model") -> None:
        self._where, self._total, self._count = model.gguf.path, 0.0, 0
        self._plain: list[NDArray[np.float64]] = []
        self._pairs: list[Scores] = []

    def add(
        self, logits: NDArray[np.float32], base: NDArray[np.float32] | None, targets: list[int]
    ) -> None:
        if base is None:
            self._plain.append(-likelihood(logits, targets))
        else:
            self._pairs.append(pair(logits, base, targets))
            self._plain.append(self._pairs[-1].nll)
        self._total += float(self._plain[-1].sum())
        self._count += len(targets)
        if not math.isfinite(self._total):
            raise ModelError(f"{self._where}: logits that are no numbers: the file is damaged")

    @property
    def running(self) -> float:
        return Estimate(self._total / self._count, math.nan).exp().value

    def result(self, ctx: int, count: int, seconds: float) -> Evaluation:
        return Evaluation(
            ctx=ctx,
            windows=count,
            tokens=self._count,
            perplexity=mean(np.concatenate(self._plain)).exp(),
            divergence=Divergence.of(Scores.join(self._pairs)) if self._pairs else None,
            seconds=seconds,
        )
