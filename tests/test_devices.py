"""Known devices: their files, and which of them a machine is.

The files in data/machines/ are written after what such machines print: the form is that of `head -n
9999 FILES | sed 's/\\x0/\\\\0/g'`, the name is the device's, with its RAM.
"""

import json
import re
from pathlib import Path
from time import perf_counter

import pytest
from click.testing import CliRunner

from edgeq import cli, cpus, devices
from edgeq.errors import FormatError, RequestError
from edgeq.kernels import isa
from edgeq.machine import Machine, look

TREES = sorted((Path(__file__).parent / "data/machines").glob("*.txt"))
ARM = {"neon", "dotprod", "i8mm"}
# Performance cores, of all.
CORES = {"rk3588": (4, 8), "odroid-n2plus": (4, 6), "apple-m1": (4, 8), "apple-m2": (4, 8)}


def unpack(tree: Path, root: Path) -> Path:
    """The captured files under `root`."""
    parts = re.split(r"^==> (.*) <==\n", tree.read_text(), flags=re.MULTILINE)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\\0\n", "\0").replace("\\0", "\0"))
    return root


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.stem)
def test_a_machine_is_its_device(tree: Path, tmp_path: Path) -> None:
    found, name = devices.here(unpack(tree, tmp_path)), tree.stem
    assert found.id == re.sub(r"-(\d+gb|arm|x86)$", "", name)
    size = re.search(r"-(\d+)gb$", name)
    if size and name != "laptop-avx512-32gb":
        assert found.ram == (int(size[1]) << 30,)


def test_graphics_may_take_much_ram(tmp_path: Path) -> None:
    """Of 32 GB, 27 are left to the system: still 32, and 7.6 of 8."""
    [tree] = [tree for tree in TREES if tree.stem == "laptop-avx512-32gb"]
    assert devices.here(unpack(tree, tmp_path)).ram_gib == (32,)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 12582912 kB\n")
    assert devices.here(tmp_path).ram_gib == (12,)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.stem)
def test_features_of_a_machine_suffice_for_its_instructions(tree: Path, tmp_path: Path) -> None:
    root = unpack(tree, tmp_path)
    found, seen = devices.here(root), look(root).features
    names = {"asimd": "neon", "asimddp": "dotprod", "avx_vnni": "avxvnni"}
    features = {names.get(name, name.replace("_", "")) for name in seen}
    assert features >= isa.modules()[found.isa].NEEDS


def test_default_threads_follow_the_device(tmp_path: Path) -> None:
    for tree in TREES:
        root = unpack(tree, tmp_path / tree.stem)
        machine = cpus.find(root, range(len(list(root.glob("sys/devices/system/cpu/cpu*")))))
        found = devices.here(root)
        fast, count = CORES.get(found.id, (machine.threads, machine.usable))
        assert (machine.threads, machine.usable) == (fast, count)
        few = 2 if found.decode_threads == 2 else fast
        assert devices.threads(machine, found) == (few, fast)


def test_memory_of_this_board_gives_most_to_two_threads(tmp_path: Path) -> None:
    [tree] = [tree for tree in TREES if tree.stem == "rpi5-8gb"]
    found = devices.here(unpack(tree, tmp_path))
    assert devices.threads(cpus.find(tmp_path, range(4)), found) == (2, 4)
    assert devices.threads(cpus.find(tmp_path, [0]), found) == (1, 1)  # of allowed CPUs
    best = max((read for read in found.read if read.threads), key=lambda read: read.gbs)
    assert best.threads == 2


def test_every_file_is_a_device() -> None:
    for device in devices.every():
        assert devices.get(device.id).name == device.name
        assert device.isa in isa.modules()
        for read in (*device.read, *device.dot):
            assert len(read.source) > 10
        if device.id != "generic":
            assert device.match != devices.Match()
            assert device.limit(1) is not None
            assert min(len(device.cores), len(device.ram)) > 0
            assert device.isa != "portable"
    assert len(devices.every()) >= 17


def test_measured_bandwidth_is_below_the_data_sheet() -> None:
    for device in devices.every():
        limits = [read.gbs for read in device.read if read.kind == "theoretical"]
        assert all(read.gbs < limits[0] for read in device.read if read.kind == "measured"), device


def test_a_limit_is_the_nearest_that_is_known() -> None:
    device = devices.get("rpi5")
    assert [device.limit(n).gbs for n in (1, 2, 3, 4, 8)] == [9.26, 13.23, 13.23, 11.59, 11.59]
    assert devices.get("laptop-avx2").limit(4).kind == "theoretical"
    assert devices.get("generic").limit(4) is None


def test_unknown_devices_are_named_with_those_close() -> None:
    with pytest.raises(RequestError, match=r"'rpi-5' is unknown: did you mean rpi5"):
        devices.get("rpi-5")
    with pytest.raises(RequestError, match="`edgeq devices` lists them"):
        devices.get("toaster")
    with pytest.raises(RequestError, match="rpi5-3gb"):
        devices.get("rpi5-3gb")


GOOD = 'name = "Board"\nisa = "neon"\nmemory = "DDR4"\n'


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("colour = 1", "unknown key colour"),
        ("[match]\nmodels = []", "match: unknown key models"),
        ("ram_gib = [0]", "ram_gib = 0.0: expected a number above 0"),
        ("decode_threads = 0", "decode_threads = 0: expected"),
        ('cores = [{ kind = "a", count = -4, ghz = 1 }]', r"cores\[0\]: count = -4"),
        ('read = [{ gbs = 1, kind = "guessed", source = "" }]', "guessed"),
        ('read = [{ gbs = nan, kind = "measured", source = "" }]', "gbs = nan"),
        ('dot = [{ gmacs = -1, kind = "measured", source = "" }]', "gmacs = -1"),
        ('id = "../x"', "id = '../x': expected"),
        ('cores = [{ kind = "../a", count = 4, ghz = 1 }]', r"cores\[0\]: kind = '../a': expected"),
        ('cores = [{ kind = "a", count = 4, ghz = 1, l1_kib = -32 }]', r"l1_kib = -32: expected"),
        ("shared_kib = -1", "shared_kib = -1: expected"),
        ("decode_threads = 999999", "decode_threads = 999999: expected 1 to 256"),
        ('dot = [{ gmacs = 1, kind = "measured", source = "", threads = 300 }]', "threads = 300"),
        (
            'power = { idle = -5, load = 1, kind = "measured", source = "" }',
            "idle = -5.0: expected",
        ),
    ],
)
def test_files_are_read_strictly(tmp_path: Path, more: str, problem: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    assert devices.get(path).id == "board"
    path.write_text(GOOD + more)
    with pytest.raises(FormatError, match=problem):
        devices.get(path)


def test_an_instruction_set_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    more = ["ram_gib = [4]", 'cores = [{ kind = "none-such", count = 4, ghz = 1 }]']
    more.append('read = [{ gbs = 5, kind = "measured", source = "" }]')
    for name in ("i8mm2", "../../etc"):
        path.write_text("\n".join([GOOD.replace("neon", name), *more]))
        said = CliRunner().invoke(cli.app, ["plan", "--device", str(path)])
        names = ", ".join(isa.modules())
        assert said.stderr == f"edgeq: {path}: isa = '{name}': expected one of {names}\n"
        assert said.exit_code == 2
    path.write_text("\n".join([GOOD, *more]))
    said = CliRunner().invoke(cli.app, ["plan", "--device", str(path)])
    assert said.exit_code == 0
    assert "kernels unknown" in said.stdout


def test_a_machine_without_files_is_generic(tmp_path: Path) -> None:
    assert look(tmp_path) == Machine()
    assert devices.here(tmp_path) == devices.get("generic")
    place = tmp_path / "proc/device-tree/model"
    place.mkdir(parents=True)  # a folder where a file should be
    (tmp_path / "proc/cpuinfo").write_bytes(b"model name\t: \xff\xfe\nflags :\nCPU part:0xd0b\n")
    assert look(tmp_path).parts == {"0xd0b"}
    assert devices.here(tmp_path).id == "generic"


def test_devices_are_listed() -> None:
    shown = CliRunner().invoke(cli.app, ["devices"])
    assert shown.exit_code == 0
    for device in devices.every():
        assert device.id in shown.stdout
    listed = json.loads(CliRunner().invoke(cli.app, ["devices", "--json"]).stdout)
    assert [row["id"] for row in listed] == [device.id for device in devices.every()]
    assert [row["id"] for row in listed if row["here"]] == [devices.here().id]
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


def test_a_device_is_shown_with_all_that_is_known() -> None:
    shown = CliRunner().invoke(cli.app, ["devices", "rpi5"]).stdout
    assert "2.0, 4.0, 8.0, 16.0" in shown
    assert "model: Raspberry Pi 5 *, Raspberry Pi Compute Module 5*" in shown
    document = json.loads(CliRunner().invoke(cli.app, ["devices", "rpi5-8gb", "--json"]).stdout)
    assert document[0]["ram_gib"] == [8.0]


def test_a_device_file_does_not_drive_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD.replace("Board", r"[red]B\u001b[31m"))
    shown = CliRunner().invoke(cli.app, ["devices", str(path)]).stdout
    assert r"[red]B\x1b[31m" in shown


def test_hostile_files_of_a_system_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t: a" + " " * (1 << 19) + "b\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: " + "9" * 5000 + " kB\n")
    start = perf_counter()
    assert look(tmp_path).features == {"a", "b"}
    assert perf_counter() - start < 2
    assert look(tmp_path).ram == 0
