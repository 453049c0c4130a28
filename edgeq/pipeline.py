"""Convert a checkpoint, or a GGUF file of floats, to a GGUF file in the formats of a recipe.

One stream: each thread reads some rows, quantizes them and forgets them, and what is finished is
written in order, so memory does not grow with the model. All sizes are known, and the disk space is
claimed, before the first weight is read.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.errors import ModelError, RequestError
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.quantizers import available, find, quantize, thread_count
from edgeq.recipe import Recipe, assign, recipes
from edgeq.sources import Source, open_source
from edgeq.text import printable

__all__ = ["ConversionReport", "TensorReport", "convert", "run"]

# (bytes finished, bytes in all, name of the tensor at hand)
Progress = Callable[[int, int, str], None]
Importance = Mapping[str, NDArray[np.float32]]

_CHUNK = 1 << 20  # weights per step of a thread: some 10 ms, after which Ctrl-C is noticed
_AHEAD = 4  # steps that may be done before their turn to be written
_SAMPLED_ROWS = 4  # per step, for the error in the report
_QUANTIZATION_VERSION = 2  # of ggml's block layouts


@dataclass(frozen=True, slots=True)
class TensorReport:
    """How one tensor was stored."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    relative_rmse: float  # sqrt(sum (stored - w)^2 / sum w^2) over a sample of rows
    mean_square: float  # of the weights in that sample


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did.

    relative_rmse: over all weights, estimated from the sampled rows of each tensor.
    """

    path: Path
    recipe: str
    nbytes: int  # of the file
    bits_per_weight: float  # of all tensors together
    relative_rmse: float
    seconds: float
    tensors: tuple[TensorReport, ...]
    warnings: tuple[str, ...] = ()


def convert(
    src: Path | str,
    out: Path | str | None = None,
    recipe: "str | Path | Recipe" = "Q4_K_M",
    *,
    method: str = "search",
    importance: Importance | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert `src` and return the path of the new file. See `run` for arguments and errors.

    >>> convert("no-such-folder")
    Traceback (most recent call last):
        ...
    edgeq.errors.ResourceError: no-such-folder: not found: give a checkpoint folder or a GGUF file
    """
    return run(
        src,
        out,
        recipe,
        method=method,
        importance=importance,
        force=force,
        threads=threads,
        progress=progress,
    ).path


def run(
    src: Path | str,
    out: Path | str | None = None,
    recipe: "str | Path | Recipe" = "Q4_K_M",
    *,
    method: str = "search",
    importance: Importance | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_requantize: bool = False,
) -> ConversionReport:
    """Convert `src`, a checkpoint folder or a GGUF file, and report.

    out: file to write, or a folder for `<name>-<RECIPE>.gguf`; by default the current folder.
    recipe: name such as "Q4_K_M", or path of a recipe file.
    method: file name in edgeq/quantizers/. threads: for quantizing; by default all cores.
    importance: GGUF tensor name -> mean square activation of each column, float32 [cols].
    force: replace an existing file. progress: called after each step.
    allow_requantize: accept a source that is quantized already.

    Raises RequestError, ResourceError (disk), FormatError and ModelError (source). Whatever stops
    the work, under the final name there is a complete file or what was there before.
    """
    started = time.monotonic()
    mixture = Recipe.load(recipe)
    source = open_source(src, allow_requantize=allow_requantize)
    with contextlib.closing(source):
        path = _output_path(source, mixture, out)
        specs = _specs(source, mixture, importance is not None)
        encoder = _Encoder(method, _checked(importance or {}, source), threads)
        encoder.check()
        metadata = {**source.metadata(), **_file_keys(mixture)}
        with GgufWriter(path, metadata, specs, force=force) as writer:
            tensors = tuple(_write_all(source, specs, encoder, writer, progress))
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return ConversionReport(
        path=path,
        recipe=mixture.name,
        nbytes=writer.nbytes,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / weights,
        relative_rmse=_total_error(tensors),
        seconds=time.monotonic() - started,
        tensors=tensors,
        warnings=tuple(source.warnings),
    )


def _file_keys(recipe: Recipe) -> dict[str, Any]:
    return {
        "general.quantization_version": np.uint32(_QUANTIZATION_VERSION),
        "general.file_type": np.uint32(recipe.file_type),
    }


def _output_path(source: Source, recipe: Recipe, out: Path | str | None) -> Path:
    """Path to write, which is none of the files to read."""
    path = Path(out) if out is not None else Path()
    if path.is_dir():
        path = path / f"{_stem(source.name)}-{recipe.name}.gguf"
    for file in source.files:
        if path.exists() and os.path.samefile(path, file):
            raise RequestError(f"{path}: is the source itself: give another name for the output")
    return path


def _stem(name: str) -> str:
    """Model name without the encoding that GGUF file names end with.

    >>> _stem("tiny-home-BF16")
    'tiny-home'
    """
    encodings = "|".join(re.escape(encoding) for encoding in recipes())
    return re.sub(rf"[-._]({encodings})$", "", name, flags=re.IGNORECASE) or name


def _specs(source: Source, recipe: Recipe, importance: bool) -> list[TensorSpec]:
    model = dataclasses.replace(source.model, importance=importance)
    formats = assign(recipe, source.shapes.items(), model)
    return [
        TensorSpec(name, shape, blocks.get(formats[name])) for name, shape in source.shapes.items()
    ]


def _checked(importance: Importance, source: Source) -> Importance:
    unknown = sorted(str(name) for name in importance if name not in source.shapes)
    if unknown:
        names = ", ".join(printable(name) for name in unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise RequestError(
            f"importance: {source.path} has no tensor {names}: expected names as "
            "`edgeq inspect --tensors` shows them"
        )
    for name, shape in source.shapes.items():
        values = np.asarray(importance.get(name, 0.0))
        fits = values.shape in ((), shape[-1:]) and np.isfinite(values).all()
        if not fits or values.min() < 0:
            raise RequestError(
                f"importance of {name}: shape {values.shape}: expected {shape[-1]} finite numbers "
                ">= 0, one for each column"
            )
    return importance


@dataclass(frozen=True, slots=True)
class _Encoder:
    """From float32 rows to the bytes of a format."""

    method: str
    importance: Importance
    threads: int | None

    def check(self) -> None:
        """Refuse bad settings before work. Raises RequestError."""
        if self.method not in available():
            find(self.method)  # raises, with the list
        if self.threads is not None and self.threads < 1:
            raise RequestError(f"threads = {self.threads}: expected at least 1")

    def __call__(self, spec: TensorSpec, start: int, w: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Bytes [n, row_bytes] of rows w [n, cols] from row `start` on. Raises ModelError."""
        if spec.format.name == "F32":
            return np.ascontiguousarray(w).view(np.uint8)
        weights = self.importance.get(spec.name)
        # Floats are all the same to every method; "rtn" spares the import of compiled code.
        method = "rtn" if spec.format.value == "x" else self.method
        try:
            return quantize(w, spec.format, weights, method, threads=1)
        except RequestError as error:  # settings are checked: it is about the values
            raise ModelError(f"{spec.name}, rows from {start} on: {error}") from error


def _write_all(
    source: Source,
    specs: list[TensorSpec],
    encode: _Encoder,
    writer: GgufWriter,
    progress: Progress | None,
) -> Iterator[TensorReport]:
    """Quantize and write every tensor, in order."""
    total = sum(_nbytes(spec) for spec in specs)
    done = 0

    def advance(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, name)

    with contextlib.closing(_parts(source, specs, encode)) as parts:
        for spec in specs:
            yield _write_one(spec, parts, writer, advance)


def _write_one(
    spec: TensorSpec,
    parts: "Iterator[_Part]",
    writer: GgufWriter,
    advance: Callable[[int, str], None],
) -> TensorReport:
    rows, cols = _matrix(spec.shape)
    row_bytes = blocks.row_bytes(spec.format, cols)
    sample = _Sample()
    stop = 0
    while stop < rows:
        start, stop, packed, compared = next(parts)
        writer.write_part(spec.name, start * row_bytes, packed)
        sample = sample.plus(compared)
        advance(packed.nbytes, spec.name)
    error, mean_square = sample.result()
    name, shape, nbytes = spec.name, spec.shape, rows * row_bytes
    return TensorReport(name, shape, spec.format.name, nbytes, error, mean_square)


class _Part(NamedTuple):
    """Rows start..stop of a tensor, as they go to the file: packed uint8 [n, row_bytes]."""

    start: int
    stop: int
    packed: NDArray[np.uint8]
    sample: "_Sample"


def _parts(
    source: Source, specs: list[TensorSpec], encode: _Encoder
) -> Generator[_Part, None, None]:
    """All rows of all tensors in order; threads read and quantize the next ones meanwhile."""

    def work(spec: TensorSpec, start: int, stop: int) -> _Part:
        w = source.read(spec.name, start, stop)
        packed = encode(spec, start, w)
        return _Part(start, stop, packed, _Sample.of(w, packed, spec.format))

    steps = (
        (spec, start, stop)
        for spec in specs
        for start, stop in _ranges(spec.shape, source.row_step)
    )
    threads = thread_count(encode.threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="edgeq-quantize")
    waiting: deque[Future[_Part]] = deque()
    try:
        for step in steps:
            if len(waiting) == threads + _AHEAD:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, *step))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ranges(shape: tuple[int, ...], row_step: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about _CHUNK weights, multiples of `row_step` rows."""
    rows, cols = _matrix(shape)
    step = max(_CHUNK // cols // row_step, 1) * row_step
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as one matrix; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def _nbytes(spec: TensorSpec) -> int:
    rows, cols = _matrix(spec.shape)
    return rows * blocks.row_bytes(spec.format, cols)


class _Sample(NamedTuple):
    """Error of stored rows: decoding is slow, so a few rows per step must do."""

    error: float = 0.0  # sum of (stored - w)^2
    square: float = 0.0  # sum of w^2
    weights: int = 0

    @classmethod
    def of(cls, w: NDArray[np.float32], packed: NDArray[np.uint8], fmt: BlockFormat) -> "_Sample":
        """Compare some rows of w [n, cols] with packed [n, row_bytes]."""
        some = slice(None, None, max(len(w) // _SAMPLED_ROWS, 1))
        exact = w[some].astype(np.float64)
        square = float(np.square(exact).sum())
        if fmt.name == "F32":
            return cls(0.0, square, exact.size)
        error = float(np.square(blocks.decode(packed[some], fmt) - exact).sum())
        return cls(error, square, exact.size)

    def plus(self, other: "_Sample") -> "_Sample":
        """Both samples as one."""
        error, square = self.error + other.error, self.square + other.square
        return _Sample(error, square, self.weights + other.weights)

    def result(self) -> tuple[float, float]:
        """Relative RMSE, and mean square of the weights."""
        relative = math.sqrt(self.error / self.square) if self.square else 0.0
        return relative, self.square / max(self.weights, 1)


def _total_error(tensors: tuple[TensorReport, ...]) -> float:
    energies = [math.prod(tensor.shape) * tensor.mean_square for tensor in tensors]
    lost = sum(e * tensor.relative_rmse**2 for e, tensor in zip(energies, tensors))
    return math.sqrt(lost / sum(energies)) if any(energies) else 0.0
