"""Show what a GGUF file holds: metadata, tensors, formats, bits per weight."""

import json
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from edgeq.cli._terminal import harmless, human, is_terminal, note
from edgeq.text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from edgeq.gguf import Gguf

_VALUE_WIDTH = 80  # characters of a metadata value in the table
_FEW = 8  # array elements in the table


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--verify", is_flag=True, help="Look for NaN and Inf in every block; exit code 2.")
def command(file: str, tensors: bool, as_json: bool, verify: bool) -> None:
    """Show what a GGUF file holds: metadata, tensors, formats, bits per weight."""
    from edgeq.gguf import open_gguf

    with open_gguf(file) as gguf:
        for warning in gguf.warnings:
            note(f"warning: {warning}")
        problems = list(gguf.problems()) if verify else []
        if as_json:
            click.echo(json.dumps(_document(gguf, problems if verify else None), indent=1))
        else:
            _show(gguf, tensors)
            if verify and not problems:
                click.echo(f"verified: every block of {len(gguf.tensors)} tensors is finite")
    for problem in problems:
        click.echo(f"edgeq: {harmless(problem)}", err=True)
    if problems:
        raise click.exceptions.Exit(2)


def _count(shape: Iterable[int]) -> int:
    return math.prod(shape)


def _totals(gguf: "Gguf") -> dict[str, dict[str, int]]:
    """Per format, largest first: tensors, parameters, bytes."""
    totals: dict[str, dict[str, int]] = {}
    for info in gguf.tensors.values():
        row = totals.setdefault(info.format.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += _count(info.shape)
        row["bytes"] += info.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))


def _summary(gguf: "Gguf") -> tuple[int, float]:
    """Parameters and bits per weight of all tensors together."""
    totals = _totals(gguf).values()
    parameters = sum(row["parameters"] for row in totals)
    return parameters, 8 * sum(row["bytes"] for row in totals) / max(1, parameters)


def _document(gguf: "Gguf", problems: list[str] | None) -> dict[str, Any]:
    parameters, bits = _summary(gguf)
    document = {
        "file": str(gguf.path),
        "version": gguf.version,
        "size": gguf.size,
        "alignment": gguf.alignment,
        "parameters": parameters,
        "bits_per_weight": round(bits, 4),
        "formats": _totals(gguf),
        "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
        "tensors": [
            {
                "name": name,
                "shape": list(info.shape),
                "format": info.format.name,
                "offset": info.offset,
                "bytes": info.nbytes,
            }
            for name, info in gguf.tensors.items()
        ],
    }
    if problems is not None:
        document["problems"] = problems
    return document


def _plain(value: Any) -> Any:
    """A metadata value as JSON has it; NaN and Inf, which it has not, as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(gguf: "Gguf", tensors: bool) -> None:
    from rich.console import Console

    parameters, bits = _summary(gguf)
    click.echo(f"{printable(gguf.path, 1000)}: GGUF v{gguf.version}, {human(gguf.size)}")
    click.echo(
        f"{parameters:,} parameters in {len(gguf.tensors)} tensors, {bits:.2f} bits per weight"
    )
    console = Console(width=None if is_terminal(sys.stdout) else 160)
    console.print(_metadata_table(gguf))
    console.print(_format_table(gguf))
    if tensors:
        console.print(_tensor_table(gguf))


def _table(*columns: str, right: tuple[str, ...] = ()) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _metadata_table(gguf: "Gguf") -> "Table":
    from rich.text import Text

    table = _table("key", "type", "value")
    for key, value in gguf.metadata.items():
        table.add_row(*(Text(t) for t in (printable(key), gguf.value_types[key], _brief(value))))
    return table


def _brief(value: Any) -> str:
    """A metadata value on one line; of an array the size and the first elements.

    >>> _brief(list("abcdefghijkl"))
    '12: a b c d e f g h ...'
    """
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return printable(value, _VALUE_WIDTH)
    first = " ".join(_brief(item) for item in value[:_FEW])
    return printable(f"{len(value)}: {first}{' ...' if len(value) > _FEW else ''}", _VALUE_WIDTH)


def _format_table(gguf: "Gguf") -> "Table":
    table = _table(
        "format",
        "tensors",
        "parameters",
        "size",
        "share",
        right=("tensors", "parameters", "size", "share"),
    )
    totals = _totals(gguf)
    whole = sum(row["bytes"] for row in totals.values())
    for name, row in totals.items():
        table.add_row(
            name,
            str(row["tensors"]),
            f"{row['parameters']:,}",
            human(row["bytes"]),
            f"{row['bytes'] / max(1, whole):.1%}",
        )
    return table


def _tensor_table(gguf: "Gguf") -> "Table":
    from rich.text import Text

    table = _table("tensor", "shape", "format", "size", right=("shape", "size"))
    for name, info in gguf.tensors.items():
        shape = " × ".join(str(n) for n in info.shape)
        table.add_row(Text(printable(name)), shape, info.format.name, human(info.nbytes))
    return table
