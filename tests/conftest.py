"""Fixtures that several test files share."""

import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.gguf import Gguf, open_gguf

# A shell's background job starts with these ignored, and would hand that on to what tests start.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        handler = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler)

RandomBlocks = Callable[..., NDArray[np.uint8]]
OpenBytes = Callable[[bytes], Gguf]


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of compiled kernels, kept between test runs; the user's own is not touched."""
    if not os.environ.get("EDGEQ_CACHE"):
        kept = getattr(request.config, "cache", None)  # pytest can run without
        folder = kept.mkdir("kernels") if kept else tmp_path_factory.mktemp("kernels")
        for old in list(folder.glob("edgeq/kernels-*")):  # one folder per state of the source
            if time.time() - old.stat().st_mtime > 24 * 3600:
                shutil.rmtree(old, ignore_errors=True)
        os.environ["EDGEQ_CACHE"] = str(folder)
    return Path(os.environ["EDGEQ_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def untuned() -> Iterator[None]:
    """Loading a model in tests measures nothing about the machine."""
    from edgeq.tuning import Tuning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeq.passes.tuned", lambda *_: Tuning())
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of reference models and vocabularies; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EDGEQ_DATA", default))
    if not folder.is_dir():
        pytest.skip("no reference data: set EDGEQ_DATA to its folder")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240607)


@pytest.fixture
def random_blocks(rng: np.random.Generator) -> RandomBlocks:
    """Maker of random packed rows whose scales are finite: (format, *lead, blocks per row)."""

    def make(fmt: blocks.BlockFormat, *shape: int) -> NDArray[np.uint8]:
        raw = rng.integers(0, 256, (*shape, fmt.bytes), dtype=np.uint8)
        for field in fmt.fields.values():
            if field.type in ("f16", "bf16", "f32"):
                _set_finite(raw, field, rng)
        return raw.reshape(*shape[:-1], shape[-1] * fmt.bytes)

    return make


def _set_finite(raw: NDArray[np.uint8], field: blocks.Field, rng: np.random.Generator) -> None:
    """Overwrite the number that `field` is in each block."""
    values = rng.standard_normal(raw.shape[:-1]).astype(np.float32)
    if field.type == "f16":
        stored = values.astype(np.float16)[..., None].view(np.uint8)
    else:
        stored = values[..., None].view(np.uint8)[..., 2 if field.type == "bf16" else 0 :]
    raw[..., field.at : field.at + stored.shape[-1]] = stored


@pytest.fixture
def open_bytes(tmp_path: Path) -> Iterator[OpenBytes]:
    """Opener of a file with given bytes; fails where memory or time are out of proportion."""
    opened: list[Gguf] = []

    def open_limited(content: bytes) -> Gguf:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        start = time.monotonic()
        try:
            opened.append(open_gguf(path))
            return opened[-1]
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2 * len(content) + 2_000_000
            assert time.monotonic() - start < 1

    yield open_limited
    for file in opened:
        file.close()
