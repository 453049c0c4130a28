"""Boards whose cores kernels are compiled for without one: what memory delivers to each thread."""

from dataclasses import dataclass

from edgeq import devices


@dataclass(frozen=True)
class Board:
    """A board; bandwidth in GB/s as `threads` threads of decoding read."""

    name: str
    core: str
    cores: int
    ghz: float
    threads: int
    bandwidth: float
    source: str  # of the bandwidth

    @property
    def bytes_per_cycle(self) -> float:
        """Of each of the threads."""
        return self.bandwidth / self.threads / self.ghz


def _board(name: str, device: str) -> Board:
    """As `edgeq plan` knows it."""
    found = devices.get(device)
    [core] = found.cores
    read = found.limit(found.decode_threads)
    assert read is not None
    how = f"{read.how}, {read.source}"
    return Board(name, core.kind, core.count, core.ghz, found.decode_threads, read.gbs, how)


BOARDS = [
    _board("Pi Zero 2 W", "rpizero2w"),
    _board("Pi 4", "rpi4"),
    _board("Pi 5", "rpi5"),
]
