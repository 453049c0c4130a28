"""What may be used, by control groups in made-up trees."""

from pathlib import Path

import psutil
import pytest

from edgeq import memory

MIB = 1 << 20
V2 = {
    "proc/self/cgroup": "0::/a/b",
    "sys/fs/cgroup/a/b/memory.stat": "anon 5\ninactive_file 3145728",
}
V1 = {"proc/self/cgroup": "9:cpu,cpuacct:/x\n8:memory:/y/z\n0::/"}
Y = "sys/fs/cgroup/memory/y"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            V2
            | {
                "sys/fs/cgroup/a/b/memory.max": f"{10 * MIB}",
                "sys/fs/cgroup/a/b/memory.current": f"{6 * MIB}",
            },
            7 * MIB,
            id="version 2: pages of files make room",
        ),
        pytest.param(
            V2
            | {
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/memory.current": f"{6 * MIB}",
                "sys/fs/cgroup/a/memory.max": f"{9 * MIB}",
                "sys/fs/cgroup/a/memory.current": f"{7 * MIB}",
            },
            2 * MIB,
            id="a group above",
        ),
        pytest.param(
            V1
            | {
                f"{Y}/z/memory.limit_in_bytes": f"{10 * MIB}",
                f"{Y}/z/memory.usage_in_bytes": f"{9 * MIB}",
                f"{Y}/z/memory.stat": f"active_file {MIB}\ntotal_active_file {4 * MIB}",
                f"{Y}/memory.limit_in_bytes": "9223372036854771712",
                f"{Y}/memory.usage_in_bytes": "0",
            },
            5 * MIB,
            id="version 1",
        ),
        pytest.param(
            V2
            | {
                "sys/fs/cgroup/a/b/memory.max": f"{5 * MIB}",
                "sys/fs/cgroup/a/b/memory.current": f"{9 * MIB}",
            },
            0,
            id="already above the limit",
        ),
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert memory.available(tmp_path) == expected


@pytest.mark.parametrize("text", ["", "broken", "0::/gone"])
def test_without_limits_it_is_what_the_machine_has(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(text)
    free = psutil.virtual_memory().available
    assert memory.available(tmp_path) == pytest.approx(free, rel=0.2)
