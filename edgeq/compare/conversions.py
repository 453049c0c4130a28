"""The files that are compared: made in a work folder, and found there again."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import checks, pipeline
from edgeq.errors import RequestError, ResourceError
from edgeq.quantizers import available, check_needs
from edgeq.recipe import Recipe
from edgeq.resume import program, stamp
from edgeq.text import printable, write_text

__all__ = ["Candidate", "Conversion", "check", "convert", "parse"]

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # notes


@dataclass(frozen=True, slots=True)
class Candidate:
    """What to compare: a recipe with a quantizer, or a finished file."""

    recipe: str
    method: str = "search"
    file: Path | None = None

    @property
    def name(self) -> str:
        """Short and unique within a comparison of different candidates.

        >>> parse("Q3_K_M:rtn").name, parse("q4_k_m").name, parse("their/Q2_K.gguf").name
        ('Q3_K_M rtn', 'Q4_K_M', 'Q2_K.gguf')
        """
        if self.file is not None:
            return self.file.name
        stem = Path(self.recipe).stem if self.recipe.endswith(".toml") else self.recipe.upper()
        return stem if self.method == "search" else f"{stem} {self.method}"


@dataclass(frozen=True, slots=True)
class Conversion:
    """A file, and what its conversion reported; nothing for a file that was there before."""

    path: Path
    relative_rmse: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # tensor -> relative RMSE
    warnings: tuple[str, ...] = ()


def parse(text: str) -> Candidate:
    """RECIPE, RECIPE:METHOD or FILE.gguf. Raises RequestError."""
    if text.lower().endswith(".gguf"):
        return Candidate(Path(text).stem, file=Path(text))
    recipe, colon, method = text.partition(":")
    if colon and method not in available():
        known = ", ".join(available())
        raise RequestError(f"-t {printable(text)}: method {printable(method)!r}: expected {known}")
    Recipe.load(recipe)
    return Candidate(recipe, method or "search")


def check(candidates: Sequence[Candidate], folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse, before any work, what a method lacks, and to replace what is not ours to replace.

    Raises RequestError for a method without what it needs and for a file that is to be compared
    itself, ResourceError for one that no comparison has made here.
    """
    known = {name: options.get(name) is not None for name in ("importance", "hessians")}
    for candidate in candidates:
        if candidate.file is None:
            check_needs(candidate.method, **known)
    made = [_places(candidate, folder) for candidate in candidates if candidate.file is None]
    given = [("file to compare", c.file) for c in candidates if c.file is not None]
    checks.outputs(itertools.chain.from_iterable(made), given)
    for path, notes in made:
        _refuse_foreign(path, notes)


def convert(
    source: Path,
    candidate: Candidate,
    folder: Path,
    options: Mapping[str, Any],
    progress: pipeline.Progress | None = None,
) -> Conversion:
    """The candidate's file in `folder`; one that is there is used if it was made of the same source
    in the same way, and replaced if it was made here otherwise. Raises as `edgeq.pipeline.run`.
    """
    if candidate.file is not None:
        return Conversion(candidate.file)
    path, notes = _places(candidate, folder)
    _refuse_foreign(path, notes)
    key = _key(source, candidate, options)
    known = _recall(path, notes, key)
    if known:
        return known
    given = {**options, "method": candidate.method, "force": path.exists(), "progress": progress}
    report = pipeline.run(source, path, candidate.recipe, **given)
    found = Conversion(
        path,
        report.relative_rmse,
        {tensor.name: tensor.relative_rmse for tensor in report.tensors},
        report.warnings,
    )
    _remember(notes, found, key)
    return found


def _places(candidate: Candidate, folder: Path) -> tuple[Path, Path]:
    """The candidate's file, and the notes on it."""
    stem = candidate.name.replace(" ", "-").replace(os.sep, "-")
    return folder / f"{stem}.gguf", folder / f"{stem}.json"


def _refuse_foreign(path: Path, notes: Path) -> None:
    """Ours are notes that can be read as such, and the file that they describe."""
    try:
        described = _read(notes)["file"]
    except _DAMAGED:
        taken = [file for file in (notes, path) if os.path.lexists(file)]
    else:
        taken = [path] if path.exists() and _state(path) != described else []
    if taken:
        advice = "move it away, remove it, or give another folder"
        raise ResourceError(f"{taken[0]}: was not made by an earlier comparison: {advice}")


def _key(source: Path, candidate: Candidate, options: Mapping[str, Any]) -> str:
    """All that decides the bytes of the file."""
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else []
    recipe = dataclasses.asdict(Recipe.load(candidate.recipe))
    facts = [program(), recipe, candidate.method, _trace(options)]
    return json.dumps([*facts, [_trace(path) for path in files or [source]]])


def _trace(value: Any) -> Any:
    """Something short that changes when the value does: hashes of arrays, times of files."""
    if isinstance(value, Mapping):
        return {str(key): _trace(value[key]) for key in sorted(value)}
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, Path):
        return stamp(value)
    return repr(value)


def _remember(notes: Path, found: Conversion, key: str) -> None:
    record: dict[str, Any] = {"key": key, "file": _state(found.path)}
    record |= {"relative_rmse": found.relative_rmse, "errors": found.errors}
    write_text(notes, json.dumps({**record, "warnings": found.warnings}))


def _recall(path: Path, notes: Path, key: str) -> Conversion | None:
    """The conversion that left these notes; None when it is another one, or they are damaged."""
    try:
        record = _read(notes)
        if record["key"] != key or record["file"] != _state(path):
            return None
        errors = {str(name): float(error) for name, error in record["errors"].items()}
        warnings = tuple(map(str, record["warnings"]))
        return Conversion(path, float(record["relative_rmse"]), errors, warnings)
    except _DAMAGED:
        return None


def _read(notes: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8"))
    if not {"key", "file", "relative_rmse", "errors", "warnings"} <= record.keys():
        raise ValueError("notes of something else")
    return record


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
