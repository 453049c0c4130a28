"""The doctor on machines of which only files are here: findings of system, processor and heat."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machines
import pytest
from doctorkit import look, runs
from machines import CPU, plant

from edgeq.doctor import System, heat, processor, ram
from edgeq.doctor import system as system_checks
from edgeq.sensors.tool import Tool


@pytest.fixture(autouse=True)
def some_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: a CPU with dotprod."""
    runs(monkeypatch, "dotprod", "neon", "portable")


def test_a_board_with_a_weak_supply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, "neon", "portable")
    found = look(plant(tmp_path, machines.UNDER_VOLTAGE), machines.UNDER_VOLTAGE_TOOL)
    grave = {topic: f.state for topic, f in found.items() if f.state in ("warn", "fail")}
    assert grave == {
        "temperature": "warn",
        "supply": "fail",
        "throttling": "warn",
        "swap": "warn",
    }
    assert found["supply"].text == "under-voltage now (0x50005)"
    assert "power supply" in found["supply"].remedy
    assert found["throttling"].text == "throttled now (0x50005)"
    assert found["temperature"].text == "82 °C, slowed down from 80 °C on"
    assert "SD card (/var/swap): slow, and wears it out" in found["swap"].text
    assert "swapoff /var/swap" in found["swap"].remedy
    assert found["memory limit"].state == "info"
    assert "cgroup_enable=memory" in found["memory limit"].remedy
    assert found["device"].text == "Raspberry Pi 4 Model B Rev 1.4 (profile rpi4)"
    assert found["clock"].text == "ondemand: now 600 MHz of 1500"
    assert found["system"].text.endswith("(bookworm), kernel 6.6.51+rpt-rpi-v8")
    assert found["SIMD"].text == "neon, the best that this CPU has"


def test_a_healthy_board(tmp_path: Path) -> None:
    found = look(plant(tmp_path, machines.HEALTHY), machines.HEALTHY_TOOL)
    assert {f.topic for f in found.values() if f.state in ("warn", "fail")} == set()
    assert found["threads"].text == (
        "2 for answers (4 with formats that take long), 4 for prompts; 4 cores"
    )
    assert found["throttling"].text == "none now (0x0)"
    assert found["temperature"].text == "51 °C, slowed down from 80 °C on"
    assert found["swap"].text == "0 B of 2.0 GiB used: compressed RAM (/dev/zram0)"
    assert found["memory limit"].text == "none"
    assert found["energy"].values["watts"] == pytest.approx(2.63)


def test_a_small_x86_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, "avxvnni", "avx2", "portable")
    found = look(plant(tmp_path, machines.SMALL_X86), machine="x86_64")
    assert found["system"].text.startswith("Ubuntu 24.04.3 LTS, kernel 6.8")
    assert found["throttling"].text == "too hot for 40 s, 4.0% of the time since the start"
    assert found["throttling"].state == "warn"
    assert found["temperature"].text == "72 °C, slowed down from 105 °C on"
    assert found["clock"].state == "ok"  # powersave, but of a driver that goes higher when needed
    assert found["energy"].text.startswith("measured by CPU energy counters")
    assert found["swap"].state == "info"


@pytest.mark.parametrize(
    ("word", "supply", "throttling"),
    [
        (0x50000, "warn: under-voltage since the start", "warn: throttled since the start"),
        (0x50001, "fail: under-voltage now", "warn: throttled since the start"),
        (0xE0008, "", "warn: clock capped, throttled since the start"),
        (0x00002, "", "warn: clock capped now"),
        (0x00000, "", "ok: none now"),
    ],
)
def test_words_of_the_firmware(tmp_path: Path, word: int, supply: str, throttling: str) -> None:
    found = look(tmp_path, machines.tool(get_throttled=f"throttled=0x{word:x}"))
    for topic, line in (("supply", supply), ("throttling", throttling)):
        assert (topic in found) == bool(line)
        if line:
            assert f"{found[topic].state}: {found[topic].text}" == f"{line} (0x{word:x})"


def test_a_firmware_that_tells_this_user_nothing(tmp_path: Path) -> None:
    plant(tmp_path, {**machines.UNDER_VOLTAGE, "dev/vcio": "", "dev/vcs1": ""})
    assert "firmware" not in look(tmp_path, machines.UNDER_VOLTAGE_TOOL)
    found = look(tmp_path)
    assert (found["firmware"].state, found["supply"].state) == ("info", "fail")
    assert "usermod -aG video" in found["firmware"].remedy


def test_a_container_with_a_quota(tmp_path: Path) -> None:
    found = look(plant(tmp_path, machines.CONTAINER))
    assert found["threads"].state == "warn"
    assert (
        "1 for answers, 1 for prompts; 8 cores; a control group allows 0.5" in found["threads"].text
    )
    assert found["memory limit"].state == "warn"
    assert found["memory limit"].text.startswith("1.0 GiB by memory.max of a control group, 324.0")
    assert found["load"].text == "9.00 threads at work in the last minute, on 8 CPUs"
    assert (found["clock"].state, found["temperature"].state) == ("info", "info")


def test_a_machine_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert {f.topic: f.text for f in found.values() if "looked at" in f.text} == {}
    unknown = ["clock", "temperature", "throttling", "RAM"]
    assert [found[topic].state for topic in unknown] == ["info"] * 4
    assert found["system"].text == "Linux, kernel unknown"


GARBLED = [b"\xff\xfe\x00", b"", b"9" * 4000, b"-1", b"a: [b] - / 1-2"]


@pytest.mark.parametrize("content", GARBLED)
@pytest.mark.parametrize(("files", "said"), machines.ALL.values(), ids=machines.ALL)
def test_garbled_files_break_nothing(
    tmp_path: Path, files: machines.Files, said: Tool, content: bytes
) -> None:
    plant(tmp_path, dict.fromkeys(files, content))
    found = look(tmp_path, lambda *words: content.decode("latin-1"))
    assert [f for f in found.values() if "could not be looked at" in f.text] == []


@pytest.mark.parametrize(("files", "said"), machines.ALL.values(), ids=machines.ALL)
def test_one_garbled_file_breaks_nothing(tmp_path: Path, files: machines.Files, said: Tool) -> None:
    plant(tmp_path, files)
    for i, name in enumerate(files):
        before = (tmp_path / name).read_bytes()
        plant(tmp_path, {name: GARBLED[i % len(GARBLED)]})
        _read_all(System(tmp_path, tool=said, machine="aarch64", name="Linux", env={}))
        plant(tmp_path, {name: before})


def _read_all(system: System) -> None:
    for module in (processor, heat, ram):
        assert list(module.findings(system))


def test_a_check_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(system: System) -> Any:
        raise ZeroDivisionError("what")

    monkeypatch.setattr(processor, "findings", broken)
    found = look(tmp_path)
    assert found["processor"].text == "could not be looked at: ZeroDivisionError: what"
    assert "RAM" in found


def test_what_is_wrong_comes_with_a_remedy(tmp_path: Path) -> None:
    for i, (files, said) in enumerate(machines.ALL.values()):
        for finding in look(plant(tmp_path / str(i), files), said).values():
            assert bool(finding.remedy) or finding.state in ("ok", "info"), finding
            assert "\n" not in finding.text + finding.remedy
            assert finding.state != "ok" or not finding.remedy


# -- system ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("machine", "part", "text", "remedy"),
    [
        ("aarch64", "0xd08", "32-bit programs on a 64-bit kernel (aarch64)", "64-bit image"),
        ("armv7l", "0xd08", "32-bit system (armv7l)", "64-bit image"),
        ("armv6l", "0xb76", "32-bit system (armv6l)", "a machine with a 64-bit CPU"),
    ],
)
def test_32_bits(tmp_path: Path, machine: str, part: str, text: str, remedy: str) -> None:
    plant(tmp_path, {"proc/cpuinfo": machines.PART.format(0, part)})
    found = look(tmp_path, machine=machine, bits=32)["64 bits"]
    assert (found.state, found.text) == ("fail", text)
    assert remedy in found.remedy


def test_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert look(tmp_path)["packages"].state == "ok"
    rules = {"numba": ["llvmlite<0.51,>=0.50.0dev0", "numpy<2.5,>=1.22; python_version > '3'"]}
    monkeypatch.setattr(system_checks, "requires", rules.get)
    numbers = {"numpy": "2.4.6", "numba": "0.68.1", "llvmlite": "0.50.0"}
    monkeypatch.setattr(system_checks, "_version", lambda name: numbers[name])
    assert look(tmp_path)["packages"].state == "ok"
    numbers["numpy"] = "2.5.1"
    found = look(tmp_path)["packages"]
    assert found.state == "fail"
    assert found.text.endswith(": this numba needs numpy<2.5,>=1.22")
    assert found.remedy.endswith("-m pip install 'numpy<2.5,>=1.22'")
    numbers["llvmlite"] = ""
    found = look(tmp_path)["packages"]
    assert "llvmlite missing" in found.text
    assert found.remedy.endswith("-m pip install llvmlite")


def test_clock_and_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not {"terminal"} & set(look(tmp_path))
    monkeypatch.setattr(system_checks.time, "time", lambda: 3600.0)
    found = [f for f in system_checks.findings(System(tmp_path)) if f.topic == "clock"]
    assert found[0].state == "warn"
    monkeypatch.setattr(system_checks.sys, "stdout", SimpleNamespace(encoding="ANSI_X3.4-1968"))
    assert look(tmp_path)["terminal"].remedy == "export LANG=C.UTF-8"


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows: what can be told without files of Linux."""
    monkeypatch.setattr("edgeq.sysfs.text", lambda path: "")
    monkeypatch.setattr("psutil.cpu_freq", lambda: SimpleNamespace(current=3204.0, max=3204.0))
    found = {f.topic: f for f in processor.findings(System(name="Darwin", env={}))}
    assert found["clock"].text == "now 3204 MHz of 3204"
    monkeypatch.setattr("psutil.cpu_freq", lambda: None)
    found = {f.topic: f for f in processor.findings(System(name="Darwin", env={}))}
    assert found["clock"].text.startswith("not shown")
    found = {f.topic: f for f in system_checks.findings(System(name="Darwin"))}
    assert (found["system"].state, "Linux only" in found["system"].text) == ("info", True)


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.sysfs.text", lambda path: "")
    found = {finding.topic: finding for finding in ram.findings(System())}
    assert found["RAM"].values["total"] > 1 << 28  # psutil's


# -- processor -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env", "topic", "state", "text"),
    [
        ({"EDGEQ_ISA": "neon"}, "SIMD", "warn", "neon, forced by EDGEQ_ISA, though dotprod runs"),
        ({"EDGEQ_ISA": "avx2"}, "SIMD", "fail", "EDGEQ_ISA=avx2: does not run on this CPU"),
        ({"EDGEQ_ISA": "dotprod"}, "SIMD", "ok", "dotprod, the best that this CPU has"),
        ({"NUMBA_DISABLE_JIT": "1"}, "compiler", "fail", "kernels cannot be compiled"),
        ({"NUMBA_CPU_NAME": "generic"}, "compiler", "info", "NUMBA_CPU_NAME is set"),
    ],
)
def test_settings(tmp_path: Path, env: dict[str, str], topic: str, state: str, text: str) -> None:
    found = look(tmp_path, env=env)[topic]
    assert found.state == state
    assert text in found.text
    assert "compiler" not in look(tmp_path, env={"NUMBA_DISABLE_JIT": "0"})


def test_instructions_that_the_system_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, "neon", "portable")
    found = look(plant(tmp_path, machines.HEALTHY))["SIMD"]
    assert (found.state, found.text) == (
        "warn",
        "neon: the system hides the dotprod that this CPU has",
    )
    runs(monkeypatch, "portable")
    found = look(tmp_path / "elsewhere", machine="x86_64")["SIMD"]
    assert (found.state, "-cpu host" in found.remedy) == ("warn", True)


def test_threads_that_are_fewer_than_cores(tmp_path: Path) -> None:
    plant(tmp_path, {**machines.HEALTHY, "proc/self/status": "Cpus_allowed_list:\t2-3"})
    found = look(tmp_path)["threads"]
    assert found.state == "warn"
    assert "this process may use 2 of 4 CPUs" in found.text


@pytest.mark.parametrize(
    ("keys", "state", "text", "remedy"),
    [
        (machines.governor("powersave", 600, 1500), "warn", "now 600", "performance"),
        (machines.governor("performance", 2400, 2400), "ok", "now 2400 MHz of 2400", ""),
        (machines.governor("schedutil", 900, 1000, 2400), "warn", "limited to 1000", "2400000"),
        (machines.governor("userspace", 600, 1500), "warn", "now 600 MHz", "performance"),
    ],
)
def test_governors(
    tmp_path: Path, keys: dict[str, Any], state: str, text: str, remedy: str
) -> None:
    found = look(plant(tmp_path, machines.cpus(2, **keys)))["clock"]
    assert found.state == state
    assert text in found.text
    assert remedy in found.remedy


def test_laptops(tmp_path: Path) -> None:
    supply = "sys/class/power_supply"
    plant(tmp_path, {f"{supply}/AC/type": "Mains", f"{supply}/AC/online": 1})
    plant(tmp_path, {f"{supply}/BAT0/type": "Battery", f"{CPU}/intel_pstate/no_turbo": 0})
    assert not {"supply", "turbo", "profile"} & set(look(tmp_path))
    plant(tmp_path, {f"{supply}/AC/online": 0, f"{CPU}/intel_pstate/no_turbo": 1})
    plant(tmp_path, {"sys/firmware/acpi/platform_profile": "low-power"})
    found = look(tmp_path)
    assert [found[t].state for t in ("supply", "turbo", "profile")] == ["info", "warn", "warn"]
