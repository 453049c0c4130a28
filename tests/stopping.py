"""Work that is stopped half-way, for tests."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from edgeq.pipeline import run


def stop(source: Path, out: Path, recipe: str = "Q4_0", share: float = 0.5, **options: Any) -> Path:
    """A conversion stopped by Ctrl-C when `share` of the bytes are done; the path of its rest."""

    def interrupt(done: int, total: int, name: str) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, recipe, progress=interrupt, **options)
    return out.with_name(out.name + ".part")


def die_at(nth: int, calls: Iterable[str]) -> None:
    """End this process, with nothing tidied up, at the call after its nth of these in `os`."""
    made = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal made
            made += 1
            if made > nth:
                os._exit(9)
            return real(*args)

        return call

    for name in calls:
        setattr(os, name, deadly(getattr(os, name)))
