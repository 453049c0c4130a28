"""The decision table: what each recipe of a model costs, and what it gives.

A checkpoint becomes one file per recipe; of each are measured the size, the speed, the memory, the
divergence from the reference and, if there are any, the answers to the user's own questions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeq import memory, questions
from edgeq.compare.conversions import Candidate, Conversion, check, convert, parse
from edgeq.compare.speed import Lengths, Speed, measure
from edgeq.engine import load
from edgeq.errors import RequestError
from edgeq.estimate import plain
from edgeq.evaluate import CONTEXT, Evaluation, evaluate_all
from edgeq.gguf import open_gguf
from edgeq.questions import Question

__all__ = ["DEFAULTS", "Candidate", "Lengths", "Plan", "compare", "parse"]

_RECIPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
DEFAULTS = tuple(Candidate(recipe) for recipe in _RECIPES)
# (what is being done, steps done, steps in all, more about the step at hand)
Progress = Callable[[str, int, int, str], None]
OnCompile = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to compare, and with what.

    text: for perplexity and divergence. reference: what the others are compared with; default F16
    of the source. ctx, chunks: as for `edgeq.evaluate.evaluate`. lengths: None = no speed. options:
    further arguments of `edgeq.pipeline.run`.
    """

    text: str
    candidates: Sequence[Candidate] = DEFAULTS
    reference: Candidate = DEFAULTS[0]
    ctx: int | None = None
    chunks: int | None = None
    questions: Sequence[Question] = ()
    raw: bool = False
    lengths: Lengths | None = field(default_factory=Lengths)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Row:
    """One candidate, and what is known of it so far."""

    candidate: Candidate
    conversion: Conversion
    evaluation: Evaluation | None = None
    answers: dict[str, Any] | None = None
    speed: Speed | None = None


def compare(
    source: str | Path,
    plan: Plan,
    folder: Path,
    *,
    progress: Progress | None = None,
    on_compile: OnCompile | None = None,
) -> dict[str, Any]:
    """The table as plain data: JSON can hold it, `edgeq.report.html` draws it.

    folder: where the files are made; those that an earlier comparison left there are used again.
    `rows` are sorted by size; each has `size` and `peak_ram` in bytes, `speed` in tokens per
    second, `evaluation` (see `edgeq.evaluate.Evaluation`), `questions`, and the `tensors` with
    their formats and relative errors.

    Raises RequestError (plan, text), ResourceError (a file in `folder` that is not ours), and as
    `edgeq.pipeline.run` and `edgeq.load`.
    """
    tell = progress or (lambda *_: None)
    candidates = _unique([plan.reference, *plan.candidates])
    folder.mkdir(parents=True, exist_ok=True)
    check(candidates, folder, plan.options)
    rows = list(_convert_all(Path(source), candidates, plan, folder, tell))
    _evaluate_all(rows, plan, tell, on_compile)
    if plan.questions:
        _ask_all(rows, plan, tell, on_compile)
    if plan.lengths:
        for done, row in enumerate(rows):
            tell("speed", done, len(rows), row.candidate.name)
            row.speed = measure(row.conversion.path, plan.lengths)
    return _document(source, rows, plan)


def _unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    found = {candidate.name: candidate for candidate in reversed(candidates)}
    for candidate in candidates:
        if found[candidate.name] != candidate:
            raise RequestError(f"{candidate.name}: twice, as different things: rename one")
    return [found[name] for name in dict.fromkeys(candidate.name for candidate in candidates)]


def _convert_all(
    source: Path, candidates: Sequence[Candidate], plan: Plan, folder: Path, tell: Progress
) -> Iterator[_Row]:
    for index, candidate in enumerate(candidates):

        def advance(
            done: int, total: int, _: str, at: int = index, of: str = candidate.name
        ) -> None:
            tell("converting", at, len(candidates), f"{of} {100 * done // max(total, 1)} %")

        yield _Row(candidate, convert(source, candidate, folder, plan.options, advance))


def _evaluate_all(
    rows: Sequence[_Row], plan: Plan, tell: Progress, on_compile: OnCompile | None
) -> None:
    """As many models at a time as memory holds: the reference is read once for all of them."""
    ctx = plan.ctx or min(CONTEXT, _context(rows[0].conversion.path))
    groups = list(_groups(rows[1:]))
    for index, group in enumerate(groups):
        with ExitStack() as stack:
            models = [
                stack.enter_context(load(row.conversion.path, ctx=ctx, on_compile=on_compile))
                for row in (rows[0], *group)
            ]

            def advance(done: int, total: int, now: float, at: int = index) -> None:
                tell("evaluating", at * total + done, len(groups) * total, f"perplexity {now:.4f}")

            found = evaluate_all(
                models,
                plan.text,
                ctx,
                reference=models[0],
                chunks=plan.chunks,
                progress=advance,
            )
        for row, evaluation in zip((rows[0], *group), found):
            row.evaluation = evaluation


def _context(path: Path) -> int:
    """Tokens that a model was trained on."""
    from edgeq import models

    with open_gguf(path) as gguf:
        return models.arch_of(gguf).context_length


def _groups(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows whose files fit in half of the free memory together; at least one, if there is none."""
    room, group, size = memory.available() // 2, list[_Row](), 0
    for row in rows:
        nbytes = row.conversion.path.stat().st_size
        if group and size + nbytes > room:
            yield group
            group, size = [], 0
        group.append(row)
        size += nbytes
    yield group


def _ask_all(
    rows: Sequence[_Row], plan: Plan, tell: Progress, on_compile: OnCompile | None
) -> None:
    for index, row in enumerate(rows):

        def advance(done: int, total: int, right: int, at: int = index) -> None:
            name = rows[at].candidate.name
            tell("asking", at * total + done, len(rows) * total, f"{name} {right} right")

        with load(row.conversion.path, on_compile=on_compile) as model:
            answers = questions.ask(model, plan.questions, raw=plan.raw, progress=advance)
        row.answers = questions.summary(plan.questions, answers)


def _document(source: str | Path, rows: Sequence[_Row], plan: Plan) -> dict[str, Any]:
    evaluation, speed = rows[0].evaluation, rows[0].speed
    assert evaluation is not None
    machine = {"cpu": speed.cpu, "isa": speed.isa, "threads": speed.threads} if speed else None
    tables = [_table(row) for row in rows]
    document: dict[str, Any] = plain(
        {
            "source": str(source),
            "reference": rows[0].candidate.name,
            "text": {
                "ctx": evaluation.ctx,
                "windows": evaluation.windows,
                "tokens": evaluation.tokens,
            },
            "machine": machine,
            "rows": sorted(tables, key=lambda table: (-table["bits_per_weight"], table["name"])),
        }
    )
    return document


def _table(row: _Row) -> dict[str, Any]:
    tensors = list(_tensors(row))
    weights = sum(math.prod(tensor["shape"]) for tensor in tensors)
    return {
        "name": row.candidate.name,
        "recipe": row.candidate.recipe,
        "method": None if row.candidate.file else row.candidate.method,
        "file": str(row.conversion.path),
        "size": row.conversion.path.stat().st_size,
        "bits_per_weight": 8 * sum(tensor["nbytes"] for tensor in tensors) / weights,
        "relative_rmse": row.conversion.relative_rmse,
        "warnings": row.conversion.warnings,
        "evaluation": row.evaluation,
        "speed": row.speed,
        "questions": row.answers,
        "tensors": tensors,
    }


def _tensors(row: _Row) -> Iterator[dict[str, Any]]:
    with open_gguf(row.conversion.path) as gguf:
        for name, info in gguf.tensors.items():
            yield {
                "name": name,
                "shape": info.shape,
                "format": info.format.name,
                "nbytes": info.nbytes,
                "relative_rmse": row.conversion.errors.get(name),
            }
