"""Running commands in tests."""

import io
from pathlib import Path

from click.testing import CliRunner, Result

from edgeq.cli import app

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny-home"


def edgeq(*args: object, stdin: str | None = None) -> Result:
    """`edgeq ARGS` in this process, away from any terminal."""
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="edgeq")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True
