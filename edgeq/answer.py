"""One answer: sample, decode, ask the model for the next logits, until something ends it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeq.draft import Draft
from edgeq.errors import RequestError
from edgeq.kernels.layout import COLUMNS
from edgeq.sampler import Sampler
from edgeq.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from edgeq.engine import Model

__all__ = ["Options", "Penalties", "Stats", "answer", "until"]


class Penalties(TypedDict, total=False):
    """Settings against repetition; see `edgeq.sampler.Sampler`."""

    repeat_penalty: float | None
    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None


class Options(Penalties, total=False):
    """What `Model.generate` and `Model.chat` take by name."""

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    draft_ngram: bool


@dataclass
class Stats:
    """Counts and seconds of the last answer."""

    prompt_tokens: int = 0  # evaluated now
    prompt_seconds: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    drafted_tokens: int = 0  # proposed by prompt lookup
    accepted_tokens: int = 0  # of these, what the model would have said itself
    finish: Literal["", "stop", "length", "context"] = ""  # why it ended; "" while it runs


class _Steps:
    """Logits after one more token, where it pays several tokens at a time.

    A proposal's tokens enter the cache unchecked; those the sampler does not choose are taken out
    again. Every logit is the one that a step of its own would have given.
    """

    WORTH = 1.1  # accepted tokens per proposal that pay for checking it
    RETRY = 32  # steps without a proposal before the next try

    def __init__(self, model: "Model", draft: Draft | None, stats: Stats) -> None:
        self._model, self._draft, self._stats = model, draft, stats
        self._ahead: list[int] = []  # proposed tokens in the cache
        self._used = 0  # of these, chosen by the sampler
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._score, self._idle = 2.0, 0

    @property
    def length(self) -> int:
        """Tokens in the cache that are certain."""
        return len(self._model.seen) - len(self._ahead) + self._used

    def after(self, token: int) -> NDArray[np.float32]:
        """Logits [vocab] after `token`."""
        if self._used < len(self._ahead) and self._ahead[self._used] == token:
            self._used += 1
            self._stats.accepted_tokens += 1
        else:
            self._evaluate(token)
        row: NDArray[np.float32] = self._rows[self._used]
        return row

    def _evaluate(self, token: int) -> None:
        self.settle()
        self._ahead, self._used = self._propose(token), 0
        self._stats.drafted_tokens += len(self._ahead)
        rows = self._model.step([token, *self._ahead])
        self._rows = rows.copy() if self._ahead else rows

    def settle(self) -> None:
        """Take unchosen tokens out of the cache, and learn from them."""
        if self._ahead:
            self._score = 0.7 * self._score + 0.3 * self._used
        if self._draft:
            self._draft.extend(self._ahead[: self._used])
        self._model.rewind(self.length)
        self._ahead, self._used = [], 0

    def _propose(self, token: int) -> list[int]:
        if self._draft is None:
            return []
        self._draft.extend([token])
        self._idle += 1
        if self._score < self.WORTH and self._idle < self.RETRY:
            return []
        self._idle = 0
        return self._draft.propose(min(COLUMNS - 1, self._model.ctx - self.length - 1))


def answer(
    model: "Model",
    ids: list[int],
    max_tokens: int,
    sampler: Sampler,
    decoder: StreamDecoder,
    *,
    draft_ngram: bool = False,
) -> Generator[str, None, None]:
    """Pieces of text after the prompt `ids`; counts and times go to `model.stats`."""
    logits, state, history = model.prompt(ids), sampler.start(), list(ids)
    stats, mine, started = model.stats, model.claim(), perf_counter()
    steps = _Steps(model, Draft(ids) if draft_ngram else None, stats)
    vocabulary = model.tokenizer.n_vocab  # the model's may be padded
    try:
        while stats.generated_tokens != max_tokens:
            token = state.sample(logits[:vocabulary], history)
            stats.generated_tokens += 1
            stats.generation_seconds = perf_counter() - started
            if token in model.tokenizer.eog_ids:
                stats.finish = "stop"
                break
            history.append(token)
            yield decoder.push(token)
            if not model.owned_by(mine):
                raise RequestError("another request on this model has ended this answer")
            if steps.length >= model.ctx:
                stats.finish = "context"
                break
            if stats.generated_tokens != max_tokens:
                logits = steps.after(token)
        stats.finish = stats.finish or "length"
        yield decoder.flush()
    finally:
        stats.finish = stats.finish or "stop"  # the reader has had enough
        stats.generation_seconds = perf_counter() - started
        if model.owned_by(mine):
            steps.settle()


def until(pieces: Generator[str, None, None], stops: list[str]) -> Generator[str, None, None]:
    """Pass pieces on until one of `stops` appears; what may be its beginning is held back."""
    held = ""
    longest = max((len(s) for s in stops), default=1) - 1
    for piece in pieces:
        held += piece
        found = min((i for s in stops if (i := held.find(s)) >= 0), default=-1)
        if found >= 0:
            pieces.close()
            if held[:found]:
                yield held[:found]
            return
        ready = len(held) - longest
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held
