"""Values that callers give, each checked once: a RequestError names the field, the value and what
was expected.
"""

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgeq.errors import RequestError, ResourceError

__all__ = ["outputs", "replaceable", "stop_texts", "token_ids", "whole"]


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in low..high; True, 2.0 and "2" are none.

    >>> whole("threads", 2, 1, 256)
    2
    >>> whole("threads", 0, 1, 256)
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: threads = 0: expected a whole number from 1 to 256
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} = {value!r}: expected a whole number from {low} to {high}")
    number = operator.index(value)
    if not low <= number <= high:
        raise RequestError(f"{name} = {number}: expected a whole number from {low} to {high}")
    return number


def token_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Ids, at least one of them, each from 0 to vocab_size - 1."""
    checked = [whole("token id", i, 0, vocab_size - 1) for i in ids]
    if not checked:
        raise RequestError("prompt: no tokens: expected at least one")
    return checked


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """The texts that end an answer, none of them empty."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
        raise RequestError(f"stop = {stop!r}: expected a text or several, none of them empty")
    return list(texts)


def outputs(files: Iterable[Path | str | None], inputs: Iterable[tuple[str, Path | str]]) -> None:
    """Files to write are none of the files to read, (what it is, path), nor the same as another;
    None stands for no file.

    >>> outputs(["out.gguf"], [("text", "a.txt"), ("source", "./out.gguf")])
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: out.gguf: is the source itself: give another name for the output
    """
    taken = list(inputs)
    for file in files:
        if file is None:
            continue
        for what, path in taken:
            if _same(file, path):
                advice = "give another name for the output"
                raise RequestError(f"{file}: is the {what} itself: {advice}")
        taken.append(("other output", file))


def replaceable(path: Path | str, *, force: bool) -> None:
    """A file to write is no folder, and does not exist or may be replaced. Raises ResourceError.

    >>> replaceable("/", force=True)
    Traceback (most recent call last):
        ...
    edgeq.errors.ResourceError: /: is a folder: give the name of a file
    """
    if os.path.isdir(path):
        raise ResourceError(f"{path}: is a folder: give the name of a file")
    if not force and os.path.lexists(path):
        raise ResourceError(f"{path}: exists already: use force to replace it")


def _same(a: Path | str, b: Path | str) -> bool:
    """Whether these are one file, by whatever links; it need not exist yet."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)
