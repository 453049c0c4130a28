"""Speed and memory of a file, measured in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeq.errors import ResourceError
from edgeq.estimate import Estimate

__all__ = ["Lengths", "Speed", "measure"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """What `edgeq bench` is to measure; None: its own choice."""

    prompt: int | None = None
    gen: int | None = None
    repetitions: int = 3
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, and bytes.

    prefill: reading a prompt; decode: generating. peak_ram: the most memory the process has held,
    the pages of the file that it read among it.
    """

    prefill: Estimate
    decode: Estimate
    peak_ram: int
    prompt: int  # tokens
    gen: int
    cpu: str
    isa: str
    threads: int


def measure(path: Path, lengths: Lengths) -> Speed:
    """Run `edgeq bench` on a file. Raises ResourceError with what it said when it fails."""
    flags = {"-p": lengths.prompt, "-n": lengths.gen, "-r": lengths.repetitions}
    flags["-t"] = lengths.threads
    given = [part for flag, n in flags.items() if n is not None for part in (flag, str(n))]
    command = [sys.executable, "-m", "edgeq", "bench", str(path), "-o", "json", *given]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("edgeq: ")
        raise ResourceError(f"{path}: its speed could not be measured: {said or done.returncode}")
    rows = json.loads(done.stdout)
    prefill = next(row for row in rows if row["n_prompt"])
    decode = next(row for row in rows if row["n_gen"])
    return Speed(
        prefill=Estimate(prefill["avg_ts"], prefill["stddev_ts"]),
        decode=Estimate(decode["avg_ts"], decode["stddev_ts"]),
        peak_ram=max(row["peak_rss"] for row in rows),
        prompt=prefill["n_prompt"],
        gen=decode["n_gen"],
        cpu=decode["cpu_info"],
        isa=decode["backends"],
        threads=decode["n_threads"],
    )


def _environment() -> dict[str, str]:
    """Lets the child find this very package, wherever it was imported from."""
    here = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{before}" if before else here}
