"""Convert a checkpoint, or a GGUF file of floats, to a GGUF file in the formats of a recipe.

One stream: each thread reads some rows, quantizes them and forgets them, and what is finished is
written in order, so memory does not grow with the model. All sizes are known, and the disk space is
claimed, before the first weight is read.
"""

import contextlib
import dataclasses
import math
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeq import blocks, checks, hessian
from edgeq.choosing import Target, choose
from edgeq.encoding import Encoder
from edgeq.folding import Scaler, fold
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.importance import Given, resolve
from edgeq.native import native_recipe
from edgeq.quantizers import find, thread_count
from edgeq.recipe import Recipe, assign, recipes
from edgeq.resume import identity
from edgeq.sources import Source, open_source
from edgeq.statistics import Statistics
from edgeq.stream import Part, Sample, matrix, nbytes, parts

__all__ = ["ConversionReport", "TensorReport", "convert", "file_keys", "run", "specs_of"]

# (bytes finished, bytes in all, name of the tensor at hand)
Progress = Callable[[int, int, str], None]
_QUANTIZATION_VERSION = 2  # of ggml's block layouts
_ANY = Target()
_MEMO = struct.Struct("<dd?")  # what a report needs of a tensor finished earlier


@dataclass(frozen=True, slots=True)
class TensorReport:
    """How one tensor was stored."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    # sqrt(sum (stored - w)^2 / sum w^2) over a sample of rows; where a method scaled w, both are
    # scaled back
    relative_rmse: float
    mean_square: float  # of the weights in that sample
    kept: bool = False  # the source's own integers, not quantized again
    method: str = "search"  # that quantized it


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
    mixture: Recipe
    why: str = ""  # the recipe, where it was not asked for
    warnings: tuple[str, ...] = ()
    resumed: int = 0  # tensors that an interrupted run had finished


def convert(
    src: Path | str,
    out: Path | str | None = None,
    recipe: str | Path | Recipe | None = None,
    *,
    method: str = "search",
    importance: Given | None = None,
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
    recipe: str | Path | Recipe | None = None,
    *,
    method: str = "search",
    importance: Given | None = None,
    hessians: Path | str | None = None,
    target: Target = _ANY,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_requantize: bool = False,
) -> ConversionReport:
    """Convert `src`, a checkpoint folder or a GGUF file, and report.

    out: file to write, or a folder for `<name>-<RECIPE>.gguf`; by default the current folder.
    recipe: name such as "Q4_K_M", or path of a recipe file; None: what `target` asks for; else the
    one that keeps the integers of a source that is quantized to such (GPTQ, AWQ, QAT, ...), and one
    of 4 bits for all others.
    method: file name in edgeq/quantizers/. threads: for quantizing; by default all cores.
    importance: GGUF tensor name -> mean square activation of each column, float32 [cols], of
    experts [n_mat, cols]; an `edgeq.imatrix.Imatrix`, or the path of an importance matrix.
    hessians: path of a file of Hessians, for methods that use them.
    target: what the file should be like, beside or instead of a recipe.
    force: replace an existing file. progress: called after each step.
    allow_requantize: accept a source that is quantized already.

    Raises RequestError, ResourceError (disk), FormatError and ModelError (source). Whatever stops
    the work, under the final name there is a complete file or what was there before. After Ctrl-C
    or a kill, the same call goes on where it was stopped and gives the same bytes.
    """
    started = time.monotonic()
    target.check(recipe)
    with contextlib.ExitStack() as stack:
        source = open_source(src, allow_requantize=allow_requantize)
        stack.callback(source.close)
        opened = None if hessians is None else stack.enter_context(hessian.read(hessians))
        weighted = resolve(importance, source.shapes, source.path)
        known = Statistics(weighted.values, opened)
        encoder = Encoder(method, known, threads)
        encoder.check(source)
        metadata = {**source.metadata(), **file_keys(0), **weighted.metadata}
        mixture, why = choose(source, recipe, target, known, metadata, threads, progress)
        path = _output_path(source, mixture, out)
        checks.outputs([path], _inputs(source, recipe, importance, hessians))
        specs = specs_of(source, mixture, bool(known))
        warnings = weighted.missing([spec.name for spec in specs if spec.format.value != "x"])
        warnings += encoder.uncovered(specs)
        same = identity(source, mixture.name, method, weighted.values, opened)
        source = _folded(source, known, method, specs, metadata["general.architecture"])
        metadata |= file_keys(mixture.file_type)
        with GgufWriter(path, metadata, specs, force=force, identity=same) as writer:
            work = _Work(source, encoder, writer, progress, sum(nbytes(spec) for spec in specs))
            done = _recall(work, specs)
            tensors = tuple(_write_all(work, specs, done))
        warnings += [*source.warnings, *_second_time(source, mixture, tensors)]
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return ConversionReport(
        path=path,
        recipe=mixture.name,
        mixture=mixture,
        why=why,
        nbytes=writer.nbytes,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / weights,
        relative_rmse=_total_error(tensors),
        seconds=time.monotonic() - started,
        tensors=tensors,
        warnings=tuple(warnings),
        resumed=len(done),
    )


def _folded(
    source: Source, known: Statistics, method: str, specs: list[TensorSpec], architecture: str
) -> Source:
    """The source as the method wants it scaled."""
    chosen = find(method)
    if not hasattr(chosen, "scales"):
        return source
    formats = {spec.name: spec.format for spec in specs}
    return fold(source, known, cast(Scaler, chosen), formats, str(architecture))


def file_keys(file_type: int) -> dict[str, Any]:
    """Metadata that a conversion adds to what the source says."""
    return {
        "general.quantization_version": np.uint32(_QUANTIZATION_VERSION),
        "general.file_type": np.uint32(file_type),
    }


def _output_path(source: Source, recipe: Recipe, out: Path | str | None) -> Path:
    """Path to write."""
    path = Path(out) if out is not None else Path()
    return path / f"{_stem(source.name)}-{recipe.name}.gguf" if path.is_dir() else path


def _inputs(
    source: Source,
    recipe: str | Path | Recipe | None,
    importance: Given | None,
    hessians: Path | str | None,
) -> Iterator[tuple[str, Path | str]]:
    """What each file to read is, and its path."""
    yield from (("source", file) for file in source.files)
    if isinstance(recipe, Path | str) and str(recipe).endswith(".toml"):
        yield "recipe", recipe
    if isinstance(importance, Path | str):
        yield "importance matrix", importance
    if hessians is not None:
        yield "file of Hessians", hessians


def _stem(name: str) -> str:
    """Model name without the encoding that GGUF file names end with.

    >>> _stem("tiny-home-BF16")
    'tiny-home'
    """
    encodings = "|".join(re.escape(encoding) for encoding in recipes())
    return re.sub(rf"[-._]({encodings})$", "", name, flags=re.IGNORECASE) or name


def specs_of(source: Source, recipe: Recipe, importance: bool = False) -> list[TensorSpec]:
    """Tensors of the file that a recipe makes; importance: with statistics of activations."""
    model = dataclasses.replace(source.model, importance=importance)
    formats = assign(recipe, source.shapes.items(), model)
    return [
        TensorSpec(name, shape, blocks.get(formats[name])) for name, shape in source.shapes.items()
    ]


class _Work:
    """What all tensors of a conversion share."""

    def __init__(
        self,
        source: Source,
        encode: Encoder,
        writer: GgufWriter,
        progress: Progress | None,
        total: int,
    ) -> None:
        self.source, self.encode, self.writer = source, encode, writer
        self._progress, self._done, self._total = progress, 0, total

    def advance(self, step: int, name: str) -> None:
        """Count `step` more bytes as finished, in the tensor at hand."""
        self._done += step
        if self._progress is not None:
            self._progress(self._done, self._total, name)


def _recall(work: _Work, specs: list[TensorSpec]) -> dict[str, TensorReport]:
    """Reports of the tensors that an interrupted run had written."""
    reports = {}
    for spec in specs:
        memo = work.writer.recall(spec.name)
        if memo is not None:
            error, mean_square, kept = _MEMO.unpack(memo[: _MEMO.size])
            method = work.encode.method_for(spec)
            reports[spec.name] = _report(spec, error, mean_square, kept, method)
            work.advance(nbytes(spec), spec.name)
    return reports


def _write_all(
    work: _Work, specs: list[TensorSpec], done: Mapping[str, TensorReport]
) -> Iterator[TensorReport]:
    """Quantize and write every tensor that is not done, in order."""
    left = [spec for spec in specs if spec.name not in done]
    threads = thread_count(work.encode.threads)
    with contextlib.closing(parts(work.source, left, work.encode, threads)) as finished:
        for spec in specs:
            yield done[spec.name] if spec.name in done else _write_one(spec, finished, work)


def _write_one(spec: TensorSpec, finished: Iterator[Part], work: _Work) -> TensorReport:
    rows, _ = matrix(spec.shape)
    sample, stop, kept = Sample(), 0, True
    while stop < rows:
        stop, encoded, compared = next(finished)
        sample, kept = sample.plus(compared), kept and encoded.kept
        work.advance(encoded.packed.nbytes, spec.name)  # where Ctrl-C is noticed
        memo = _MEMO.pack(*sample.result(), kept)
        work.writer.write_part(spec.name, encoded.packed, memo)
    return _report(spec, *sample.result(), kept, work.encode.method_for(spec))


def _report(
    spec: TensorSpec, error: float, mean_square: float, kept: bool, method: str
) -> TensorReport:
    name, shape, fmt = spec.name, spec.shape, spec.format.name
    return TensorReport(name, shape, fmt, nbytes(spec), error, mean_square, kept, method)


def _second_time(
    source: Source, recipe: Recipe, tensors: tuple[TensorReport, ...]
) -> Iterator[str]:
    """A warning when tensors lost what they were."""
    lost = [
        tensor.name
        for tensor in tensors
        if tensor.name in source.quantized
        and not tensor.kept
        and blocks.get(tensor.format).value != "x"
    ]
    if lost:
        native = native_recipe(source)
        keeps = native is not None and native != recipe.name
        advice = f"type {native} keeps them as they are" if keeps else "start from the original"
        yield (
            f"{source.path}: {len(lost)} of {len(source.quantized)} quantized tensors were "
            f"quantized a second time, which adds errors: {advice}"
        )


def _total_error(tensors: tuple[TensorReport, ...]) -> float:
    energies = [math.prod(tensor.shape) * tensor.mean_square for tensor in tensors]
    lost = sum(e * tensor.relative_rmse**2 for e, tensor in zip(energies, tensors))
    return math.sqrt(lost / sum(energies)) if any(energies) else 0.0
