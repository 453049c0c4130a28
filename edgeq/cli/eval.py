"""Measure how good a model is: perplexity, distance from a reference, questions answered."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._options import kv_options
from edgeq.cli._progress import bar
from edgeq.cli._terminal import Status, harmless
from edgeq.errors import RequestError
from edgeq.text import read_text

if TYPE_CHECKING:
    from rich.table import Table

    from edgeq.engine import Model
    from edgeq.evaluate import Evaluation
    from edgeq.questions import Answer, Question

_FILE = click.Path(exists=True, dir_okay=False)
_THREADS = click.IntRange(1, 256)


@click.command()
@click.argument("model")
@click.option("-f", "--file", type=_FILE, help="Text for perplexity (UTF-8).")
@click.option("-c", "--ctx-size", "ctx", type=click.IntRange(4), help="Tokens per window. [512]")
@click.option("--chunks", type=click.IntRange(1), help="Windows to use. [all]")
@click.option(
    "--reference", metavar="MODEL", help="Compare with this model: KL divergence and more."
)
@click.option("--questions", type=_FILE, help="JSON Lines of questions to answer; see below.")
@click.option("--raw", is_flag=True, help="Ask the questions as plain text: no chat template.")
@click.option("-t", "--threads", type=_THREADS, help="Threads. [what suits the machine]")
@click.option("-tb", "--threads-batch", type=_THREADS, help="Threads for prompts. [as -t]")
@kv_options
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
def command(
    model: str,
    file: str | None,
    ctx: int | None,
    chunks: int | None,
    reference: str | None,
    questions: str | None,
    raw: bool,
    threads: int | None,
    threads_batch: int | None,
    cache_type_k: str,
    cache_type_v: str,
    as_json: bool,
) -> None:
    """Measure how good MODEL is: a GGUF file, or user/repo[:quant] on the Hugging Face Hub.

    -f gives the perplexity as llama-perplexity defines it; with --reference, the statistics of its
    --kl-divergence, without a file between. --questions asks, one JSON object per line:

    \b
    {"question": "What is the capital of Japan?", "answer": "Tokyo", "task": "capitals"}
    {"question": "The sky is", "choices": ["blue", "loud"], "answer": 0}

    The first kind must be answered word by word; of choices the most likely must be the right one
    (the first is index 0). "task" groups the results and may be left out. ± is one standard error.
    """
    if not (file or questions):
        raise click.UsageError("nothing to do: give a text (-f), --questions, or both")
    if reference and not file:
        raise click.UsageError("--reference: needs a text: give one with -f")
    from edgeq.engine import DEFAULT_CONTEXT
    from edgeq.estimate import plain
    from edgeq.questions import read, summary

    asked = read(questions) if questions else []
    text = read_text(file) if file else ""
    options: dict[str, Any] = {"threads": threads, "threads_batch": threads_batch}
    if ctx is not None and ctx > DEFAULT_CONTEXT:
        options["ctx"] = ctx
    loads = [(model, {**options, "kv": (cache_type_k, cache_type_v)})]
    loads += [(reference, options)] if reference else []
    document: dict[str, Any] = {"model": model, "reference": reference}
    with _opened(loads) as models:
        if file:
            found = _evaluate(models, text, ctx, chunks)
            document |= {"file": file, **plain(found)}
        if asked:
            answers = _ask(models[0], asked, raw)
            document["questions"] = plain(summary(asked, answers))
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        _print(document)


@contextmanager
def _opened(loads: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list["Model"]]:
    """The models loaded, with a status line meanwhile."""
    import edgeq
    from edgeq import hub

    status = Status()
    with ExitStack() as stack:
        compiling = status.compiling()
        try:
            paths = [hub.model(name) for name, _ in loads]
            loaded = [
                stack.enter_context(edgeq.load(path, on_compile=compiling, **options))
                for path, (_, options) in zip(paths, loads)
            ]
        finally:
            status.clear()
        yield loaded


def _evaluate(
    models: "list[Model]", text: str, ctx: int | None, chunks: int | None
) -> "Evaluation":
    from edgeq.evaluate import evaluate

    room = min(model.ctx for model in models)
    if ctx is not None and ctx > room:
        raise RequestError(f"-c {ctx}: the context holds {room} tokens: give at most {room}")
    with bar("perplexity") as update:
        return evaluate(
            models[0],
            text,
            ctx,
            reference=models[1] if models[1:] else None,
            chunks=chunks,
            progress=lambda done, total, now: update(done, total, f"{now:.4f}"),
        )


def _ask(model: "Model", questions: "list[Question]", raw: bool) -> "list[Answer]":
    """The answers, with a bar meanwhile."""
    from edgeq import questions as asking

    with bar("questions") as update:
        return asking.ask(
            model,
            questions,
            raw=raw,
            progress=lambda done, total, right: update(done, total, f"{right} right"),
        )


def _print(document: dict[str, Any]) -> None:
    """Tables for people, on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    if "perplexity" in document:
        console.print(_figures(document))
    if "questions" in document:
        console.print(_tasks(document["questions"]))


def _figures(document: dict[str, Any]) -> "Table":
    """Every figure of the evaluation, a line each."""
    table = _table("", ("value", "± 1 σ"))
    windows = f"{document['windows']} windows of {document['ctx']}"
    table.add_row("tokens scored", f"{document['tokens']}", "", windows)
    d = document["divergence"]
    if d is None:
        _add(table, "perplexity", document["perplexity"])
        return table
    for key, name in _PERPLEXITIES.items():
        _add(table, name, d[key])
    table.add_row("correlation of ln PPL", _number(d["correlation"], 2), "", "%")
    table.add_section()
    _add(table, "KL divergence, mean", d["kld"], "nats", 6)
    _add_percentiles(table, d["kld_percentiles"], "nats", 6)
    table.add_section()
    _add(table, "change of p, mean", d["dp"], "%", 3)
    _add_percentiles(table, d["dp_percentiles"], "%", 3)
    _add(table, "change of p, RMS", d["dp_rms"], "%", 3)
    _add(table, "same top token", d["same_top"], "%", 3)
    return table


def _table(first: str, columns: tuple[str, ...]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("")
    return table


def _add(
    table: "Table", name: str, estimate: dict[str, Any], unit: str = "", digits: int = 4
) -> None:
    values = (_number(estimate[key], digits) for key in ("value", "error"))
    table.add_row(name, *values, unit)


def _add_percentiles(table: "Table", values: list[list[float]], unit: str, digits: int) -> None:
    names: dict[float, str] = {100: "maximum", 50: "median", 0: "minimum"}
    for percent, value in values:
        name = names.get(percent, f"{percent:g} %")
        table.add_row(f"  {name}", _number(value, digits), "", unit)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _tasks(questions: dict[str, Any]) -> "Table":
    """Right answers per task."""
    from rich.markup import escape

    raw = any(answer["scores"] for answer in questions["answers"])
    columns = ("right", "of", "accuracy", "95 % interval", *["by total log p"] * raw)
    table = _table("task", columns)
    rows = {**questions["tasks"], "all": questions["total"]}
    for task, c in rows.items():
        if task == "all":
            table.add_section()
        shares = (f"{100 * c[key]:.1f} %" for key in ("accuracy", *["accuracy_raw"] * raw))
        accuracy, *rest = shares
        interval = f"{100 * c['low']:.1f} to {100 * c['high']:.1f} %"
        name = escape(harmless(task))
        table.add_row(name, f"{c['right']}", f"{c['count']}", accuracy, interval, *rest)
    return table


_PERPLEXITIES = {
    "ppl": "perplexity",
    "ppl_base": "perplexity of the reference",
    "ratio": "ratio",
    "ln_ratio": "ln of the ratio",
    "difference": "difference",
}
