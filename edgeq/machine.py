"""What the system's files say about the machine it runs on: board, processor, features, memory."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from edgeq.sysfs import strings, text

__all__ = ["Machine", "look"]


@dataclass(frozen=True)
class Machine:
    """Texts as the system prints them; empty where it does not."""

    model: str = ""  # of the device tree
    compatible: frozenset[str] = frozenset()  # of the device tree
    cpu: str = ""  # the processor's name
    parts: frozenset[str] = frozenset()  # Arm CPU part numbers, as 0xd0b
    features: frozenset[str] = frozenset()  # of the CPU, Linux' names
    ram: int = 0  # bytes that the system can use

    @property
    def processor(self) -> str:
        """Its name, or the board's where only that is known."""
        return self.cpu or self.model or platform.processor() or platform.machine()


def look(root: Path = Path("/")) -> Machine:
    """The machine that files under `root` describe; on macOS, which has none, its own names."""
    tree, info = root / "proc/device-tree", text(root / "proc/cpuinfo")
    memory = text(root / "proc/meminfo")
    total = re.search(r"^MemTotal:[ \t]*([0-9]{1,15}) kB", memory, re.MULTILINE)
    return Machine(
        model=text(tree / "model"),
        compatible=frozenset(strings(tree / "compatible")),
        cpu=next(iter(_values(info, "model name")), "") or _apple(root),
        parts=frozenset(_values(info, "CPU part")),
        features=frozenset(
            feature
            for key in ("flags", "Features")
            for value in _values(info, key)
            for feature in value.split()
        ),
        ram=int(total[1]) << 10 if total else 0,
    )


def _values(info: str, key: str) -> list[str]:
    """Values of a key of /proc/cpuinfo, of all processors."""
    parts = (line.partition(":") for line in info.split("\n"))
    return [value.strip() for name, colon, value in parts if colon and name.strip() == key]


def _apple(root: Path) -> str:
    if platform.system() != "Darwin" or root != Path("/"):
        return ""
    import subprocess

    asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
