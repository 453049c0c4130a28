"""Files under /proc and /sys as machines have them, cut down to what is read; their programs."""

from collections.abc import Callable, Mapping
from pathlib import Path

Files = Mapping[str, object]
CPU = "sys/devices/system/cpu"


def plant(root: Path, files: Files) -> Path:
    """Write these files under a folder; None takes one away."""
    for name, content in files.items():
        path = root / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    return root


def tool(**answers: str) -> Callable[..., str]:
    """Programs that give these answers; get_throttled="..." is that of `vcgencmd get_throttled`."""
    return lambda *words: answers.get(words[-1], "")


def cpus(count: int, **files: object) -> dict[str, object]:
    """Equal cores, each with these files; `a__b` stands for a/b."""
    found: dict[str, object] = {f"{CPU}/online": f"0-{count - 1}", f"{CPU}/offline": ""}
    for i in range(count):
        found[f"{CPU}/cpu{i}/topology/thread_siblings_list"] = i
        found |= {f"{CPU}/cpu{i}/{k.replace('__', '/')}": v for k, v in files.items()}
    return found


def governor(name: str, now: int, most: int, top: int | None = None) -> dict[str, object]:
    """Keywords for `cpus`: clocks in MHz; top: what the CPU could do, were `most` not set."""
    return {
        "cpufreq__scaling_governor": name,
        "cpufreq__scaling_cur_freq": now * 1000,
        "cpufreq__scaling_max_freq": most * 1000,
        "cpufreq__cpuinfo_max_freq": (top or most) * 1000,
    }


def memory(total: int, available: int, swap: int = 0, free: int = 0) -> str:
    """/proc/meminfo; MiB."""
    values = {"MemTotal": total, "MemAvailable": available, "SwapTotal": swap, "SwapFree": free}
    return "\n".join(f"{name + ':':15} {mib * 1024:8} kB" for name, mib in values.items())


PART = "processor\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {}\n"
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
MOUNTS = "24 1 {} / / rw,noatime shared:1 - ext4 /dev/{} rw\n25 24 0:5 / /proc rw - proc proc rw"
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max file size             unlimited            unlimited            bytes
Max data size             unlimited            unlimited            bytes
Max locked memory         8388608              8388608              bytes
Max address space         {}            unlimited            bytes"""
THP = "sys/kernel/mm/transparent_hugepage/enabled"
ZONE = "sys/class/thermal/thermal_zone0"
DEVICES = "sys/class/block"

_COMMON: Files = {
    "proc/self/status": "Name:\tpython3\nCpus_allowed_list:\t0-3",
    "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope",
    "proc/self/limits": LIMITS.format("unlimited"),
    "proc/loadavg": "0.10 0.05 0.01 1/150 900",
    THP: "always [madvise] never",
}

# A four-core board on a weak power supply: hot, slow, swap on its SD card, no memory controller.
UNDER_VOLTAGE: Files = {
    **_COMMON,
    **cpus(4, cpu_capacity=1024, **governor("ondemand", 600, 1500)),
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian',
    "proc/sys/kernel/osrelease": "6.6.51+rpt-rpi-v8",
    "proc/cpuinfo": "".join(PART.format(i, "0xd08") for i in range(4))
    + "Model\t\t: Raspberry Pi 4 Model B Rev 1.4",
    "proc/device-tree/model": b"Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/meminfo": memory(3792, 2900, 512, 212),
    "proc/swaps": SWAPS + "/var/swap                               file\t\t524284\t\t307200\t\t-2",
    "proc/self/mountinfo": MOUNTS.format("179:2", "mmcblk0p2"),
    f"{DEVICES}/mmcblk0p2/partition": 2,
    f"{DEVICES}/mmcblk0/device/type": "SD",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids",
    f"{ZONE}/type": "cpu-thermal",
    f"{ZONE}/temp": 82277,
    f"{ZONE}/trip_point_0_type": "critical",
    f"{ZONE}/trip_point_0_temp": 110000,
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    "sys/class/hwmon/hwmon0/temp1_input": 82277,
    "sys/class/hwmon/hwmon1/name": "rpi_volt",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1,
    "sys/class/thermal/cooling_device0/type": "gpio-fan",
    "sys/class/thermal/cooling_device0/cur_state": 1,
}
UNDER_VOLTAGE_TOOL = tool(get_throttled="throttled=0x50005")

# A healthy faster board: 16 KiB pages, NVMe, zram, a fan, rails that can be measured.
HEALTHY: Files = {
    **_COMMON,
    **cpus(4, cpu_capacity=1024, **governor("ondemand", 2400, 2400)),
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian',
    "proc/sys/kernel/osrelease": "6.12.47+rpt-rpi-2712",
    "proc/cpuinfo": "".join(PART.format(i, "0xd0b") for i in range(4))
    + "Model\t\t: Raspberry Pi 5 Model B Rev 1.0",
    "proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/meminfo": memory(8063, 7200, 2048, 2048),
    "proc/swaps": SWAPS + "/dev/zram0                              partition\t2097136\t0\t100",
    "proc/self/mountinfo": MOUNTS.format("259:2", "nvme0n1p2"),
    f"{DEVICES}/nvme0n1p2/partition": 2,
    f"{DEVICES}/nvme0n1/queue/rotational": 0,
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
    "sys/fs/cgroup/user.slice/memory.max": "max",
    "sys/fs/cgroup/user.slice/memory.high": "max",
    f"{ZONE}/type": "cpu-thermal",
    f"{ZONE}/temp": 51250,
    f"{ZONE}/trip_point_0_type": "critical",
    f"{ZONE}/trip_point_0_temp": 110000,
    f"{ZONE}/trip_point_1_type": "active",
    f"{ZONE}/trip_point_1_temp": 50000,
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": 1,
}
PMIC = """ 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.20000000A
  VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.09066000V
      BATT_V volt(25)=0.00000000V"""
HEALTHY_TOOL = tool(get_throttled="throttled=0x0", pmic_read_adc=PMIC)

RAPL = "sys/class/powercap/intel-rapl:0"
_HEAT = "thermal_throttle__package_throttle"
# A small x86 machine: passive trip point, energy counters, protected itself from heat for a while.
SMALL_X86: Files = {
    **_COMMON,
    **cpus(
        4,
        **governor("powersave", 2900, 3400),
        cpufreq__scaling_driver="intel_pstate",
        **{f"{_HEAT}_count": 12, f"{_HEAT}_total_time_ms": 40_000},
    ),
    "etc/os-release": "PRETTY_NAME='Ubuntu 24.04.3 LTS'",
    "proc/sys/kernel/osrelease": "6.8.0-79-generic",
    "proc/uptime": "1000.00 3900.00",
    "proc/cpuinfo": "".join(
        f"processor\t: {i}\nmodel name\t: Intel(R) N100\nflags\t\t: fpu avx2 avx_vnni\n\n"
        for i in range(4)
    ),
    "proc/meminfo": memory(15700, 14000),
    "proc/swaps": SWAPS,
    "proc/self/mountinfo": MOUNTS.format("8:2", "sda2"),
    f"{DEVICES}/sda2/partition": 2,
    f"{DEVICES}/sda/queue/rotational": 1,
    "sys/fs/cgroup/cgroup.controllers": "cpu memory",
    f"{ZONE}/type": "acpitz",
    f"{ZONE}/temp": 27800,
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "sys/class/thermal/thermal_zone1/temp": 71000,
    "sys/class/thermal/thermal_zone1/trip_point_0_type": "passive",
    "sys/class/thermal/thermal_zone1/trip_point_0_temp": 0,
    "sys/class/hwmon/hwmon2/name": "coretemp",
    "sys/class/hwmon/hwmon2/temp1_input": 72000,
    "sys/class/hwmon/hwmon2/temp1_crit": 105000,
    f"{RAPL}/name": "package-0",
    f"{RAPL}/energy_uj": 262_000_000_000,
    f"{RAPL}/max_energy_range_uj": 262_143_000_000,
    f"{RAPL}:0/name": "core",
    f"{RAPL}:0/energy_uj": 5,
    f"{RAPL}:0/max_energy_range_uj": 262_143_000_000,
}

# A container with half of one CPU and a gigabyte on a larger machine.
CONTAINER: Files = {
    **_COMMON,
    **cpus(8),
    "proc/self/status": "Cpus_allowed_list:\t0-7",
    "proc/self/cgroup": "0::/",
    "proc/meminfo": memory(64000, 50000),
    "proc/self/mountinfo": "30 1 0:33 / / rw - overlay overlay rw,lowerdir=/a",
    "proc/loadavg": "9.00 8.00 7.00 9/800 4000",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory",
    "sys/fs/cgroup/cpu.max": "50000 100000",
    "sys/fs/cgroup/memory.max": 1 << 30,
    "sys/fs/cgroup/memory.high": "max",
    "sys/fs/cgroup/memory.current": 700 << 20,
}

# A board with three measured inputs, of which the first is all of it.
INA = "sys/class/hwmon/hwmon1"
THREE_INPUTS: Files = {
    f"{INA}/name": "ina3221",
    **{
        f"{INA}/in{i}_label": name
        for i, name in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1)
    },
    **{f"{INA}/in{i}_input": 5000 for i in (1, 2, 3)},
    **{f"{INA}/curr{i}_input": 1000 // i for i in (1, 2, 3)},
    f"{INA}/in4_input": 8,
    f"{INA}/curr4_input": 1833,
}

ALL = {
    "under-voltage": (UNDER_VOLTAGE, UNDER_VOLTAGE_TOOL),
    "healthy": (HEALTHY, HEALTHY_TOOL),
    "small x86": (SMALL_X86, tool()),
    "container": (CONTAINER, tool()),
    "three inputs": (THREE_INPUTS, tool()),
    "empty": ({}, tool()),
}
