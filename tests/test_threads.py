"""How many threads generate: as many as memory feeds, more where a model's formats take longer to
multiply than to read.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgeq
from edgeq import bench, cli, cpus, devices, limits, plan, rates
from edgeq.blueprint import Blueprint, File
from edgeq.cpus import Core, Cpus
from edgeq.kernels import cache
from edgeq.kernels import isa as isas
from edgeq.rates import Rates
from edgeq.sizes import blueprints

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
PI5 = devices.get("rpi5-8gb")
FOUR = Cpus(tuple(Core((k,)) for k in range(4)))


@pytest.fixture(scope="module")
def large() -> Blueprint:
    """Of 8B parameters."""
    return next(found for found in blueprints() if found.name == "8B")


def file(blueprint: Blueprint, recipe: str) -> File:
    return next(found for found in blueprint.files if found.recipe == recipe)


@pytest.mark.parametrize(
    ("recipe", "few"), [("Q2_K", 4), ("Q3_K_M", 4), ("Q4_K_M", 2), ("Q8_0", 2)]
)
def test_formats_that_take_long_get_more_threads(recipe: str, few: int, large: Blueprint) -> None:
    matrices = file(large, recipe).matrices
    assert rates.threads(matrices, FOUR, PI5) == (few, 4)
    for cores in (1, 2, 3):  # no more than may run, and none that nobody measured
        here = Cpus(FOUR.cores[:cores])
        assert rates.threads(matrices, here, PI5) == (min(cores, 2), cores)
    assert rates.threads(matrices, Cpus(FOUR.cores, quota=2.0), PI5) == (2, 2)
    assert rates.threads(matrices, FOUR, devices.get("rpi4")) == (4, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"cores": ()},
        {"cores": (replace(PI5.cores[0], kind="unheard-of"),)},
        {"cores": (replace(PI5.cores[0], count=2),)},
        {"decode_threads": None},
        {"read": ()},
    ],
)
def test_little_may_be_known(fields: dict[str, Any], large: Blueprint) -> None:
    """Of profiles that people save: then the usual number of threads generates."""
    device = replace(PI5, **fields)
    usual = devices.threads(FOUR, device)
    assert rates.threads(file(large, "Q2_K").matrices, FOUR, device) == usual


def test_it_is_what_devices_predict(large: Blueprint) -> None:
    """A plan takes the number of threads that the engine would, and is better for it."""
    isa, found = isas.named(PI5.isa, "rpi5"), rates.of_device(PI5)
    by = {row.file.recipe: row for row in plan.rows(large, found, isa, 8 << 30)}
    assert {name: by[name].threads for name in ("Q2_K", "Q8_0")} == {"Q2_K": 4, "Q8_0": 2}
    small = file(large, "Q2_K")
    two, four = (plan.predict(small, rates.of_device(PI5, (n, 4)))[1].tokens for n in (2, 4))
    assert four > rates.GAIN * two
    decode = by["Q2_K"].decode
    assert decode
    assert decode.tokens == four
    # Who asks for so many threads gets them, and of another engine less is known.
    assert rates.of_device(PI5, (2, 4)).others == ()
    told = plan.rows(large, found, isa, 8 << 30, efficiency=(0.8, None))
    assert {row.threads for row in told} == {2}


def test_others_must_be_worth_it(large: Blueprint) -> None:
    matrices = file(large, "Q8_0").matrices
    usual = Rates((2, 4), 10.0)
    for gain, wanted in ((1.04, 2), (1.06, 4)):
        known = replace(usual, others=(Rates((3, 4), 5.0), Rates((4, 4), 10.0 * gain)))
        assert rates.fastest(matrices, known).threads[0] == wanted
        # What was measured now does not decide: the engine has not measured.
        measured = Rates((2, 4), 1.0, others=(Rates((4, 4), 0.1),), chosen_by=known)
        assert rates.fastest(matrices, measured).read == {2: 1.0, 4: 0.1}[wanted]


def test_engine_and_bench_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = edgeq.convert(EXAMPLE, tmp_path / "m.gguf", "Q8_0", method="rtn")
    asked = []

    def answer(matrices: list[object], machine: Cpus) -> tuple[int, int]:
        asked.append((len(matrices), machine))
        return 1, 2

    monkeypatch.setattr(rates, "threads", answer)
    with edgeq.load(path) as model:
        assert (model.threads, model.threads_batch) == (1, 2)
    with edgeq.load(path, threads=2) as model:
        assert (model.threads, model.threads_batch) == (2, 2)
    wanted = bench.Plan(prompts=[8], gens=[2], reps=1)
    assert [row.n_threads for row in bench.run([path], wanted)] == [2, 1]
    assert set(asked) == {(57, cpus.find())}


def test_plan_says_so() -> None:
    def planned(*args: str) -> str:
        done = CliRunner().invoke(cli.app, ["plan", *args])
        assert done.exit_code == 0, done.output
        return done.stdout

    text = " ".join(planned("--device", "rpi5-8gb").split())
    assert "threads: 2, or 4 where arithmetic takes longer; prompts 4" in text
    rows = json.loads(planned("--device", "rpi5-8gb", "--json"))["rows"]
    assert {row["threads"] for row in rows if row["recipe"] == "Q8_0"} == {2}
    assert {row["threads"] for row in rows if row["recipe"] == "Q2_K"} == {2, 4}
    assert "threads: 4\n" in planned("--device", "rpi5-8gb", "-t", "4")


def test_this_machine_is_measured_with_each(
    monkeypatch: pytest.MonkeyPatch, large: Blueprint
) -> None:
    """Where its file says that more threads may do better; the choice is the engine's."""
    kept: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(cache, "recall", lambda name, isa: kept.get(name))
    monkeypatch.setattr(cache, "remember", lambda name, isa, values: kept.update({name: values}))
    monkeypatch.setattr(rates, "_probe", lambda formats, *_: dict.fromkeys(formats, 20.0))
    monkeypatch.setattr(limits, "products", lambda threads, cores: 9.0)
    monkeypatch.setattr(limits, "sustained", lambda threads, cores: 5.0 + threads)
    monkeypatch.setattr(cpus, "find", lambda: FOUR)
    monkeypatch.setattr(devices, "here", lambda: PI5)
    formats = {m.format.name for found in large.files for m in found.matrices}
    found = rates.measured(formats)
    [four] = found.others
    assert [(own.threads, own.read) for own in (found, four)] == [((2, 4), 7.0), ((4, 4), 9.0)]
    assert (found.row["Q8_0"], four.row["Q8_0"]) == (40.0, 80.0)
    assert four.tile == found.tile == dict.fromkeys(formats, 4 * 20.0 * rates.TOGETHER)
    for recipe in ("Q8_0", "Q3_K_M", "Q2_K"):
        matrices = file(large, recipe).matrices
        assert rates.fastest(matrices, found).threads == rates.threads(matrices, FOUR)
    assert rates.measured(["Q8_0"], (1, 1)).others == ()
    # Of other machines memory is read with one number of threads only.
    monkeypatch.setattr(devices, "here", lambda: devices.get("laptop-avx512"))
    assert rates.measured(["Q8_0"]).others == ()
