"""Sensors of machines whose files change while they are watched."""

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import machines
import pytest
from machines import CPU, INA, RAPL, ZONE, plant, tool

from edgeq.sensors import Reading, Sensors, Summary, Watch, heat, power, summary, throttle
from edgeq.sensors import tool as tools
from edgeq.sensors.throttle import State


def watched(sensors: Sensors, *changes: Callable[[], object], threads: int = 4) -> Summary:
    """What is summed up when these changes happen, a reading after each."""
    readings = [sensors.read()]
    for change in changes:
        change()
        readings.append(sensors.read())
    return summary(readings, sensors.power, threads)


def test_a_machine_without_sensors_says_so(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, tool())
    with Watch(sensors, period=0.01) as watch:
        time.sleep(0.03)
    assert watch.summary(1) == Summary(None, None, None, "", None, "")


@pytest.mark.parametrize(("files", "said"), machines.ALL.values(), ids=machines.ALL)
def test_garbled_files_are_as_good_as_none(
    tmp_path: Path, files: machines.Files, said: tools.Tool
) -> None:
    for content in (b"\xff\x00\xfe", b"", b"9" * 400, "-1"):
        plant(tmp_path, dict.fromkeys(files, content))
        answers = dict.fromkeys(("get_throttled", "pmic_read_adc"), str(content))
        found = watched(Sensors(tmp_path, tool(**answers)), lambda: None)
        assert found.joules in (None, 0)
        assert found.max_celsius is None or content == "-1"


def test_hottest_place_of_the_cpu(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.SMALL_X86), tool())
    cooler = {"sys/class/hwmon/hwmon2/temp1_input": 60000}
    hotter = {"sys/class/thermal/thermal_zone1/temp": 93000}
    found = watched(
        sensors,
        lambda: plant(tmp_path, hotter),
        lambda: plant(tmp_path, {**cooler, "sys/class/thermal/thermal_zone1/temp": 50000}),
    )
    assert found.max_celsius == 93.0
    plant(tmp_path, {f"{ZONE}/temp": 99000})  # the board's place, not the CPU's
    assert sensors.read().celsius == 60.0


def test_places_are_known_by_their_names(tmp_path: Path) -> None:
    zones = {"gpu-thermal": 70000, "bigcore0-thermal": 55000, "soc-thermal": 50000, "iwlwifi_1": 99}
    for i, (kind, value) in enumerate(zones.items()):
        plant(
            tmp_path,
            {
                f"sys/class/thermal/thermal_zone{i}/{k}": v
                for k, v in {"type": kind, "temp": value}.items()
            },
        )
    assert [place.name for place in heat.find(tmp_path)] == ["bigcore0-thermal", "soc-thermal"]
    only = plant(tmp_path / "b", {f"{ZONE}/type": "TZ00", f"{ZONE}/temp": 41000})
    assert heat.hottest(heat.find(only)) == 41.0


@pytest.mark.parametrize(
    ("trips", "limit"),
    [
        ({"critical": 90000}, 80.0),
        ({"active": 50000, "critical": 110000}, 100.0),
        ({"passive": 70000, "critical": 110000}, 70.0),
        ({"passive": 0, "hot": 95000}, 95.0),
        ({"passive": -274000}, None),
        ({"active": 50000}, None),
    ],
)
def test_trip_points(tmp_path: Path, trips: dict[str, int], limit: float | None) -> None:
    plant(tmp_path, {f"{ZONE}/type": "cpu-thermal", f"{ZONE}/temp": 40000})
    for i, (kind, value) in enumerate(trips.items()):
        plant(
            tmp_path,
            {f"{ZONE}/trip_point_{i}_{k}": v for k, v in {"type": kind, "temp": value}.items()},
        )
    assert heat.limit(heat.find(tmp_path)) == limit


def test_clocks_of_the_cpus_at_work(tmp_path: Path) -> None:
    plant(tmp_path, machines.cpus(4, **machines.governor("schedutil", 600, 2400)))
    sensors = Sensors(tmp_path, tool())
    busy = {f"{CPU}/cpu{i}/cpufreq/scaling_cur_freq": 2400000 for i in (1, 3)}
    slow = dict.fromkeys(busy, 1800000)
    changes = [lambda: plant(tmp_path, busy), lambda: plant(tmp_path, slow), lambda: None]
    assert watched(sensors, *changes, threads=2).mean_mhz == 2100
    plant(tmp_path, dict.fromkeys(busy, "?"))
    assert sensors.read().mhz == (600.0, 600.0)


# -- throttling ------------------------------------------------------------------------------------
def test_every_bit_of_the_firmware_is_told() -> None:
    names = ["under-voltage", "clock capped", "throttled", "soft temperature limit"]
    for i, name in enumerate(names):
        assert State.of_firmware(1 << i) == State(now=(name,), firmware=1 << i)
        assert State.of_firmware(1 << 16 + i) == State(past=(name,), firmware=1 << 16 + i)
    assert State.of_firmware(0xF000F) == State(tuple(names), tuple(names), 0, 0xF000F)
    assert State.of_firmware(0xFFF0FFF0) == State(firmware=0xFFF0FFF0, past=())


def test_firmware_that_throttles_for_a_moment_between_two_readings(tmp_path: Path) -> None:
    word = ["throttled=0x10000"]  # once, before
    sensors = Sensors(tmp_path, lambda *words: word[0] if "get_throttled" in words else "")
    calm = watched(sensors, lambda: None)
    assert (calm.throttled, calm.throttled_by) == (False, "")
    found = watched(sensors, lambda: word.__setitem__(0, "throttled=0x50000"))
    assert (found.throttled, found.throttled_by) == (True, "throttled")
    found = watched(
        sensors,
        lambda: word.__setitem__(0, "throttled=0x50005"),
        lambda: word.__setitem__(0, "throttled=0x50000"),
    )
    assert (found.throttled, found.throttled_by) == (True, "under-voltage, throttled")


def test_the_firmwares_file_is_preferred_to_its_program(tmp_path: Path) -> None:
    file = "sys/devices/platform/soc/soc:firmware/get_throttled"
    asked: list[object] = []
    sensors = Sensors(plant(tmp_path, {file: "0"}), lambda *words: asked.append(words) or "")
    asked.clear()
    assert watched(sensors, lambda: plant(tmp_path, {file: "80008"})).throttled is True
    assert asked == []


def test_a_program_is_asked_seldom_and_not_again_when_it_fails(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*words: str) -> str:
        asked.append(words)
        return machines.HEALTHY_TOOL(*words)

    sensors = Sensors(tmp_path, ask)
    asked.clear()
    sensors.read()
    for _ in range(50):
        sensors.read(fresh=False)
    assert sorted(asked) == [("vcgencmd", "get_throttled"), ("vcgencmd", "pmic_read_adc")]
    assert sensors.read(fresh=False).watts == sensors.read().watts
    missing = Sensors(tmp_path, lambda *words: asked.append(words) or "")
    asked.clear()
    assert [missing.read().state for _ in range(3)] == [None] * 3
    assert len(asked) == 1


def test_counters_of_protection_from_heat(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.SMALL_X86), tool())
    assert watched(sensors, lambda: None).throttled is False
    more = {f"{CPU}/cpu2/thermal_throttle/package_throttle_count": 13}
    found = watched(sensors, lambda: plant(tmp_path, more))
    assert (found.throttled, found.throttled_by) == (True, "too hot")


def test_cooling_that_slows_down_and_fans_that_do_not(tmp_path: Path) -> None:
    device = "sys/class/thermal/cooling_device"
    plant(tmp_path, {f"{device}0/type": "pwm-fan", f"{device}0/cur_state": 3})
    assert watched(Sensors(tmp_path, tool()), lambda: None).throttled is None
    plant(tmp_path, {f"{device}1/type": "cpufreq-cpu4", f"{device}1/cur_state": 0})
    sensors = Sensors(tmp_path, tool())
    assert watched(sensors, lambda: None).throttled is False
    found = watched(sensors, lambda: plant(tmp_path, {f"{device}1/cur_state": 2}), lambda: None)
    assert (found.throttled, found.throttled_by) == (True, "too hot")


def test_alarm_of_the_supply(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.UNDER_VOLTAGE), tool())
    assert sensors.read().state == State(now=("under-voltage",))
    both = Sensors(tmp_path, machines.UNDER_VOLTAGE_TOOL).read().state
    assert both is not None
    assert both.now == ("under-voltage", "throttled")
    assert throttle.during([]) is None


# -- energy ----------------------------------------------------------------------------------------
def test_energy_counter_that_starts_again(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.SMALL_X86), tool())
    changes = [262_100_000_000, 57_000_000, 100_000_000]
    found = watched(sensors, *(_set(tmp_path, f"{RAPL}/energy_uj", uj) for uj in changes))
    assert found.joules == pytest.approx(143 + 100)
    assert found.power_from == "CPU energy counters"


def _set(root: Path, name: str, value: object) -> Callable[[], object]:
    return lambda: plant(root, {name: value})


def test_packages_and_memory_are_added_parts_are_not(tmp_path: Path) -> None:
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    folder = "sys/class/powercap/intel-rapl:"
    for number, name in zones.items():
        plant(
            tmp_path,
            {
                f"{folder}{number}/{k}": v
                for k, v in {"name": name, "energy_uj": 0, "max_energy_range_uj": 10**9}.items()
            },
        )
    sensors = Sensors(tmp_path, tool())
    change = {f"{folder}{number}/energy_uj": 10**6 * 10**i for i, number in enumerate(zones)}
    assert watched(sensors, lambda: plant(tmp_path, change)).joules == 1 + 100 + 1000


def test_a_reading_that_fails_is_left_out(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.SMALL_X86), tool())
    values = ["garbled", 262_010_000_000]
    found = watched(sensors, *(_set(tmp_path, f"{RAPL}/energy_uj", value) for value in values))
    assert found.joules == pytest.approx(10)
    lost = watched(sensors, lambda: plant(tmp_path, {f"{RAPL}/energy_uj": None}))
    assert (lost.joules, lost.power_from) == (None, "")
    impossible = [262_143_000_001, 1]  # further than its range
    plant(tmp_path, {f"{RAPL}/energy_uj": 300_000_000_000})
    found = watched(sensors, *(_set(tmp_path, f"{RAPL}/energy_uj", uj) for uj in impossible))
    assert found.joules is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_counters_that_only_root_may_read(tmp_path: Path) -> None:
    (plant(tmp_path, machines.SMALL_X86) / f"{RAPL}/energy_uj").chmod(0)
    assert power.hidden(tmp_path) == [tmp_path / f"{RAPL}/energy_uj"]
    assert Sensors(tmp_path, tool()).power == power.Meter()


def _powers(*watts: float | None) -> list[Reading]:
    """Readings a second apart."""
    return [Reading(float(i), watts=value) for i, value in enumerate(watts)]


def test_power_is_that_of_the_work_not_of_its_borders() -> None:
    meter = power.Meter("sensor")
    assert summary(_powers(2, 6, None, 8, 3), meter, 1).joules == 7 * 4
    assert summary(_powers(2, 3), meter, 1).joules is None


def test_inputs_in_volts_and_amperes(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.THREE_INPUTS), tool())
    assert sensors.power.name == "ina3221 sensor"
    assert sensors.read().watts == 5.0  # the input alone: the others are parts of it
    plant(tmp_path, {f"{INA}/in1_label": "VDD_GPU_SOC"})
    assert Sensors(tmp_path, tool()).read().watts == 5.0 + 2.5 + 1.665
    plant(tmp_path, {f"{INA}/curr1_input": "?"})
    assert sensors.read().watts is None


def test_power_sensors(tmp_path: Path) -> None:
    plant(tmp_path, {f"{INA}/name": "ina226", f"{INA}/power1_input": 4_250_000})
    plant(tmp_path, {f"{INA}/in1_input": 5000, f"{INA}/curr1_input": 850, f"{INA}/in1_label": "x"})
    assert Sensors(tmp_path, tool()).read().watts == 4.25
    plant(tmp_path, {f"{INA}/device/drm/card0/status": ""})  # a graphics card
    assert Sensors(tmp_path, tool()).read().watts is None


def test_rails_of_a_power_management_chip(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.HEALTHY), machines.HEALTHY_TOOL)
    assert sensors.read().watts == pytest.approx(0.37 + 0.66 + 1.6)
    assert power.rails("VDD_CORE_A current(7)=2.0A") is None
    assert power.rails("X_A current(1)=1.2.3A\nX_V volt(1)=1V\n\x00") is None
    assert power.rails("X_A current(1)=9e9A") is None
    assert power.rails("X_A current(1)=99999A\nX_V volt(1)=99999V") is None


# -- the thread ------------------------------------------------------------------------------------
def test_a_watch_reads_at_its_pace_and_leaves_nothing_behind(tmp_path: Path) -> None:
    sensors = Sensors(plant(tmp_path, machines.HEALTHY), machines.HEALTHY_TOOL)
    with Watch(sensors, period=0.02) as watch:
        time.sleep(0.2)
        plant(tmp_path, {f"{ZONE}/temp": 77000})
        time.sleep(0.1)
        plant(tmp_path, {f"{ZONE}/temp": 60000})
    assert 4 <= len(watch.readings) <= 20
    assert watch.summary(4).max_celsius == 77.0
    assert [t for t in threading.enumerate() if t.name == "edgeq sensors"] == []


def test_a_watch_ends_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="work"), Watch(Sensors(tmp_path, tool())):
        raise ValueError("work")
    assert [t for t in threading.enumerate() if t.name == "edgeq sensors"] == []


# -- programs --------------------------------------------------------------------------------------
@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a program `speak` of these lines."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(lines: str) -> None:
        path = tmp_path / "speak"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_what_a_program_says(
    program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program('echo "throttled=0x$1"')
    assert tools.run("speak", "5") == "throttled=0x5"
    program("echo x; exit 3")
    assert tools.run("speak") == ""
    program(r"printf '\377ok'")
    assert tools.run("speak") == "ok"
    monkeypatch.setattr(tools, "SECONDS", 0.1)
    program("exec sleep 20")
    start = time.monotonic()
    assert tools.run("speak") == ""
    assert time.monotonic() - start < 5
