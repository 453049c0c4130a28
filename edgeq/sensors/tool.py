"""Programs of the system that are asked for a value."""

import os
import shutil
import subprocess
from collections.abc import Callable

__all__ = ["Tool", "run"]

SECONDS = 2.0  # a program that takes longer is as good as none
Tool = Callable[..., str]  # words of a command -> what it prints


def run(*words: str) -> str:
    """What a program prints; nothing where it is not there, fails or takes too long.

    >>> run("no-such-program")
    ''
    """
    program = shutil.which(words[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "ignore").strip() if done.returncode == 0 else ""
