"""Profiles of measured machines: read as written, known again where they were measured."""

import os
from pathlib import Path

import machines
import pytest
from machines import plant

from edgeq import devices, profile
from edgeq.devices import Cores, Device, Match
from edgeq.errors import EdgeqError, RequestError, ResourceError
from edgeq.limits import Limits
from edgeq.machine import look

FOUR = [Limits(1, 9.264, 70.0), Limits(2, 13.231, 140.0), Limits(4, 11.59, 281.26)]


@pytest.mark.parametrize("device", devices.every(), ids=lambda device: device.id)
def test_every_profile_is_written_as_it_was_read(device: Device, tmp_path: Path) -> None:
    path = tmp_path / f"{device.id}.toml"
    path.write_text(profile.to_toml(device))
    read = devices.get(path)
    assert read.ram == device.ram[-1:]
    assert profile.to_toml(read).replace(str(read.ram_gib), "") == profile.to_toml(
        devices.get(device.id)
    ).replace(str(read.ram_gib), "")


def test_a_known_board_keeps_what_cannot_be_measured(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", machines.HEALTHY)
    found = profile.measured(FOUR, root)
    known = devices.get("rpi5")
    assert (found.name, found.power, found.match) == (known.name, known.power, known.match)
    assert found.cores == known.cores
    assert found.ram_gib == (8.0,)
    assert [(r.threads, r.gbs, r.kind) for r in found.read] == [
        (1, 9.26, "measured"),
        (2, 13.23, "measured"),
        (4, 11.59, "measured"),
    ]
    assert [(d.threads, d.gmacs) for d in found.dot] == [(1, 70.0), (2, 140.0), (4, 281.3)]
    assert (found.decode_threads, found.prefill_threads) == (2, 4)


def test_an_unknown_machine_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"proc/cpuinfo": "model name\t: A [new] CPU @ 3*2 GHz\ncpu MHz\t\t: 2600.123\n"}
    root = plant(tmp_path / "root", {**machines.CONTAINER, **names})
    found = profile.measured([Limits(1, 5.0, 50.0), Limits(2, 5.1, 99.0)], root)
    assert found.name == "A [new] CPU @ 3*2 GHz"
    assert [(core.count, core.ghz) for core in found.cores] == [(8, 2.6)]
    assert (found.decode_threads, found.prefill_threads) == (1, 2)
    folder = tmp_path / "devices"
    folder.mkdir()
    for path in Path(devices.find("devices")).glob("*.toml"):
        (folder / path.name).write_text(path.read_text())
    profile.save(found, folder / "my-machine.toml")
    monkeypatch.setattr(devices, "find", lambda kind: folder)
    devices._shipped.cache_clear()
    try:
        assert devices.here(root).id == "my-machine"
        assert not found.match.fits(look(plant(tmp_path / "other", machines.SMALL_X86)))
    finally:
        monkeypatch.undo()
        devices._shipped.cache_clear()


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    found = profile.measured([Limits(1, 5.0, 50.0)], tmp_path)
    assert (found.match, found.cores, found.ram_gib) == (Match(), (), ())
    profile.save(found, tmp_path / "x.toml")
    read = devices.get(tmp_path / "x.toml")
    assert read.read == found.read


def test_two_kinds_of_cores(tmp_path: Path) -> None:
    capacity = {f"{machines.CPU}/cpu{i}/cpu_capacity": 400 if i < 4 else 1024 for i in range(8)}
    clock = {
        f"{machines.CPU}/cpu{i}/cpufreq/cpuinfo_max_freq": 1_800_000 if i < 4 else 2_256_000
        for i in range(8)
    }
    root = plant(tmp_path, {**machines.cpus(8), **capacity, **clock})
    found = profile.measured(FOUR, root).cores
    kind = found[0].kind
    assert found == (Cores(kind, 4, 2.26), Cores(kind, 4, 1.8))


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("there.toml", ResourceError, "exists already: use force"),
        ("profile.txt", RequestError, "ends with .toml"),
        ("My Board.toml", RequestError, "a name of a-z, 0-9 and -"),
        ("no/folder.toml", ResourceError, "folder does not exist"),
    ],
)
def test_refused_names(tmp_path: Path, name: str, error: type[EdgeqError], text: str) -> None:
    (tmp_path / "there.toml").write_text("old")
    device = Device("x", "neon", "y")
    with pytest.raises(error, match=text):
        profile.save(device, tmp_path / name)
    assert (tmp_path / "there.toml").read_text() == "old"
    profile.save(device, tmp_path / "there.toml", force=True)
    assert devices.get(tmp_path / "there.toml").name == "x"


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.toml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="cannot be written: No space left"):
        profile.save(Device("x", "neon", "y"), path, force=True)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
