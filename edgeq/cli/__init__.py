"""Command line. A command is a file here: its name, and its help is that file's first line.

Only the module of the invoked command is imported, so `edgeq --help` stays fast on a small board.
"""

import ast
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from edgeq import __version__
from edgeq.cli._terminal import harmless
from edgeq.errors import EdgeqError

__all__ = ["app", "main"]

_DEBUG = "edgeq.debug"


class Failure(click.ClickException):
    """An error of ours, shown on one line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"edgeq: {harmless(' '.join(self.message.split()))}", err=True)


class Commands(click.Group):
    """Group whose commands are the modules of this folder, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name for name in names if not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        if not any(option.name == "debug" for option in command.params):
            command.params.append(_debug_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in self.list_commands(ctx)])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt:  # where click itself would say "Aborted!" and exit with 1
            _interrupted()
        except click.UsageError as error:
            raise _misused(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted()
        except BrokenPipeError:
            _leave_quietly()
        except click.UsageError as error:
            raise _misused(error) from None
        except (EdgeqError, OSError, MemoryError) as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise Failure(_message(error)) from None


def _misused(error: click.UsageError) -> click.ClickException:
    """The same on one line, with where to look; a bare command's help stays what it is."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    where = error.ctx.command_path if error.ctx else "edgeq"
    return Failure(f"{error.format_message().rstrip('.')}: see `{where} --help`")


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[_DEBUG] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Show a traceback when something fails.",
    )


def _summary(name: str) -> str:
    """First docstring line of a command's file, read without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _message(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'close other programs or use a smaller model'}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _interrupted() -> NoReturn:
    click.echo("edgeq: interrupted", err=True)
    sys.exit(128 + signal.SIGINT)


def _leave_quietly() -> NoReturn:
    """The reader of our output has gone (`edgeq inspect FILE | head`): that is not an error."""
    # Python flushes stdout once more at exit: give it somewhere harmless to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[_debug_option()],
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def app() -> None:
    """Quantize Hugging Face checkpoints to GGUF and run them on this CPU."""


def main() -> None:
    """Entry point, once everything is imported: see `edgeq.__main__`."""
    # Leaving through an exception lets a writer remove its unfinished file.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda received, frame: sys.exit(128 + received))
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="edgeq")


def _open_streams() -> None:
    """Give what the caller closed (`edgeq run ... <&-`) a harmless end; Python has None for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            flags = os.O_RDONLY if mode == "r" else os.O_WRONLY
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))
