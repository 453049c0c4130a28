"""Predictions: sizes to the byte; memory, speed beside what was measured and published."""

import itertools
import subprocess
import sys
from pathlib import Path

import published
import pytest
from click.testing import CliRunner, Result

import edgeq
from edgeq import cli, devices, limits, loss, plan, rates
from edgeq.blueprint import AS_IS, Blueprint, read
from edgeq.errors import FormatError, RequestError
from edgeq.gguf import GgufWriter, open_gguf
from edgeq.kernels import cache
from edgeq.kernels import isa as isas
from edgeq.rates import Rates
from edgeq.recipe import Model, Recipe
from edgeq.sizes import MIXTURES, blueprints

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
F16 = ("f16", "f16")
PI5 = rates.of_device(devices.get("rpi5"))


@pytest.fixture(scope="module")
def example() -> Blueprint:
    return read(EXAMPLE)


def planned(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *args])


# -- sizes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q2_K", "Q8_0", "F16"])
def test_sizes_are_what_convert_writes(recipe: str, example: Blueprint, tmp_path: Path) -> None:
    made = edgeq.convert(EXAMPLE, tmp_path / "m.gguf", recipe, method="rtn")
    [file] = [file for file in example.files if file.recipe == recipe]
    assert file.nbytes == made.stat().st_size
    again = read(made)
    if recipe == "F16":  # from which the others can be made
        assert {f.recipe: f.nbytes for f in again.files}.keys() == {f.recipe for f in example.files}
    else:
        [kept] = [f for f in again.files if f.recipe == AS_IS]
        assert (kept.nbytes, kept.divergence) == (file.nbytes, file.divergence)
        assert kept.bits_per_weight == pytest.approx(file.bits_per_weight)
        # Beside it, what other recipes would make, but not the same again.
        others = {f.recipe: f.nbytes for f in again.files if f is not kept}
        assert others == {f.recipe: f.nbytes for f in example.files if f is not file}


def test_more_bits_lose_less(example: Blueprint) -> None:
    """Of the recipes of K-quants; the smallest file comes first."""
    sizes = [file.nbytes for file in example.files]
    assert sizes == sorted(sizes)
    named = {file.recipe: file for file in example.files}
    order = [named[name] for name in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")]
    for small, large in itertools.pairwise(order):
        assert (small.divergence or 0) > (large.divergence or 0) > 0
        assert small.bits_per_weight < large.bits_per_weight


def test_the_loss_is_that_of_the_formats() -> None:
    """Rows of 2048 weights lose what the recipe says; rows of 576 cannot have its formats."""
    short, long = blueprints()[0], blueprints()[3]
    told = {name: Recipe.load(name).divergence for name in MIXTURES}
    assert {file.recipe: file.divergence for file in long.files} == told
    small = {file.recipe: file.divergence or 0 for file in short.files}
    assert small["Q8_0"] == told["Q8_0"]
    for name in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K"):  # which get more bits there
        assert 0 < small[name] < 0.7 * (told[name] or 0), name
    assert max(small["Q2_K"], small["Q3_K_M"]) < (told["Q3_K_M"] or 0)
    isa = isas.modules()["dotprod"]
    ram = max(file.ram(2048, F16, PI5.threads, isa) for file in short.files)
    best = plan.recommended(plan.rows(short, PI5, isa, ram, ctx=2048))
    assert best is not None
    assert best[0].file.recipe == "Q4_K_M"


def test_a_mixture_of_no_recipe_loses_what_its_formats_do() -> None:
    shapes = {"a.weight": (64, 256), "b.weight": (64, 256)}
    mine, model = Recipe("Mine", 0, "Q8_0", ""), Model(1, 1, 1)
    named = [loss.expected(mine, shapes, dict.fromkeys(shapes, f), model) for f in ("Q8_0", "Q4_0")]
    assert named == [Recipe.load("Q8_0").divergence, Recipe.load("Q4_0").divergence]
    both = loss.expected(mine, shapes, {"a.weight": "Q8_0", "b.weight": "Q4_0"}, model)
    assert both == pytest.approx(sum(value or 0 for value in named) / 2)
    assert loss.expected(mine, shapes, dict.fromkeys(shapes, "F16"), model) == 0
    assert loss.expected(mine, shapes, dict.fromkeys(shapes, "Q9"), model) is None


# -- memory ----------------------------------------------------------------------------------------
MEASURE = """
import sys, edgeq
from edgeq import memory
with edgeq.load(sys.argv[1], ctx=256, kv="f16") as model:
    model.feed([i % 4000 for i in range(255)], logits=True)
    print(memory.peak(), model.threads, model.threads_batch, model.kv_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured as Linux counts them")
def test_memory_is_what_a_process_takes(example: Blueprint, tmp_path: Path) -> None:
    made = edgeq.convert(EXAMPLE, tmp_path / "m.gguf", "Q8_0", method="rtn")
    command = [sys.executable, "-c", MEASURE, str(made)]
    for _ in range(2):  # the first may compile kernels
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, few, many, _ = (int(word) for word in shown.split())
    [file] = [file for file in example.files if file.recipe == "Q8_0"]
    assert file.ram(256, F16, (few, many), isas.choose()) == pytest.approx(peak, rel=0.25)


def test_memory_grows_with_context_and_type(example: Blueprint) -> None:
    big = blueprints()[-1].files[0]
    isa = isas.modules()["dotprod"]

    def ram(ctx: int, *kv: str) -> int:
        return big.ram(ctx, (kv[0], kv[-1]), (2, 4), isa)

    assert big.arch is not None
    per_position = 2 * 2 * big.arch.block_count * big.arch.head_count_kv * big.arch.head_dim
    assert ram(8192, "f16") - ram(4096, "f16") == pytest.approx(4096 * per_position, rel=0.02)
    assert ram(4096, "f16") > ram(4096, "q8_0", "f16") > ram(4096, "q8_0") > ram(4096, "q4_0")


@pytest.mark.parametrize("kv", ["f16", "q4_0"])
def test_the_largest_context_just_fits(kv: str) -> None:
    isa, pair = isas.modules()["dotprod"], (kv, kv)
    for model in blueprints()[:3]:
        for file in model.files:
            need = file.ram(2048, pair, (2, 4), isa)
            largest = file.largest_context(need, pair, (2, 4), isa)
            assert 2048 - 32 <= largest <= 2048
            assert file.largest_context(file.nbytes, pair, (2, 4), isa) == 0
            assert file.largest_context(1 << 40, pair, (2, 4), isa) == model.arch.context_length


# -- speed -----------------------------------------------------------------------------------------
def test_published_speeds_are_predicted() -> None:
    """Within a quarter, told the engine's efficiency; what misses is known, and does miss."""
    found = list(published.rows())
    assert {row.device for row in found} >= {"rpi5", "rpi4", "rk3588"}
    for row in found:
        assert (abs(row.off) > 0.25) == bool(row.misses), row
    assert sum(not row.misses for row in found) >= 25


def test_measured_speeds_are_predicted() -> None:
    """Within 15 %, with the rates of kernels and memory at that time."""
    found = list(published.measured())
    for row in found:
        assert abs(row.off[0]) <= 0.15, row
        assert (abs(row.off[1]) > 0.15) == bool(row.misses), row
    assert sum(not row.misses for row in found) >= 12


def test_the_page_shows_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    published.main()
    page = (EXAMPLE.parents[1] / "docs/devices.md").read_text()
    shown = planned("--device", "rpi5-8gb").stdout.strip("\n").splitlines()
    block = "\n".join(
        ["```console", "$ edgeq plan --device rpi5-8gb", *map(str.rstrip, shown), "```"]
    )
    assert block in page
    assert block in (EXAMPLE.parents[1] / "README.md").read_text()
    assert set(capsys.readouterr().out.splitlines()) <= set(page.splitlines())
    assert all(f"`{device.id}`" in page for device in devices.every())


def test_a_slower_part_is_the_limit(example: Blueprint) -> None:
    file = next(file for file in blueprints()[3].files if file.recipe == "Q4_K_M")
    formats = {m.format.name for m in file.matrices} | {"F16"}
    fast = dict.fromkeys(formats, 1e4)
    bound = Rates((2, 2), 10.0, fast, fast)
    prefill, decode = plan.predict(file, bound)
    nbytes = sum(m.rows * m.row_bytes for m in file.matrices)
    assert prefill is not None
    assert decode.limit == "memory"
    assert decode.tokens == pytest.approx(10e9 / nbytes, rel=0.05)
    slow = Rates((2, 2), 1e4, dict.fromkeys(formats, 10.0), fast)
    assert plan.predict(file, slow)[1].limit == "compute"
    # With much in the cache, attention is.
    deep = plan.predict(file, slow, depth=100_000)[1]
    assert deep.limit == "attention"
    assert deep.tokens < plan.predict(file, slow)[1].tokens / 2
    assert plan.predict(file, Rates((2, 2), 10.0))[0] is None  # nothing is known of panels


def test_rates_of_a_device_come_from_its_files() -> None:
    assert PI5.threads == (2, 4)
    assert PI5.read == 13.23
    assert rates.of_device(devices.get("rpi5"), (4, 4)).read == 11.59
    board = devices.get("rk3588")  # more threads than fast cores only wait for the slow ones
    assert rates.of_device(board, (8, 8)).tile == rates.of_device(board, (4, 4)).tile
    known = devices.get("laptop-avx2")
    assert rates.of_device(known).read == pytest.approx(known.read[0].gbs * rates.ATTAINABLE)
    assert "theoretical" in rates.of_device(known).source
    assert "copy, 1 thread;" in rates.of_device(devices.get("rpi4")).source
    with pytest.raises(RequestError, match="no cores or no bandwidth"):
        rates.of_device(devices.get("generic"))


@pytest.mark.parametrize("device", [d.id for d in devices.every() if d.cores])
def test_every_device_has_a_speed_of_prompts(device: str) -> None:
    """Floats are multiplied slower than bytes, by the core's file or by a guess."""
    found = rates.of_device(devices.get(device))
    assert 0 < found.tile["F16"] < 0.7 * found.tile["Q8_0"]
    assert 0 < found.row["F16"] < found.tile["Q8_0"]
    assert found.dot == pytest.approx(sum(dot.gmacs for dot in devices.get(device).dot))


def test_fewer_threads_multiply_less() -> None:
    one, four = (rates.of_device(devices.get("n100"), (n, n)) for n in (1, 4))
    assert 4 * one.tile["Q4_K"] == pytest.approx(four.tile["Q4_K"])
    assert 4 * one.dot == pytest.approx(four.dot)


def test_of_kernels_the_best_measured_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was busy the first time, and one that is busy now."""
    kept: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(cache, "recall", lambda name, isa: kept.get(name))
    monkeypatch.setattr(cache, "remember", lambda name, isa, values: kept.update({name: values}))
    monkeypatch.setattr(limits, "products", lambda threads, cores: 9.0)
    monkeypatch.setattr(limits, "sustained", lambda threads, cores: 6.0)
    monkeypatch.setattr(rates, "SECONDS", 0.005)
    monkeypatch.setattr(rates, "MORE_SECONDS", 0.005)
    said: list[str] = []
    found = rates.measured(["Q8_0", "F16"], (1, 1), lambda what, *_: said.append(what))
    assert (found.read, found.dot, set(found.row)) == (6.0, 9.0, {"Q8_0", "F16"})
    assert said[-1] == "measuring Q8_0"
    assert min(*found.row.values(), *found.tile.values()) > 0.01
    kept["rates-row"] = {"Q8_0": float("nan"), "F16": 1e-3}  # damaged; while it was busy
    kept["rates-tile"]["F16"] = 1e9  # more than it can do now
    again = rates.measured(["Q8_0", "F16"], (1, 1))
    assert min(again.row["F16"], again.row["Q8_0"]) > 0.01
    assert again.tile["F16"] == 1e9 * rates.TOGETHER
    assert kept["rates-row"]["F16"] == again.row["F16"]
    with pytest.raises(RequestError, match="threads = 200: this machine has"):
        rates.measured(["F16"], (200, 200))


def test_what_goes_on_coming_from_memory_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst from a cache does not count."""
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_times", lambda program, repeats: [1e-9, 1e-3, 1e-3, 5.0])
    assert limits.sustained(1, 2) == pytest.approx((1 << 20) / 1e-3 / 1e9)


# -- advice ----------------------------------------------------------------------------------------
def test_advice_is_the_smallest_good_one_that_fits(example: Blueprint) -> None:
    isa = isas.modules()["dotprod"]
    file = {file.recipe: file for file in example.files}
    rows = plan.rows(example, PI5, isa, 1 << 30)
    best = plan.recommended(rows)
    assert best is not None
    assert best[0].file.recipe == "Q4_K_M"
    # Where only less fits, the best of that; where nothing fits, nothing.
    ram = file["Q3_K_M"].ram(256, F16, PI5.threads, isa)
    worse = plan.recommended(plan.rows(example, PI5, isa, ram))
    assert worse is not None
    assert worse[0].file.recipe == "Q3_K_M"
    nothing = plan.rows(example, PI5, isa, 1 << 20)
    assert plan.recommended(nothing) is None
    assert plan.closest(nothing) is None
    # With a smaller context something would.
    small = blueprints()[0].files[-1]
    ram = small.ram(1024, F16, PI5.threads, isa)
    rows = plan.rows(blueprints()[0], PI5, isa, ram, ctx=8192)
    assert plan.recommended(rows) is None
    near = plan.closest(rows)
    assert near is not None
    assert near.file == small
    assert 1024 - 32 <= (near.largest or 0) <= 1024


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    made = edgeq.convert(EXAMPLE, tmp_path / "m.gguf", "Q8_0", method="rtn")
    with open_gguf(made) as gguf, GgufWriter(tmp_path / "v.gguf", gguf.typed_metadata(), []):
        pass
    with pytest.raises(FormatError, match=r"v\.gguf: no tensors"):
        read(tmp_path / "v.gguf")
