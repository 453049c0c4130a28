"""Small files of the system: nothing in them breaks a reader."""

import os
from pathlib import Path

import pytest

from edgeq import sysfs


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1500000\n", 1500000),
        (b"-274000", -274000),
        (b"", None),
        (b"12 34", None),
        (b"0x50005", None),
        (b"1" * 5000, None),
        ("٣".encode(), None),
        (b"\xff\xfe7", 7),
        (b"7\x00\n", 7),
    ],
)
def test_integers(tmp_path: Path, content: bytes, expected: int | None) -> None:
    (tmp_path / "f").write_bytes(content)
    assert sysfs.integer(tmp_path / "f") == expected


def test_what_is_no_file_reads_as_nothing(tmp_path: Path) -> None:
    assert (
        sysfs.text(tmp_path) == sysfs.text(tmp_path / "a\x00b") == sysfs.text(tmp_path / "f") == ""
    )
    assert sysfs.fields(tmp_path) == {}
    assert list(sysfs.numbered(tmp_path / "f", "cpu*")) == []
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert sysfs.text(tmp_path / "zero") == ""  # a file without an end


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-x", set()), ("3-1", set())],
)
def test_lists_of_cpus(text: str, expected: set[int]) -> None:
    assert sysfs.parsed_cpus(text) == expected
    assert len(sysfs.parsed_cpus("0-999999")) <= sysfs.MOST_CPUS + 1


def test_fields_and_order(tmp_path: Path) -> None:
    (tmp_path / "f").write_text('NAME="Debian = GNU"\nMemTotal:  12 kB\nnothing\n: x\n')
    found = sysfs.fields(tmp_path / "f")
    assert found == {"NAME": "Debian = GNU", "MemTotal": "12 kB", "": "x"}
    for name in ("cpu10", "cpu9", "cpufreq"):
        (tmp_path / name).mkdir()
    names = [path.name for path in sysfs.numbered(tmp_path, "cpu[0-9]*")]
    assert names == ["cpu9", "cpu10"]


def test_control_groups_end_at_the_top(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "proc/self/cgroup"
    group.write_text("7:memory:/a\n3:cpu,cpuacct:/b\n0::/c/d\n")
    top = tmp_path / "sys/fs/cgroup"
    assert list(sysfs.cgroups(tmp_path, "memory")) == [
        *(top / "memory/a", top / "memory"),
        *(top / "c/d", top / "c", top),
    ]
    for text in ("0::/../..", "x", "::", "0::" + os.sep * 50):
        group.write_text(text)
        assert top in [*sysfs.cgroups(tmp_path, "memory")], text
