"""What is wrong with a machine's set-up, and what to do about it.

A group of checks is a file here: a TITLE and a generator `findings`. Nothing is changed; a file of
the system that is missing or garbled leaves its line out or says that nothing is known.
"""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from edgeq import sysfs
from edgeq.sensors.tool import Tool, run

__all__ = ["GROUPS", "Finding", "State", "System", "examine"]

GROUPS = ("system", "processor", "heat", "ram", "disk", "kernels")
State = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line. fail: edgeq does not work like this; warn: it works, but slower or less safely than
    it could; info: good to know.
    """

    topic: str
    state: State
    text: str
    remedy: str = ""  # what to do, one line
    values: Mapping[str, Any] = field(default_factory=dict)  # numbers behind the text, for --json
    group: str = ""  # title of the checks that it is from


@dataclass(frozen=True)
class System:
    """Where the doctor looks: files under `root`, programs, and this process.

    place: folder or file on the disk that models are on.
    """

    root: Path = Path("/")
    place: Path = Path()
    tool: Tool = run
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    machine: str = field(default_factory=lambda: platform.machine().lower())
    name: str = field(default_factory=platform.system)  # Linux, Darwin, Windows
    bits: int = 64 if sys.maxsize > 1 << 32 else 32

    @property
    def live(self) -> bool:
        """Whether this is the machine itself, not files of another one."""
        return self.root == Path("/")

    def text(self, name: str) -> str:
        """Content of a file, nothing when it cannot be read."""
        return sysfs.text(self.root / name)

    def integer(self, name: str) -> int | None:
        """The number in a file."""
        return sysfs.integer(self.root / name)


def examine(system: System | None = None) -> Iterator[Finding]:
    """All findings, in the order of GROUPS; they come as they are made.

    >>> from pathlib import Path
    >>> found = list(examine(System(root=Path("no such folder"))))
    >>> {finding.state for finding in found} <= {"ok", "info", "warn", "fail"}
    True
    """
    for name in GROUPS:
        yield from _group(import_module(f"{__name__}.{name}"), system or System())


def _group(module: ModuleType, system: System) -> Iterator[Finding]:
    try:
        for found in module.findings(system):
            yield Finding(**{**vars(found), "group": module.TITLE})
    except Exception as error:  # one check that fails must not hide what the others find
        text = f"could not be looked at: {type(error).__name__}: {error}"
        yield Finding(module.TITLE.lower(), "info", text, group=module.TITLE)
