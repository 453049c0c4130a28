"""How good a model is: perplexity as llama-perplexity defines it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.checks import whole
from edgeq.errors import RequestError

if TYPE_CHECKING:
    from edgeq.engine import Model

__all__ = ["perplexity", "windows"]


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


def log_likelihood(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """ln p of each target: logits [n, vocab], targets [n] → float64 [n]."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    total = np.log(np.exp(wide - peak).sum(axis=1)) + peak[:, 0]
    picked = wide[np.arange(len(targets)), list(targets)]
    return np.asarray(picked - total, np.float64)


def perplexity(
    model: "Model", text: str, ctx: int = 512, *, progress: Callable[[int, int], None] | None = None
) -> float:
    """exp of the mean negative log-likelihood of the second half of each window of `ctx` tokens.

    As llama.cpp's llama-perplexity with its default stride (tools/perplexity): the numbers compare
    with its own, not with those of full-window evaluations. progress(windows done, windows in all).

    Raises RequestError when the text is shorter than two windows or ctx exceeds the model's.
    """
    ctx = whole("ctx", ctx, 4, model.ctx)
    tokenizer = model.tokenizer
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    ids = tokenizer.encode(text, special=False, bos=True)
    if len(ids) < 2 * ctx:
        raise RequestError(
            f"text of {len(ids)} tokens: expected at least {2 * ctx}, two windows of {ctx}"
        )
    parts, total, count = list(windows(ids, ctx, bos)), 0.0, 0
    for done, (window, first) in enumerate(parts):
        logits = model.logits(window)
        scored = log_likelihood(logits[first - 1 : -1], window[first:])
        total -= float(scored.sum())
        count += len(scored)
        if progress:
            progress(done + 1, len(parts))
    return math.exp(total / count)
