"""List the boards and laptops that are known, and say which of them this machine is."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._table import show, table
from edgeq.cli._terminal import harmless

if TYPE_CHECKING:
    from edgeq.devices import Device


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the boards and laptops that are known, or show all that is known of NAME.

    * marks what this machine is. Speeds are of memory, in GB/s: measured, or (in brackets) computed
    from a data sheet; docs/devices.md names the sources.
    """
    from edgeq import devices

    here = devices.here()
    found = devices.every() if name is None else [devices.known(name)]
    if as_json:
        click.echo(json.dumps([_document(device, here) for device in found], indent=1))
    elif name is None:
        _list(found, here)
    else:
        _show(found[0])


def _document(device: "Device", here: "Device") -> dict[str, Any]:
    return {**dataclasses.asdict(device), "here": device.id == here.id}


def _list(found: list["Device"], here: "Device") -> None:
    rows = table("", "device", "what it is", "RAM", "threads", "GB/s", right=("GB/s",))
    for device in found:
        cells = (device.id, device.name, _sizes(device), _threads(device), _speed(device))
        rows.add_row("*" if device.id == here.id else "", *cells)
    show(rows)


def _show(device: "Device") -> None:
    rows = table("", "")
    for key, value in dataclasses.asdict(device).items():
        for i, text in enumerate(_rules(value) if key == "match" else _lines(value)):
            rows.add_row("" if i else key, harmless(text))
    show(rows)


def _lines(value: Any) -> list[str]:
    """A field as lines of text; none where nothing is known."""
    if not value:
        return []
    many = isinstance(value, tuple) and isinstance(value[0], dict)
    return [_text(row) for row in value] if many else [_text(value)]


def _rules(match: dict[str, Any]) -> list[str]:
    return [f"{key}: {_text(patterns)}" for key, patterns in match.items() if patterns]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(_text, value)) if isinstance(value, tuple) else str(value)


def _sizes(device: "Device") -> str:
    return "/".join(f"{size:g}" for size in sorted(device.ram_gib)) + " GB" * bool(device.ram_gib)


def _threads(device: "Device") -> str:
    """For generation and for prompts, where it is known."""
    few, many = device.decode_threads, device.prefill_threads
    return "" if few is None else f"{few}" if few == many else f"{few}, {many}"


def _speed(device: "Device") -> str:
    limits = [read for read in device.read if read.kind == "measured"] or list(device.read)
    if not limits:
        return ""
    best = max(limits, key=lambda read: (read.how == "read", read.gbs))
    return f"{best.gbs:g}" if best.kind == "measured" else f"({best.gbs:g})"
