"""Cores found in made-up trees of /sys and /proc."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from edgeq import cpus
from edgeq.cpus import Core, Cpus, find

CPU = "sys/devices/system/cpu"
Tree = Callable[[Mapping[str, object]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Maker of a root folder with these files."""

    def make(files: Mapping[str, object]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


def machine(siblings: list[str], **more: list[int]) -> dict[str, object]:
    """Files of CPUs: siblings as the kernel writes them, then one list per other file."""
    files: dict[str, object] = {}
    for i, text in enumerate(siblings):
        files[f"{CPU}/cpu{i}/topology/thread_siblings_list"] = text
    for name, values in more.items():
        place = {"capacity": "cpu_capacity", "freq": "cpufreq/cpuinfo_max_freq"}[name]
        files |= {f"{CPU}/cpu{i}/{place}": value for i, value in enumerate(values)}
    return files


ALONE = [str(i) for i in range(20)]


def test_four_equal_cores(tree: Tree) -> None:
    """A Raspberry Pi 5."""
    root = tree(machine(ALONE[:4], capacity=[1024] * 4, freq=[2400000] * 4))
    found = find(root, range(4))
    assert found == Cpus(tuple(Core((i,)) for i in range(4)))
    assert (found.threads, found.usable) == (4, 4)
    assert [found.home(i) for i in range(5)] == [frozenset()] * 5  # pinning gains nothing


def test_big_and_little_cores(tree: Tree) -> None:
    """RK3588: four A55, then four A76."""
    root = tree(machine(ALONE[:8], capacity=[414] * 4 + [1024] * 4))
    found = find(root, range(8))
    assert (found.threads, found.usable) == (4, 8)
    assert [core.cpus for core in found.cores] == [(i,) for i in (4, 5, 6, 7, 0, 1, 2, 3)]
    # As many threads as there are big cores stay on these, further ones go anywhere.
    assert [found.home(i) for i in range(3, 5)] == [{4, 5, 6, 7}, set()]
    only_little = find(root, [0, 1, 2])
    assert (only_little.threads, only_little.home(0)) == (3, set())


def test_frequencies_tell_where_capacities_are_missing(tree: Tree) -> None:
    files = machine(ALONE[:6], freq=[1800000] * 4 + [2200000] * 2)  # near: one kind of core
    assert find(tree(files), range(6)).threads == 6
    files = machine(ALONE[:6], freq=[1400000] * 4 + [2200000] * 2)
    assert find(tree(files), range(6)).threads == 2


def test_x86_with_two_kinds_of_cores(tree: Tree) -> None:
    """Alder Lake: six cores with two threads each, eight small ones."""
    pairs = [f"{i // 2 * 2}-{i // 2 * 2 + 1}" for i in range(12)]
    files = machine(pairs + ALONE[12:20], freq=[4700000] * 8 + [4900000] * 4 + [3600000] * 8)
    files["sys/devices/cpu_core/cpus"], files["sys/devices/cpu_atom/cpus"] = "0-11", "12-19"
    found = find(tree(files), range(20))
    assert (found.threads, found.usable) == (6, 20)
    assert found.fast[5] == Core((10, 11))
    assert (found.home(5), found.home(6)) == (set(range(12)), set())
    part = find(tree(files), [0, 2, 3, 12, 13])  # taskset: one sibling, a pair, two small ones
    assert (part.threads, part.usable, part.home(0)) == (2, 5, {0, 2, 3})


def test_siblings_count_once(tree: Tree) -> None:
    root = tree(machine(["0,2", "1,3", "0,2", "1,3"]))
    found = find(root, range(4))
    assert (found.threads, found.usable) == (2, 4)
    assert find(root, [1, 2]).threads == 2
    assert find(root, [1, 3]).threads == 1


def test_a_virtual_machine_says_little(tree: Tree) -> None:
    found = find(tree(machine(ALONE[:2])), range(2))
    assert (found.threads, found.usable, found.home(0)) == (2, 2, set())


def test_no_sysfs(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows: as many as are counted, not more than allowed."""
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    found = find(tree({}), range(8))
    assert (found.threads, found.usable, found.home(0)) == (4, 8, set())
    assert find(tree({}), [5, 7]).threads == 2
    monkeypatch.setattr("psutil.cpu_count", lambda logical: None)
    assert find(tree({}), range(3)).threads == 3


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "?"}, 4),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "200000 100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/y\n0::/",
                "sys/fs/cgroup/cpu/y/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/y/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ({"proc/self/cgroup": "broken"}, 4),
    ],
)
def test_quotas(tree: Tree, files: dict[str, str], threads: int) -> None:
    found = find(tree({**machine(ALONE[:4]), **files}), range(4))
    assert (found.threads, found.usable) == (threads, threads)


def test_this_machine() -> None:
    found = find()
    assert 1 <= found.threads <= found.usable <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_thread_stays_where_told_and_can_go_back() -> None:
    def check() -> None:
        before = os.sched_getaffinity(0)
        one = {min(before)}
        assert cpus.stay_on(one) == before
        assert os.sched_getaffinity(0) == one
        assert cpus.stay_on(before) == one
        assert cpus.stay_on([]) == frozenset()
        assert cpus.stay_on([10**4]) == frozenset()  # no such CPU: nothing happens
        seen.append(os.sched_getaffinity(0) == before)

    seen: list[bool] = []
    thread = threading.Thread(target=check)  # not the thread of the other tests
    thread.start()
    thread.join()
    assert seen == [True]
