"""The files that are compared: made in a work folder, and found there again."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import pipeline
from edgeq.errors import RequestError
from edgeq.quantizers import available
from edgeq.recipe import Recipe
from edgeq.resume import program
from edgeq.text import printable

__all__ = ["Candidate", "Conversion", "convert", "parse"]


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


def convert(
    source: Path,
    candidate: Candidate,
    folder: Path,
    options: Mapping[str, Any],
    progress: pipeline.Progress | None = None,
) -> Conversion:
    """The candidate's file in `folder`; one that is there is used if it was made of the same source
    in the same way. Raises as `edgeq.pipeline.run`.
    """
    if candidate.file is not None:
        return Conversion(candidate.file)
    stem = candidate.name.replace(" ", "-").replace(os.sep, "-")
    path, notes = folder / f"{stem}.gguf", folder / f"{stem}.json"
    key = _key(source, candidate, options)
    known = _recall(path, notes, key)
    if known:
        return known
    given = {**options, "method": candidate.method, "force": True, "progress": progress}
    report = pipeline.run(source, path, candidate.recipe, **given)
    found = Conversion(
        path,
        report.relative_rmse,
        {tensor.name: tensor.relative_rmse for tensor in report.tensors},
        report.warnings,
    )
    _remember(notes, found, key)
    return found


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
        stat = value.stat()
        return [value.name, stat.st_size, stat.st_mtime_ns]
    return repr(value)


def _remember(notes: Path, found: Conversion, key: str) -> None:
    stat = found.path.stat()
    record: dict[str, Any] = {"key": key, "file": [stat.st_size, stat.st_mtime_ns]}
    record |= {"relative_rmse": found.relative_rmse, "errors": found.errors}
    fresh = notes.with_suffix(".json.part")
    fresh.write_text(json.dumps({**record, "warnings": found.warnings}), encoding="utf-8")
    fresh.replace(notes)


def _recall(path: Path, notes: Path, key: str) -> Conversion | None:
    """The conversion that left these notes; None when it is another one, or they are damaged."""
    try:
        record, stat = json.loads(notes.read_text(encoding="utf-8")), path.stat()
        if record["key"] != key or record["file"] != [stat.st_size, stat.st_mtime_ns]:
            return None
        errors = {str(name): float(error) for name, error in record["errors"].items()}
        warnings = tuple(map(str, record["warnings"]))
        return Conversion(path, float(record["relative_rmse"]), errors, warnings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
