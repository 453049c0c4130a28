"""Say what is wrong with this machine's set-up: system, CPU, heat, memory, disk, kernels."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli._terminal import Status, harmless, is_terminal

if TYPE_CHECKING:
    from edgeq.doctor import Finding

_COLOURS = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}
_MOST = 100  # columns: longer lines are hard to read


@click.command()
@click.argument("place", type=click.Path(exists=True), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(place: str, as_json: bool) -> None:
    """Say what is wrong with this machine's set-up, and what to do about it.

    PLACE is a file or folder on the disk that models are on; by default this folder. Nothing is
    changed, at most half a second is spent on reading the disk. ok: as it should be; info: good to
    know; warn: it works, but slower or less safely than it could; fail: it does not work like this.

    The exit code is 1 when a line says fail, else 0.
    """
    from edgeq.doctor import System, examine

    status, found = Status(), []
    if is_terminal(sys.stderr):
        status("looking at this machine")
    try:
        found = list(examine(System(place=Path(place))))
    finally:
        status.clear()
    count = Counter[str](finding.state for finding in found)
    if as_json:
        counts = {state: count[state] for state in _COLOURS}
        document = {"findings": [asdict(finding) for finding in found], "counts": counts}
        click.echo(json.dumps(document, indent=1))
    elif is_terminal(sys.stdout):
        _show(found, count)
    else:
        for finding in found:
            click.echo(harmless(_line(finding)))
    if count["fail"]:
        raise click.exceptions.Exit(1)


def _line(finding: "Finding") -> str:
    """
    >>> from edgeq.doctor import Finding
    >>> _line(Finding("clock", "warn", "set to 1970", "set it"))
    'warn  clock          set to 1970 -> set it'
    """
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.state:5} {finding.topic:14} {finding.text}{remedy}"


def _show(found: "list[Finding]", count: Counter[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 1))
    for width in (4, max(len(finding.topic) for finding in found)):
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for finding in found:
        if finding.group != group:
            group = finding.group
            table.add_row("", Text(group, style="bold"))
        text = Text(harmless(finding.text))
        if finding.remedy:
            text.append(f"\n-> {harmless(finding.remedy)}", style=_COLOURS[finding.state])
        table.add_row(Text(finding.state, style=_COLOURS[finding.state]), finding.topic, text)
    console.print(table, width=min(console.width, _MOST))
    console.print(_verdict(count))


def _verdict(count: Counter[str]) -> str:
    """
    >>> _verdict(Counter({"ok": 9, "warn": 1, "fail": 2}))
    '2 to repair, 1 to improve'
    >>> _verdict(Counter({"ok": 9}))
    'nothing to repair'
    """
    parts = [f"{count['fail']} to repair"] if count["fail"] else ["nothing to repair"]
    parts += [f"{count['warn']} to improve"] if count["warn"] else []
    return ", ".join(parts)
