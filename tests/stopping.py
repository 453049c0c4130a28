"""A conversion that is stopped half-way, for tests."""

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
