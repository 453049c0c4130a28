"""What the doctor says of memory, disks and the cache of kernels."""

import mmap
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machines
import pytest
from doctorkit import look
from machines import plant

from edgeq.doctor import Finding, System, disk, drive, kernels


# -- memory ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("total", "available", "state"),
    [
        (8000, 6000, "ok"),
        (8000, 400, "warn"),
        (416, 300, "ok"),
        (416, 200, "ok"),
        (416, 90, "fail"),
    ],
)
def test_memory_that_is_left(tmp_path: Path, total: int, available: int, state: str) -> None:
    plant(tmp_path, {"proc/meminfo": machines.memory(total, available)})
    assert look(tmp_path)["RAM"].state == state


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 1 writes a huge number for no limit; an outer group may be the narrower one."""
    group = "sys/fs/cgroup/memory"
    plant(
        tmp_path, {"proc/self/cgroup": "4:memory:/a\n0::/", "proc/meminfo": machines.memory(9, 9)}
    )
    plant(tmp_path, {f"{group}/a/memory.limit_in_bytes": 9223372036854771712})
    assert look(tmp_path)["memory limit"].text == "none"
    plant(tmp_path, {f"{group}/memory.limit_in_bytes": 100 << 20})
    assert look(tmp_path)["memory limit"].state == "fail"
    assert look(tmp_path)["memory limit"].values["limit"] == 100 << 20
    plant(tmp_path, {f"{group}/memory.limit_in_bytes": 4 << 30})
    assert look(tmp_path)["memory limit"].state == "info"


def test_limits_of_the_process(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/self/limits": machines.LIMITS.format("unlimited")})
    assert look(tmp_path)["limits"].text.endswith("locked memory 8.0 MiB")
    plant(tmp_path, {"proc/self/limits": machines.LIMITS.format("1073741824")})
    found = look(tmp_path)["limits"]
    assert (found.state, found.remedy) == ("warn", "ulimit -v unlimited")


# -- disk ------------------------------------------------------------------------------------------
def test_disks_by_their_names(tmp_path: Path) -> None:
    block = machines.DEVICES
    plant(tmp_path, {f"{block}/mmcblk0/device/type": "SD", f"{block}/mmcblk1/device/type": "MMC"})
    plant(tmp_path, {f"{block}/sda/queue/rotational": 0, f"{block}/sdb/queue/rotational": 1})
    plant(tmp_path, {f"{block}/dm-0/slaves/mmcblk0p2/x": "", f"{block}/dm-1/slaves/dm-1/x": ""})
    expected = {
        "mmcblk0p2": "SD card",
        "mmcblk1": "eMMC",
        "mmcblk7p1": "SD card or eMMC",
        "nvme0n1p2": "NVMe SSD",
        "zram0": "compressed RAM",
        "vda1": "virtual disk",
        "sda2": "SSD",
        "sdb": "hard disk",
        "sdc1": "",
        "dm-0": "SD card",
        "dm-1": "",  # made of itself
        "": "",
        "..": "",
    }
    assert {name: drive.kind(name, tmp_path) for name in expected} == expected
    disk_of_usb = tmp_path / "sys/devices/usb1/1-1/block/sdd"
    plant(disk_of_usb, {"queue/rotational": 1})
    (tmp_path / block / "sdd").symlink_to(disk_of_usb)
    assert drive.kind("sdd1", tmp_path) == "USB disk"


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    lines = [
        "24 1 179:2 / / rw,noatime shared:1 - ext4 /dev/root rw",
        "25 24 0:50 / /tmp rw,nosuid - tmpfs tmpfs rw",
        r"26 24 8:1 / /mnt/my\040disk ro,noexec master:2 shared:3 - vfat /dev/sda1 rw",
        "27 24 0:60 / /mnt/nas rw - nfs4 nas:/x rw",
        "28 24 broken - -",
    ]
    plant(tmp_path, {"proc/self/mountinfo": "\n".join(lines)})
    plant(tmp_path, {"sys/dev/block/179:2/uevent": "MAJOR=179\nDEVNAME=mmcblk0p2"})
    plant(tmp_path, {f"{machines.DEVICES}/mmcblk0/device/type": "SD"})
    root = drive.find(Path("/var/swap"), tmp_path)
    assert root == drive.Drive("/", "ext4", frozenset({"rw", "noatime"}), "SD card")
    assert drive.find(Path("/tmp/x"), tmp_path).kind == "memory"
    assert drive.find(Path("/tmpfile"), tmp_path).mount == "/"
    inner = drive.find(Path("/mnt/my disk/m.gguf"), tmp_path)
    assert (inner.mount, inner.options) == ("/mnt/my disk", {"ro", "noexec"})
    assert drive.find(Path("/mnt/nas/m"), tmp_path).kind == "network"


def test_room_and_speed_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def states(free: int, rate: float | None, **found: Any) -> dict[str, str]:
        monkeypatch.setattr(drive, "free", lambda path: (64 << 30, free))
        monkeypatch.setattr(drive, "read_speed", lambda path: rate)
        monkeypatch.setattr(drive, "find", lambda path, root: drive.Drive("/", **found))
        return {f.topic: f.state for f in disk.findings(System(place=tmp_path))}

    assert states(9 << 30, 400e6) == {"room": "ok", "reading": "ok"}
    assert states(1 << 30, 20e6) == {"room": "warn", "reading": "warn"}
    assert states(1 << 20, None) == {"room": "fail", "reading": "info"}
    assert states(9 << 30, None, kind="memory") == {"room": "ok"}
    read_only = states(1 << 20, None, options=frozenset({"ro"}))
    assert (read_only["room"], read_only["writing"]) == ("ok", "warn")
    assert states(9 << 30, None, filesystem="vfat")["writing"] == "warn"


def test_what_has_no_size_is_no_full_disk() -> None:
    proc = Path("/proc/self")
    if not proc.is_dir():
        pytest.skip("this system has no /proc")
    room = next(f for f in disk.findings(System(place=proc)) if f.topic == "room")
    assert room.state == "info"
    assert room.text.endswith("unknown")


def test_a_real_file_is_read_past_the_cache(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(bytes(100))
    file = tmp_path / "a.gguf"
    file.write_bytes(bytes(drive.LEAST))
    rate = drive.read_speed(tmp_path)
    if rate is None:
        pytest.skip("this disk has no way around the page cache")
    assert 1e5 < rate < 1e12
    assert drive.read_speed(tmp_path / "small.gguf") is None
    assert drive.read_speed(tmp_path / "nothing") is None


# -- kernels ---------------------------------------------------------------------------------------
@pytest.fixture
def cache_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Makes a cache folder with these rights the wished one."""

    def make(mode: int) -> Path:
        (tmp_path / "edgeq").mkdir(exist_ok=True)
        (tmp_path / "edgeq").chmod(mode)
        monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
        return tmp_path / "edgeq"

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "t"))
    monkeypatch.setattr(drive, "find", lambda path, root: drive.Drive("/", "ext4"))
    return make


def _of_cache() -> dict[str, Finding]:
    return {finding.topic: finding for finding in kernels.findings(System())}


def test_cache_folder(cache_at: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_at(0o700)
    monkeypatch.setattr("edgeq.kernels.cache.folder", lambda isa: path / "kernels-1")
    found = _of_cache()
    assert (found["cache"].state, found["compiled"].state) == ("ok", "info")
    assert found["cache"].values["mode"] == "700"
    plant(path, {"kernels-1/a.o": "x" * 2047, "kernels-1/limits-1.json": "", "kernels-0/a.o": ""})
    text = _of_cache()["compiled"].text
    assert text == "1 kernels, 2.0 KiB; 1 of other versions beside it may be deleted"
    monkeypatch.setattr(drive, "free", lambda path: (1 << 30, 1 << 20))
    assert _of_cache()["cache"].state == "fail"
    monkeypatch.setattr(drive, "find", lambda path, root: drive.Drive("/", "tmpfs", kind="memory"))
    monkeypatch.setattr(drive, "free", lambda path: None)
    assert _of_cache()["cache"].state == "warn"


def test_cache_folder_of_others(cache_at: Callable[[int], Path]) -> None:
    path = cache_at(0o777)
    found = _of_cache()["cache"]
    assert found.state == "warn"
    assert "mode 777: not yours alone: lost when" in found.text
    other = next((path.parent / "t").iterdir())
    other.chmod(0o777)
    found = _of_cache()["cache"]
    assert (found.state, found.remedy) == ("fail", "set EDGEQ_CACHE")
    assert stat.S_IMODE(path.stat().st_mode) == 0o777  # nothing was changed


def test_code_that_may_not_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(mmap, "mmap", refuse)
    found = _of_cache()["compiling"]
    assert found.state == "fail"
    assert found.remedy.startswith("MemoryDenyWriteExecute=no")
