"""Speed measurements: what they count, and the limits they are compared with."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import machines
import pytest
from machines import plant

from edgeq import bench, convert, cpus, limits, sensors
from edgeq.engine import Model
from edgeq.errors import RequestError
from edgeq.kernels import cache

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(EXAMPLE, tmp_path_factory.mktemp("bench") / "tiny.gguf", "Q8_0")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "DOT_STEPS", 1 << 12)
    monkeypatch.setattr(cache, "recall", lambda name, isa: None)
    monkeypatch.setattr(cache, "remember", lambda name, isa, values: None)


def run(path: Path, **plan: Any) -> list[bench.Row]:
    return list(bench.run([path], bench.Plan(**plan)))


def test_rows_agree_with_themselves(path: Path) -> None:
    rows = run(path, prompts=[16], gens=[4], threads=[2], reps=2, depths=[8])
    assert [(r.n_prompt, r.n_gen, r.n_depth, r.n_threads) for r in rows] == [
        (16, 0, 8, 2),
        (0, 4, 8, 2),
    ]
    for row in rows:
        assert len(row.samples_ns) == 2
        tokens = row.n_prompt + row.n_gen
        assert row.samples_ts[0] == pytest.approx(tokens * 1e9 / row.samples_ns[0])
        assert row.avg_ts == pytest.approx(sum(row.samples_ts) / 2)
        assert row.limit > 0
    # 8 layers of 256 x (512 + 256 + 3 * 768) weights; generation also reads the output matrix.
    assert rows[0].rate == pytest.approx(rows[0].avg_ts * 8 * 256 * 3072 / 1e9)
    weights = 8 * 256 * 3072 + 4096 * 256
    assert rows[1].rate == pytest.approx(rows[1].avg_ts * weights * 34 / 32 / 1e9)


def test_the_usual_tests_are_cut_to_the_context(path: Path) -> None:
    rows = run(path, threads=[2], reps=1, depths=[240, 250])
    assert [(r.n_prompt, r.n_gen) for r in rows] == [(16, 0), (0, 16), (6, 0), (0, 6)]


def test_rows_come_in_llama_benchs_order(path: Path) -> None:
    """Models, threads, depths, then prompts before generations."""
    plan = bench.Plan(prompts=[2, 3], gens=[1], depths=[0, 5], threads=[2, 1], reps=1)
    rows = list(bench.run([path, str(path)], plan))
    tests = [(d, p, g) for d in (0, 5) for p, g in ((2, 0), (3, 0), (0, 1))]
    expected = [(threads, *test) for _ in range(2) for threads in (2, 1) for test in tests]
    assert [(r.n_threads, r.n_depth, r.n_prompt, r.n_gen) for r in rows] == expected


def test_each_kind_of_test_has_its_threads_and_none_comes_twice(path: Path) -> None:
    plan = {"prompts": [9], "gens": [1], "reps": 1}
    rows = run(path, **plan, threads=[1, 3], threads_batch=[2])
    assert [(r.n_threads, r.n_prompt) for r in rows] == [(2, 9), (1, 0), (3, 0)]
    assert {r.n_threads for r in run(path, **plan)} == {cpus.find().threads}


def test_what_is_before_a_test_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = Model.feed

    def count(self: Model, ids: list[int], **more: Any) -> Any:
        fed.append(len(ids))
        return feed(self, ids, **more)

    monkeypatch.setattr(Model, "feed", count)
    run(path, prompts=[20], gens=[3], depths=[50, 60], threads=[1], reps=2, warm_up=False)
    assert [n for n in fed if n] == [50, 20, 20, *[1] * 6, 7, 20, 20, *[1] * 6]
    fed.clear()
    run(path, prompts=[20], gens=[7], threads=[1], reps=1)
    assert [n for n in fed if n] == [20, 20, *[1] * (bench.WARM_UP + 7)]


def test_rests_before_each_test(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("edgeq.bench.time.sleep", rests.append)
    run(path, prompts=[2], gens=[1, 2], threads=[1], reps=1, delay=2.5)
    assert rests == [2.5] * 3


def test_sensors_are_read_while_a_test_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, machines.SMALL_X86)
    energy, heat = (tmp_path / f"{machines.RAPL}/energy_uj", "sys/class/hwmon/hwmon2/temp1_input")
    monkeypatch.setattr(sensors, "Sensors", partial(sensors.Sensors, tmp_path, machines.tool()))
    feed = Model.feed

    def heated(self: Model, ids: list[int], **more: Any) -> Any:
        """Each token takes a joule; those before the test, which do not count, are hot."""
        plant(tmp_path, {heat: 90000 if len(ids) == 8 else 80000})
        uj = (int(energy.read_text()) + 1_000_000 * len(ids)) % 262_143_000_000
        energy.write_text(str(uj))
        return feed(self, ids, **more)

    monkeypatch.setattr(Model, "feed", heated)
    energy.write_text("262130000000")  # soon 0 again
    rows = run(path, prompts=[16], gens=[4], threads=[2], reps=3, depths=[8])
    assert len(rows) == 2
    for row in rows:
        assert row.joules_per_token == pytest.approx(1)
        assert row.power_from == "CPU energy counters"
        assert (row.max_celsius, row.mean_mhz, row.throttled) == (80, 2900, False)


def test_progress_names_what_runs(path: Path) -> None:
    said: list[str] = []
    plan = bench.Plan(prompts=[2], gens=[], depths=[3], threads=[1], reps=2)
    list(bench.run([path], plan, progress=said.append))
    assert said == [
        f"tiny.gguf: pp2 @ d3: {what}" for what in ("warm-up", "run 1 of 2", "run 2 of 2")
    ]


def test_a_test_must_fit_the_context(path: Path) -> None:
    with pytest.raises(RequestError, match="context length 256: a test of 300 tokens"):
        run(path, prompts=[300])
    with pytest.raises(RequestError, match="context length 256: a test of 257 tokens"):
        run(path, depths=[0, 256])
    with pytest.raises(RequestError, match="no tests"):
        run(path, prompts=[], gens=[])
    with pytest.raises(RequestError, match="threads = 257"):
        run(path, threads=[1, 257])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_read_in_small_pages() -> None:
    """As a model's file is; where the system has large ones they are read faster."""
    place = limits._like_a_file(1 << 23)
    entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
    here = f"{place.ctypes.data:x}-"
    [flags] = [after for before, after in pairwise(entries) if f"\n{here}" in before]
    assert "nh" in flags.splitlines()[0].split()


def test_limits_are_positive_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 24)
    kept: dict[str, Any] = {}
    monkeypatch.setattr(cache, "recall", lambda name, isa: kept.get(name))
    monkeypatch.setattr(cache, "remember", lambda name, isa, values: kept.update({name: values}))
    first = limits.measured(1, 2)
    assert first.read_gbs > 0.1
    assert first.dot_gmacs > 0.1
    kept["limits-1"]["read_gbs"] = 1e6  # of a better moment
    assert limits.measured(1, 2).read_gbs == kept["limits-1"]["read_gbs"] == 1e6
    assert limits.measured(1, 2, again=True).read_gbs < 1e6
    good = {"threads": 1, "read_gbs": 1e6, "dot_gmacs": 1e6}
    wrong: list[dict[str, Any]] = [{"threads": 2}, {"read_gbs": 0}, {"dot_gmacs": "x"}, {"more": 1}]
    for part in [*wrong, {"dot_gmacs": float("nan")}, {"read_gbs": float("inf")}]:
        kept["limits-1"] = {**good, **part}
        found = limits.measured(1, 2)
        assert found.threads == 1
        assert 0 < found.read_gbs < 1e6
        assert 0 < found.dot_gmacs < 1e6
