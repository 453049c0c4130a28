"""`edgeq bench`: flags, and the formats of its results."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell import edgeq

from edgeq import bench


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A fake measurement behind `edgeq bench model.gguf`; holds the arguments of the last one."""
    called: dict[str, Any] = {}

    def row(prompt: int, gen: int, depth: int) -> bench.Row:
        return bench.Row(
            cpu_info="a cpu",
            backends="avx2",
            model_filename="model.gguf",
            model_type="tiny",
            model_size=3 * 2**20,
            model_n_params=7_340_000,
            n_threads=2,
            type_k="f16",
            type_v="f16",
            n_prompt=prompt,
            n_gen=gen,
            n_depth=depth,
            test_time="2026-01-01T00:00:00Z",
            avg_ns=1_000_000_000,
            stddev_ns=10,
            avg_ts=123.456,
            stddev_ts=7.891,
            samples_ns=[1_000_000_000],
            samples_ts=[123.456],
            peak_rss=3 * 2**20,
            rate=50.0,
            limit=200.0,
            **called.get("felt", {}),
        )

    def run(paths: list[Path], plan: bench.Plan, **options: Any) -> Iterator[bench.Row]:
        called.update(options, paths=[str(path) for path in paths], plan=plan)
        for test in plan.tests(called.get("context", 4096)):
            yield row(test.prompt, test.gen, test.depth)

    monkeypatch.setattr("edgeq.bench.run", run)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return called


def test_bench_defaults_and_columns(measured: dict[str, Any]) -> None:
    result = edgeq("bench", "model.gguf")
    assert result.stdout.splitlines() == [
        "| model | size | params | backend | threads | test | t/s | of this machine | peak RAM |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        "| tiny | 3.0 MiB | 7.34 M | avx2 | 2 | pp512 | 123.46 ± 7.89 |"
        " 50.0 GMAC/s, 25% | 3.0 MiB |",
        "| tiny | 3.0 MiB | 7.34 M | avx2 | 2 | tg128 | 123.46 ± 7.89 | 50.0 GB/s, 25% | 3.0 MiB |",
    ]
    assert measured["plan"] == bench.Plan(threads=[None], threads_batch=[None], depths=[0])
    assert result.stderr == ""
    assert measured["progress"] is None  # no terminal: no status line


def test_bench_says_when_it_measures_less_than_usual(measured: dict[str, Any]) -> None:
    measured["context"] = 256
    told = edgeq("bench", "model.gguf").stderr
    assert told == "pp256: the model's context holds no test of 512 tokens\n"
    assert edgeq("bench", "model.gguf", "-p", "100").stderr == ""


def test_bench_flags(measured: dict[str, Any]) -> None:
    flags = ["-p", "0,64", "-n", "16,32", "-d", "100", "-t", "3", "-r", "2", "-o"]
    rows = json.loads(edgeq("bench", "model.gguf", *flags, "json").stdout)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(64, 0), (0, 16), (0, 32)]
    assert rows[0]["samples_ts"] == [123.456]
    assert (measured["plan"].reps, measured["plan"].threads) == (2, [3])
    assert "| pp64 @ d100 |" in edgeq("bench", "model.gguf", *flags, "md").stdout
    lines = edgeq("bench", "model.gguf", *flags, "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = edgeq("bench", "model.gguf", *flags, "csv").stdout.splitlines()
    assert len(table) == 4
    assert table[0].startswith('"cpu_info","backends",')


def test_bench_marks_rows_of_a_machine_held_back(measured: dict[str, Any]) -> None:
    measured["felt"] = {"throttled": True, "throttled_by": "under-voltage, throttled"}
    flags = ["bench", "model.gguf", "-n", "0"]
    result = edgeq(*flags)
    assert "| pp512 | 123.46 ± 7.89 **throttled** |" in result.stdout
    assert "max °C" not in result.stdout
    assert "warning: pp512: this machine was held back (under-voltage, throttled)" in result.stderr
    assert json.loads(edgeq(*flags, "-o", "json").stdout)[0]["throttled"] is True
    head, row = csv.reader(edgeq(*flags, "-o", "csv").stdout.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert (cells["throttled"], cells["max_celsius"]) == ("True", "")


def test_bench_shows_what_sensors_said(measured: dict[str, Any]) -> None:
    sensed = {"max_celsius": 71.25, "mean_mhz": 2399.6, "joules_per_token": 0.12345}
    measured["felt"] = {**sensed, "throttled": False, "power_from": "a sensor"}
    lines = edgeq("bench", "model.gguf").stdout.splitlines()
    assert lines[0].endswith("| peak RAM | max °C | mean MHz | J/token |")
    assert lines[1].count("---:") == 10
    assert lines[2].endswith("| 3.0 MiB | 71 | 2400 | 0.123 |")
    row = json.loads(edgeq("bench", "model.gguf", "-o", "json").stdout)[0]
    ours = list(row)[list(row).index("samples_ts") + 1 :]  # after llama-bench's
    assert ours[:3] == ["peak_rss", "rate", "limit"]
    assert set(ours[3:]) == {*measured["felt"], "throttled_by"}


def test_bench_lists_ranges_and_several_models(measured: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.gguf").touch()
    flags = ["-p", "8-32*2,5", "-p", "7", "-n", "0", "-d", "0-20+10", "-t", "1-3", "-tb", "4"]
    more = ["--no-warmup", "--delay", "1.5", "-m", "other.gguf"]
    rows = json.loads(edgeq("bench", "model.gguf", *flags, *more, "-o", "json").stdout)
    assert measured["paths"] == ["model.gguf", "other.gguf"]
    assert measured["plan"] == bench.Plan(
        prompts=[8, 16, 32, 5, 7],
        gens=[],
        depths=[0, 10, 20],
        threads=[1, 2, 3],
        threads_batch=[4],
        warm_up=False,
        delay=1.5,
    )
    assert len(rows) == 15


def test_bench_measures_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.limits import Limits
    from edgeq.tuning import Tuning

    def measured(threads: int, cores: int, *, again: bool) -> Limits:
        return Limits(threads, 12.345 * threads, 100.0 * threads)

    monkeypatch.setattr("edgeq.limits.measured", measured)
    result = edgeq("bench", "--limits", "-t", "1,2")
    assert result.stdout.splitlines() == [
        "| threads | read GB/s | dot GMAC/s |",
        "| ---: | ---: | ---: |",
        "| 1 | 12.3 | 100.0 |",
        "| 2 | 24.7 | 200.0 |",
    ]
    assert result.stderr == ""
    shown = json.loads(edgeq("bench", "--limits", "-t", "2", "-o", "json").stdout)
    assert shown == [{"threads": 2, "read_gbs": 24.69, "dot_gmacs": 200.0}]
    monkeypatch.setattr("edgeq.tuning.tuned", lambda *_, again: Tuning(1024, 64, 2048))
    assert edgeq("bench", "--tune", "-t", "2").stdout.splitlines()[2] == "| 2 | 1024 | 64 | 2048 |"
    assert edgeq("bench", "--tune", "-t", "0").exit_code == 2
    assert "Missing argument" in edgeq("bench").stderr


@pytest.mark.parametrize("value", ["many", "1,-2", "", "1,,2", "4-2", "0-9*2", "1-9*1", "1-9+0"])
def test_bench_refuses_what_is_not_a_count(measured: dict[str, Any], value: str) -> None:
    assert edgeq("bench", "model.gguf", "-p", value).exit_code == 2


def test_bench_saves_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgeq import devices
    from edgeq.limits import Limits

    calls: list[int] = []

    def measured(threads: int, cores: int, *, again: bool) -> Limits:
        calls.append(threads)
        return Limits(threads, 12.345 * threads, 100.0 * threads)

    monkeypatch.setattr("edgeq.limits.measured", measured)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    path = tmp_path / "my-board.toml"
    result = edgeq("bench", "--save", str(path), "-t", "1,2")
    assert result.stdout.splitlines()[2:] == ["| 1 | 12.3 | 100.0 |", "| 2 | 24.7 | 200.0 |"]
    assert result.stderr.startswith(f"written: {path}: ")
    device = devices.get(path)
    assert [(read.threads, read.gbs) for read in device.read] == [(1, 12.35), (2, 24.69)]
    calls.clear()
    refused = edgeq("bench", "--save", str(path))
    assert (refused.exit_code, calls) == (2, [])  # before anything is measured
    assert "exists already" in refused.stderr
    same = edgeq("bench", str(path), "--save", str(path), "--force")
    assert (same.exit_code, "is the model itself" in same.stderr) == (2, True)
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 1e3, 1e3))
    busy = edgeq("bench", "--save", str(path), "--force", "-o", "json")
    assert "warning: other programs are at work: these figures are too low" in busy.stderr
    shown = json.loads(busy.stdout)
    assert [row["threads"] for row in shown] == calls == list(range(1, len(calls) + 1))
