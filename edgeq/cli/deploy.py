"""Collect what a board without internet needs: packages, a model, scripts to install and run."""

import dataclasses
import json
from pathlib import Path

import click

from edgeq.cli._terminal import human


@click.command()
@click.option("--bundle", required=True, type=click.Path(), help="Folder to make.")
@click.option("-m", "--model", metavar="MODEL", help="GGUF file, or user/repo[:quant] on the hub.")
@click.option("--machine", default="aarch64", help="CPU of the board, or x86_64. [aarch64]")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="VERSION",
    help="Python of the board; may be given several times. [3.11 and 3.13]",
)
@click.option("--force", is_flag=True, help="Replace an earlier bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    bundle: str,
    model: str | None,
    machine: str,
    pythons: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Collect edgeq, what it needs and a model in a folder, to carry to a board without internet.

    On the board: sh DIR/install.sh, then DIR/start.sh to chat. This machine needs pip and network.
    """
    from edgeq import deploy, hub
    from edgeq.cli._progress import bar

    folder, pythons = Path(bundle), pythons or deploy.PYTHONS
    deploy.check(folder, machine=machine, pythons=pythons, force=force)
    file = None if model is None else hub.model(model)
    with bar("bundle") as progress:
        made = deploy.make(
            folder, model=file, machine=machine, pythons=pythons, force=force, progress=progress
        )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(made), "folder": str(made.folder)}, indent=1))
        return
    what = [f"{made.files} files", human(made.size), f"linux-{made.machine}"]
    click.echo(f"{made.folder}: {', '.join([*what, 'Python ' + ' and '.join(made.pythons)])}")
    click.echo("copy it to the board and run: sh install.sh")
