"""Compare recipes of one model: size, memory, speed, quality, answers; as a table and a page."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._progress import bar
from edgeq.cli._table import table
from edgeq.cli._terminal import Status, harmless, is_terminal, note
from edgeq.text import read_text, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from edgeq.compare import Plan

_FILE = click.Path(exists=True, dir_okay=False)
_WIDE = 110  # columns that the whole table needs
_OUT = click.Path(dir_okay=False, allow_dash=True)


@click.command()
@click.argument("src")
@click.option(
    "-t",
    "--type",
    "types",
    multiple=True,
    metavar="RECIPE[:METHOD],...",
    help="What to compare; also FILE.gguf. [F16,Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_M,Q2_K]",
)
@click.option("-f", "--file", type=_FILE, required=True, help="Text for the divergence (UTF-8).")
@click.option("-c", "--ctx-size", "ctx", type=click.IntRange(4), help="Tokens per window. [512]")
@click.option("--chunks", type=click.IntRange(1), help="Windows to use. [all]")
@click.option("--reference", default="F16", metavar="TYPE", help="What is compared with. [F16]")
@click.option("--questions", type=_FILE, help="JSON Lines of questions, as for `edgeq eval`.")
@click.option("--raw", is_flag=True, help="Ask the questions as plain text: no chat template.")
@click.option("--dir", "folder", type=click.Path(file_okay=False), help="Keep the files there.")
@click.option("-p", "--n-prompt", type=click.IntRange(1), help="Prompt to time. [512, or context]")
@click.option("-n", "--n-gen", type=click.IntRange(1), help="Answer to time. [128, or context]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, help="Repetitions. [3]")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads. [what suits the machine]")
@click.option("--no-speed", is_flag=True, help="Measure neither speed nor memory.")
@click.option("--imatrix", type=_FILE, help="Importance matrix for all quantized candidates.")
@click.option("--hessian", type=_FILE, help="Hessians, for the methods that need them.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source already quantized.")
@click.option("--json", "json_out", type=_OUT, help="Write all results as JSON; - = stdout.")
@click.option("--html", "html_out", type=_OUT, help="Write a page with tables and plots.")
def command(
    src: str,
    types: tuple[str, ...],
    file: str,
    ctx: int | None,
    chunks: int | None,
    reference: str,
    questions: str | None,
    raw: bool,
    folder: str | None,
    n_prompt: int | None,
    n_gen: int | None,
    repetitions: int,
    threads: int | None,
    no_speed: bool,
    imatrix: str | None,
    hessian: str | None,
    allow_requantize: bool,
    json_out: str | None,
    html_out: str | None,
) -> None:
    """Compare recipes of SRC, a checkpoint folder, a GGUF file of floats or user/repo.

    Each recipe becomes a file, which is measured: size, peak memory and speed in a process of its
    own, divergence from the F16 file on a text, answers to your questions. The page of --html needs
    no network and no other file. With --dir the files stay, and are used again next time.
    """
    from edgeq import checks
    from edgeq.compare import DEFAULTS, Lengths, Plan, parse
    from edgeq.questions import read

    names = [name for text in types for name in text.split(",") if name]
    plan = Plan(
        text=read_text(file),
        candidates=[parse(name) for name in names] or DEFAULTS,
        reference=parse(reference),
        ctx=ctx,
        chunks=chunks,
        questions=read(questions) if questions else (),
        raw=raw,
        lengths=None if no_speed else Lengths(n_prompt, n_gen, repetitions, threads),
        options=_options(imatrix, hessian, allow_requantize),
    )
    outputs = [path for path in (json_out, html_out) if path not in (None, "-")]
    for path in outputs:
        if not Path(str(path)).absolute().parent.is_dir():
            raise click.UsageError(f"{path}: its folder does not exist")
    inputs = [("text", file), ("questions", questions), ("importance matrix", imatrix)]
    inputs += [("file of Hessians", hessian), ("source", src)]
    inputs += [("file to compare", str(c.file)) for c in plan.candidates if c.file]
    checks.outputs(outputs, [(what, path) for what, path in inputs if path is not None])
    document = _compare(src, plan, folder)
    for row in document["rows"]:
        for warning in row["warnings"]:
            note(f"warning: {row['name']}: {warning}")
    if json_out != "-" and html_out != "-":
        _print(document)
    if json_out:
        _write(json_out, json.dumps(document, indent=1))
    if html_out:
        from edgeq.report import html

        _write(html_out, html(document))


def _options(imatrix: str | None, hessian: str | None, allow_requantize: bool) -> dict[str, Any]:
    """Of all conversions."""
    options: dict[str, Any] = {"allow_requantize": True} if allow_requantize else {}
    files = {"importance": imatrix, "hessians": hessian}
    return options | {name: Path(file) for name, file in files.items() if file}


def _compare(src: str, plan: "Plan", folder: str | None) -> dict[str, Any]:
    import edgeq
    from edgeq import hub
    from edgeq.compare import compare

    source, status = hub.checkpoint(src), Status()
    with ExitStack() as stack:
        work = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeq-"))
        show = stack.enter_context(_phases())
        stack.callback(status.clear)
        compiling = None if is_terminal(sys.stderr) else status.compiling()
        document = compare(source, plan, Path(work), progress=show, on_compile=compiling)
    return {**document, "source": src, "edgeq": edgeq.__version__}


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int, str], None]]:
    """One bar after the other, as the work goes on."""
    with ExitStack() as stack:
        now: list[str] = []
        updates: list[Callable[[int, int, str], None]] = []

        def show(phase: str, done: int, total: int, text: str) -> None:
            if now != [phase]:
                stack.close()
                now[:], updates[:] = [phase], [stack.enter_context(bar(phase))]
            updates[0](done, total, text)

        yield show


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text)
    else:
        write_text(path, text + "\n")
        note(f"written: {path}")


def _print(document: dict[str, Any]) -> None:
    """One table, or on a narrow terminal one of costs and one of quality."""
    from rich.console import Console

    wide = None if is_terminal(sys.stdout) else _WIDE  # a pipe has no width to fit in
    console = Console(highlight=False, width=wide)
    parts = [{**_COSTS, **_QUALITY}] if console.width >= _WIDE else [_COSTS, _QUALITY]
    for columns in parts:
        console.print(_table(document, columns))


def _table(document: dict[str, Any], columns: "Columns") -> "Table":
    from rich.markup import escape

    rows = document["rows"]
    shown = {head: cell for head, cell in columns.items() if any(map(cell, rows))}
    made = table("recipe", *shown, right=tuple(shown), whole=True)
    for row in rows:
        mark = " (ref)" if row["name"] == document["reference"] else ""
        cells = (cell(row) or "-" for cell in shown.values())
        made.add_row(escape(harmless(row["name"])) + mark, *cells)
    return made


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _speed(row: dict[str, Any], key: str) -> str:
    return f"{row['speed'][key]['value']:.1f}" if row["speed"] else ""


def _divergence(row: dict[str, Any], key: str, digits: int, *parts: str) -> str:
    estimate = row["evaluation"]["divergence"][key]
    found = (estimate[part] for part in ("value", *parts))
    return " ± ".join("-" if number is None else f"{number:.{digits}f}" for number in found)


def _right(row: dict[str, Any]) -> str:
    count = row["questions"] and row["questions"]["total"]
    return f"{count['right']}/{count['count']}" if count else ""


def _error(row: dict[str, Any]) -> str:
    return "" if row["relative_rmse"] is None else f"{100 * row['relative_rmse']:.2f}"


# Heads and what stands below; a column without a single entry is left out.
Columns = dict[str, Callable[[dict[str, Any]], str]]
_COSTS: Columns = {
    "size\nMiB": lambda row: _mib(row["size"]),
    "bits per\nweight": lambda row: f"{row['bits_per_weight']:.2f}",
    "peak RAM\nMiB": lambda row: _mib(row["speed"]["peak_ram"]) if row["speed"] else "",
    "prompt\ntok/s": lambda row: _speed(row, "prefill"),
    "answer\ntok/s": lambda row: _speed(row, "decode"),
}
_QUALITY: Columns = {
    "PPL\nratio": lambda row: _divergence(row, "ratio", 4),
    "KL divergence\nnats": lambda row: _divergence(row, "kld", 5, "error"),
    "same\ntop %": lambda row: _divergence(row, "same_top", 2),
    "right\nanswers": _right,
    "weight\nerror %": _error,
}
