"""Runs cases of kernelcases.py and its like beside a forbidden page, in a child of their own.

As a program it reads lines of cases [function, args, options] and answers each line with a line of
JSON: null, or which case went wrong and how (a signal, or an exception). Each case runs twice, with
memory that ends at the page and with memory that starts behind it.
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import emitcases
import gatedcases
import kernelcases
import kernelkit as kit

Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def case(function: str, *args: Any, **options: Any) -> Case:
    return function, args, options


class Fence:
    """The program as a server, started at the first question."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        path = os.pathsep.join([str(Path(kit.blocks.__file__).parents[1]), *sys.path])
        env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        assert self._server.stdin
        assert self._server.stdout
        self._questions, self._answers = self._server.stdin, self._server.stdout

    def ask(self, cases: list[Case]) -> str | None:
        self._questions.write(json.dumps(cases) + "\n")
        self._questions.flush()
        return json.loads(self._answers.readline())

    def close(self) -> None:
        self._questions.close()
        self._server.wait(10)
        self._answers.close()


def in_child(cases: list[Case]) -> str | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        run(cases, writer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        case, _, error = file.read().rpartition("\0")[2].partition("\n")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"{case} died of {signal.Signals(os.WTERMSIG(status)).name}"
    return f"{case}: {error}" if error else None


def run(cases: list[Case], writer: int) -> None:
    """Writes each case before it starts, so that the last one is known after a crash."""
    try:
        for edge, (function, args, options) in itertools.product(("end", "front"), cases):
            os.write(writer, f"\0{edge}: {function} {args} {options}\n".encode())
            home = next(m for m in (kernelcases, emitcases, gatedcases) if hasattr(m, function))
            place = functools.partial(kit.fenced, front=edge == "front")
            getattr(home, function)(*args, **options, place=place)
    except BaseException:
        os.write(writer, traceback.format_exc()[-900:].encode())


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
