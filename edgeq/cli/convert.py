"""Turn a Hugging Face checkpoint, or a GGUF file of floats, into a quantized GGUF file."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._terminal import human, note

if TYPE_CHECKING:
    from edgeq.pipeline import ConversionReport

_STARTING = "starting (first use compiles)"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_MAX_SIZE = 1 << 60  # bytes; more than any disk has


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes: 600MB, 1.5GiB, or a plain number; in capitals or not."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r:.60}: expected a number of bytes, as 600MB or 1.5GiB", param, ctx)
        number, prefix, binary = match.groups()
        power = ("", "k", "m", "g", "t").index((prefix or "").lower())
        size = float(number) * (1024 if binary else 1000) ** power
        if not 1 <= size <= _MAX_SIZE:
            self.fail(f"{value!r:.60}: expected 1 byte to {human(_MAX_SIZE)}", param, ctx)
        return int(size)


class _Convert(click.Command):
    """Names the methods there are in its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from edgeq.quantizers import about, available

        with formatter.section("Methods"):
            formatter.write_dl([(name, about(name)) for name in available()])


@click.command(cls=_Convert)
@click.argument("src")
@click.option("-o", "--out", type=click.Path(), help="File or folder to write. [current folder]")
@click.option(
    "-t",
    "--type",
    "recipe",
    help="Recipe, or a recipe file. [one of 4 bits; for a quantized checkpoint its own]",
)
@click.option("--bpw", type=float, help="Search a recipe of so many bits per weight, as 4.25.")
@click.option("--size", type=Size(), help="Search a recipe for a file of this size, as 600MB.")
@click.option("--outliers", is_flag=True, help="Keep the most sensitive matrices in Q8_0 or F16.")
@click.option("--save-recipe", type=click.Path(), help="Write the recipe, for -t, to this file.")
@click.option("--method", default="search", metavar="NAME", help="Quantizer, see below. [search]")
@click.option(
    "--imatrix",
    type=click.Path(),
    metavar="FILE",
    help="Importance matrix of edgeq calibrate or llama-imatrix: which columns matter.",
)
@click.option(
    "--hessian",
    type=click.Path(),
    metavar="FILE",
    help="Hessians of edgeq calibrate: how inputs of a matrix are correlated.",
)
@click.option("--force", is_flag=True, help="Replace a file, or the rest of another conversion.")
@click.option("--threads", type=click.IntRange(1), help="Threads for quantizing. [one per core]")
@click.option("--allow-requantize", is_flag=True, help="Accept a GGUF file already quantized.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    src: str,
    out: str | None,
    recipe: str | None,
    bpw: float | None,
    size: int | None,
    outliers: bool,
    save_recipe: str | None,
    method: str,
    imatrix: str | None,
    hessian: str | None,
    force: bool,
    threads: int | None,
    allow_requantize: bool,
    as_json: bool,
) -> None:
    """Turn SRC into a quantized GGUF file.

    SRC is a checkpoint folder (safetensors), a GGUF file, or user/repo on the Hugging Face Hub. The
    same command goes on with an interrupted conversion, whose work is kept in OUT.part.
    """
    from edgeq import hub, pipeline
    from edgeq.choosing import Target
    from edgeq.recipe import save

    if save_recipe is not None:
        files = (("importance matrix", imatrix), ("file of Hessians", hessian), ("model", out))
        _refuse_recipe(save_recipe, force, [("recipe", recipe), ("source", src), *files])
    source = hub.checkpoint(src)
    with _stoppable() as check, _progress(check) as advance:
        report = pipeline.run(
            source,
            out,
            recipe,
            method=method,
            importance=imatrix,
            hessians=hessian,
            target=Target(bpw=bpw, size=size, outliers=outliers),
            force=force,
            threads=threads,
            progress=advance,
            allow_requantize=allow_requantize,
        )
    if report.resumed:
        note(f"went on with an interrupted conversion: {report.resumed} tensors were finished")
    if save_recipe is not None:
        save(report.mixture, save_recipe, force=force)
    if report.why:
        note(report.why)
    for warning in report.warnings:
        note(f"warning: {warning}")
    click.echo(json.dumps(_document(report), indent=1) if as_json else _summary(report))


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Ctrl-C and its kin take effect when the yielded function is called; a second one at once.

    Between the steps of the work nothing is half done.
    """
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            check()
        note("stopping after this step; the same command will go on from there")

    def check() -> None:
        if received[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt
        if received:
            sys.exit(128 + received[0])

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup
    before = [(number, signal.signal(number, on_signal)) for number in heard]
    try:
        yield check
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def _progress(check: Callable[[], None]) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, shown to a person only; each step is also an occasion to stop."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    name = TextColumn("{task.description}", table_column=Column(width=30, no_wrap=True))
    columns = (name, BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(_STARTING, total=None)

        def advance(done: int, total: int, tensor: str) -> None:
            check()
            shown = escape(tensor) if 100 * done > total else _STARTING
            bar.update(task, completed=done, total=total, description=shown)

        yield advance


def _refuse_recipe(path: str, force: bool, others: list[tuple[str, str | None]]) -> None:
    """Say it before hours of work: the recipe cannot be saved there."""
    from edgeq import checks
    from edgeq.data import refuse_target

    checks.outputs([path], [(what, other) for what, other in others if other is not None])
    refuse_target(path, force=force)


def _summary(report: "ConversionReport") -> str:
    return (
        f"{report.path}: {report.recipe}, {human(report.nbytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, "
        f"relative error {report.relative_rmse:.4f}, {report.seconds:.1f} s"
    )


def _document(report: "ConversionReport") -> dict[str, object]:
    return {
        "file": str(report.path),
        "recipe": report.recipe,
        "why": report.why,
        "size": report.nbytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "relative_rmse": round(report.relative_rmse, 6),
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
        "warnings": list(report.warnings),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "format": tensor.format,
                "method": tensor.method,
                "bytes": tensor.nbytes,
                "relative_rmse": round(tensor.relative_rmse, 6),
                "kept": tensor.kept,
            }
            for tensor in report.tensors
        ],
    }
