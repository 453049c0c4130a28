"""Find out which columns of a model's weights matter, from a text: an importance matrix."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._progress import bar
from edgeq.cli._terminal import Status, harmless, note

if TYPE_CHECKING:
    from edgeq.calibration import Report
    from edgeq.imatrix import Imatrix


@click.command()
@click.argument("model", required=False)
@click.option("-f", "--file", "text", type=click.Path(), help="Text to read, UTF-8.")
@click.option("-o", "--out", type=click.Path(), help="File to write. [imatrix.gguf]")
@click.option("-c", "--ctx-size", "ctx", type=int, help="Tokens per chunk. [512, or the model's]")
@click.option("--chunks", type=click.IntRange(1), help="Read so many chunks at most. [all]")
@click.option("--hessian", type=click.Path(), metavar="FILE", help="Also write Hessians, for GPTQ.")
@click.option("--process-output", is_flag=True, help="Include the output matrix.")
@click.option("--parse-special", is_flag=True, help="Control tokens in the text count as such.")
@click.option(
    "--in-file", "parts", type=click.Path(), multiple=True, metavar="FILE", help="Merge this in."
)
@click.option("--show-statistics", is_flag=True, help="Print what the matrix says of each tensor.")
@click.option("--output-format", type=click.Choice(["gguf", "dat"]), default="gguf", help="[gguf]")
@click.option("-t", "--threads", type=click.IntRange(1), help="[one per core]")
@click.option(
    "--save-every", type=click.FloatRange(0), default=30.0, help="Seconds between saves. [30]"
)
@click.option(
    "--force", is_flag=True, help="Replace existing files, and what another unfinished run left."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    model: str | None,
    text: str | None,
    out: str | None,
    parts: tuple[str, ...],
    show_statistics: bool,
    output_format: str,
    as_json: bool,
    force: bool,
    **options: Any,
) -> None:
    """Read a text with MODEL and write how strongly each input channel of each weight is used.

    MODEL is a GGUF file of floats, or a checkpoint folder. `edgeq convert --imatrix` uses the
    result, as does llama-quantize. Without MODEL, files given by --in-file are merged, or shown. A
    run that was interrupted goes on where it was when the same command is given again.

    Calibrate on text like that of the model's use, and evaluate on other text.
    """
    from edgeq import calibration, checks, imatrix

    target = Path(out or f"imatrix.{output_format}")
    writes = model is not None or bool(out) or not show_statistics
    if writes:
        checks.outputs([target, options["hessian"]], [("file to merge", part) for part in parts])
    given = [imatrix.read(part) for part in parts]
    report: Report | None = None
    if model is not None:
        if text is None:
            raise click.UsageError("a text is needed: give -f FILE")
        report = _run(model, text, target, given, output_format, force, options)
        found = report.imatrix
    elif text is not None or not given:
        raise click.UsageError("give MODEL and -f FILE, or files to merge with --in-file")
    else:
        found = imatrix.merge(given)
        if writes:
            calibration.save(found, target, output_format, force=force)
    if as_json:
        click.echo(json.dumps(_document(found, target, report, show_statistics), indent=1))
        return
    if show_statistics:
        _show(found)
    if writes:
        click.echo(_summary(found, target, report))


def _run(
    model: str,
    text: str,
    out: Path,
    given: "list[Imatrix]",
    output_format: str,
    force: bool,
    options: dict[str, Any],
) -> "Report":
    from edgeq import calibration

    hessian, threads, save_every = (options.pop(n) for n in ("hessian", "threads", "save_every"))
    if Path(model).is_dir():
        note(f"{model}: is converted to floats of 16 bits for this run, beside {out}")
    status = Status()
    with bar("chunks") as update:
        report = calibration.run(
            model,
            text,
            out,
            calibration.Settings(**options),
            hessian_out=hessian,
            add=given,
            output_format=output_format,
            threads=threads,
            force=force,
            save_every=save_every,
            progress=lambda done, total: update(done, total, ""),
            on_compile=status.compiling(),
        )
    status.clear()
    if report.resumed:
        note(f"went on after {report.resumed} chunks of an earlier run")
    for warning in report.warnings:
        note(f"warning: {warning}")
    return report


def _summary(found: "Imatrix", path: Path, report: "Report | None") -> str:
    size = f"{len(found.sums)} entries, {found.chunk_count} chunks of {found.chunk_size} tokens"
    took = f", {report.seconds:.1f} s" if report else ""
    return harmless(f"{path}: {size}{took}")


def _document(
    found: "Imatrix", path: Path, report: "Report | None", statistics: bool
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "file": str(path),
        "entries": len(found.sums),
        "chunks": found.chunk_count,
        "chunk_size": found.chunk_size,
        "datasets": list(found.datasets),
    }
    if report is not None:
        names = ("tokens", "resumed", "passes", "warnings")
        document |= {name: getattr(report, name) for name in names}
        document["seconds"] = round(report.seconds, 3)
    if statistics:
        from edgeq.imatrix import statistics as of

        document["tensors"] = [asdict(tensor) for tensor in of.tensors(found)]
        document["layers"] = [asdict(layer) for layer in of.layers(found)]
    return document


_TENSOR_COLUMNS = ("layer", "tensor", "Σ E[x²]", "min", "max", "μ", "σ", "N")
_MORE_COLUMNS = ("entropy", "of most", "ZD", "cosine")


def _show(found: "Imatrix") -> None:
    """llama-imatrix's two tables."""
    from rich.console import Console

    from edgeq.imatrix import statistics as of

    by_tensor = _table((*_TENSOR_COLUMNS, *_MORE_COLUMNS))
    for t in of.tensors(found):
        values = (f"{v:.4f}" for v in (t.sum, t.min, t.max, t.mean, t.deviation))
        kind = harmless(t.name).removeprefix(f"blk.{t.layer}.").removesuffix(".weight")
        shares = (f"{t.entropy:.4f}", f"{t.evenness:.2%}", f"{t.zd:.2%}", _cosine(t.cosine))
        layer = "-" if t.layer is None else str(t.layer)
        by_tensor.add_row(layer, kind, *values, str(t.channels), *shares)
    by_layer = _table(("layer", "Σ E[x²]", "ZD", "cosine"))
    for one in of.layers(found):
        by_layer.add_row(str(one.layer), f"{one.sum:.4f}", f"{one.zd:.2%}", _cosine(one.cosine))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file or a pipe is as wide as it must be
        console = Console(highlight=False, markup=False, width=200)
    console.print(by_tensor, by_layer)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(columns: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "tensor" else "right", no_wrap=True)
    return table
