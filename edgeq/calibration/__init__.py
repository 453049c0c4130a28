"""Calibrate: run a model over a text, and note what goes into its matrix products.

Statistics are of the exact float32 inputs, before any rounding, and read as llama-imatrix does:
chunks of `ctx` tokens, each from an empty KV cache with BOS in place of its first token, the tail
dropped; every weight of the blocks, the output matrix only on request.

Hessians are large: 4 n_in² bytes for each input, 4 GB for a model of TinyLlama's size. So that
memory stays bounded, they are collected in passes over the text, each for as many consecutive
inputs as fit a budget, and each no deeper into the model than it needs. The budget has no influence
on the result.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq import checks, hessian, imatrix, memory, models, pipeline
from edgeq.calibration.state import State
from edgeq.calibration.sums import Outer
from edgeq.calibration.work import Progress, Settings, Work, collect
from edgeq.checkpoint import open_checkpoint
from edgeq.engine import Model, load
from edgeq.errors import RequestError, ResourceError
from edgeq.gguf import GgufWriter, open_gguf
from edgeq.imatrix import Imatrix, dat
from edgeq.resume import program, stamp
from edgeq.text import read_text

__all__ = ["DEFAULT_CONTEXT", "Report", "Settings", "collect", "run", "save"]

DEFAULT_CONTEXT = 512  # tokens per chunk, as llama-imatrix
SAVE_EVERY = 30.0  # seconds of work that an interruption may cost


@dataclass(frozen=True, slots=True)
class Report:
    """What a calibration did."""

    path: Path
    imatrix: Imatrix
    tokens: int  # read in this run and those that it went on from
    resumed: int  # chunks that an interrupted run had done
    passes: int
    seconds: float
    warnings: tuple[str, ...]


def run(
    model: Path | str,
    text: Path | str,
    out: Path | str = "imatrix.gguf",
    settings: Settings | None = None,
    *,
    hessian_out: Path | str | None = None,
    add: Sequence[Imatrix] = (),
    output_format: str = "gguf",
    threads: int | None = None,
    force: bool = False,
    budget: int | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress | None = None,
    on_compile: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Calibrate a model on a text file; write an importance matrix, and Hessians if asked for.

    model: a GGUF file, or a checkpoint folder, which is converted for the time of the run. add:
    statistics of other texts to merge in. output_format: "gguf" or "dat". budget: bytes of Hessians
    to hold at a time, by default a quarter of the free memory. save_every: seconds between saves. A
    run that was interrupted goes on where it last saved, beside `out`, and writes the same bytes.

    Raises RequestError for text, settings and an output that is an input, ResourceError (disk,
    memory, `out` exists and not `force`), FormatError and ModelError for the model.
    """
    started, out, content = time.monotonic(), Path(out), read_text(text)
    settings = dataclasses.replace(settings or Settings(), hessians=hessian_out is not None)
    identity = _identity(Path(model), Path(text), settings)
    inputs = [("model", file) for file in _files(Path(model))]
    checks.outputs([out, hessian_out], [("text", text), *inputs])
    for path in (out, hessian_out):
        if path is not None:  # say so now, not after hours
            checks.replaceable(path, force=force)
    with State(out, identity, force=force) as state:
        path, saved = _gguf(Path(model), state), state.load()
        budget = int(saved.get("budget", budget or memory.available() // 4))
        ctx = _chunk_size(path, settings)
        with load(path, threads=threads, ctx=ctx, on_compile=on_compile) as loaded:
            work = Work(loaded, content, settings, budget)
            warnings = tuple(_warnings(loaded, settings))
            work.resume(saved)
            resumed = work.done
            _finish(work, state, save_every, progress)
        if hessian_out is not None:
            _write_hessians(Path(hessian_out), work, state, force)
        found = work.sums.imatrix([Path(text).name], len(work.chunks), work.ctx)
        found = imatrix.merge([*add, found]) if add else found
        save(found, out, output_format, force=force)
        state.remove()
    seconds = time.monotonic() - started
    tokens = len(work.chunks) * work.ctx
    return Report(out, found, tokens, resumed, len(work.passes), seconds, warnings)


def save(
    found: Imatrix, path: Path | str, output_format: str = "gguf", *, force: bool = False
) -> None:
    """Write as "gguf", or as "dat" for older tools. Raises RequestError, ResourceError."""
    if output_format == "gguf":
        imatrix.write(found, path, force=force)
    elif output_format == "dat":
        dat.write(found, Path(path), force=force)
    else:
        raise RequestError(f"output format {output_format!r}: expected gguf or dat")


def _finish(work: Work, state: State, save_every: float, progress: Progress | None) -> None:
    """Do all steps, saving now and then."""
    saved_at = time.monotonic()
    for last_of_pass in work.steps():
        if last_of_pass and work.outer.sums:
            state.save_pass(work.at - 1, work.outer.sums)
        if last_of_pass or time.monotonic() - saved_at >= save_every:
            state.save(work.arrays())
            saved_at = time.monotonic()
        if progress is not None:
            progress(work.done, work.total)


def _write_hessians(path: Path, work: Work, state: State, force: bool) -> None:
    """Means over the tokens, pass by pass."""
    work.outer = Outer([])  # the last pass is on the disk too
    tokens = len(work.chunks) * work.ctx
    metadata, specs = hessian.specs(work.groups, tokens)
    with GgufWriter(path, metadata, specs, force=force) as writer:
        for number in range(len(work.passes)):
            for name, total in state.load_pass(number):
                writer.write(hessian.tensor_name(name), total / np.float32(tokens))


def _identity(model: Path, text: Path, settings: Settings) -> dict[str, object]:
    """What must be the same for a run to be the one that was interrupted."""
    return {
        "model": [stamp(file) for file in _files(model)],
        "text": hashlib.sha256(text.read_bytes()).hexdigest(),
        "settings": dataclasses.asdict(settings),
        "program": program(),
    }


def _files(model: Path) -> list[Path]:
    if not model.exists():
        raise ResourceError(f"{model}: not found: give a GGUF file or a checkpoint folder")
    found = sorted(model.iterdir()) if model.is_dir() else [model]
    return [file for file in found if file.is_file()]


def _gguf(model: Path, state: State) -> Path:
    """The file to run: a checkpoint is converted, beside the output, to the floats it has."""
    if not model.is_dir():
        return model
    if not state.model.exists():
        with contextlib.closing(open_checkpoint(model)) as checkpoint:
            kinds = {tensor.dtype for tensor in checkpoint.tensors.values()}
        pipeline.convert(model, state.model, "BF16" if "BF16" in kinds else "F16")
    return state.model


def _chunk_size(path: Path, settings: Settings) -> int:
    if settings.ctx is not None:
        return settings.ctx
    with open_gguf(path) as gguf:
        return min(models.arch_of(gguf).context_length, DEFAULT_CONTEXT)


def _warnings(model: Model, settings: Settings) -> Iterator[str]:
    yield from model.warnings
    if settings.ctx is None and model.ctx < DEFAULT_CONTEXT:
        yield f"chunks of {model.ctx} tokens: the model was trained on no more"
    formats = {info.format for info in model.gguf.tensors.values()}
    if any(fmt.value != "x" for fmt in formats):
        yield f"{model.gguf.path} is quantized: its floats would give better statistics"
