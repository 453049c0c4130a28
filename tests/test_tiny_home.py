"""The trained example model against its float original and against other tools' files."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest

import edgeq
from edgeq import blocks, calibration, pipeline
from edgeq.choosing import Target
from edgeq.engine import Model
from edgeq.errors import RequestError
from edgeq.evaluate import Evaluation, evaluate, evaluate_all, windows
from edgeq.gguf import GgufWriter, TensorSpec

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
Convert = Callable[[str], Path]


@pytest.fixture(scope="module")
def data(shared_data: Path) -> Path:
    return shared_data / "tiny-home"


@pytest.fixture(scope="module")
def measured(data: Path) -> dict[str, Any]:
    return json.loads((data / "golden.json").read_text())


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    folder = tmp_path_factory.mktemp("tiny-home")

    def once(recipe: str) -> Path:
        out = folder / f"{recipe}.gguf"
        return out if out.exists() else edgeq.convert(EXAMPLE, out, recipe)

    return once


def questions(data: Path) -> list[str]:
    lines = (data / "questions.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines]


def answer(model: Model, question: str) -> str:
    message = {"role": "user", "content": question}
    return "".join(model.chat([message], temperature=0, max_tokens=60)).strip()


@pytest.mark.parametrize("recipe", ["F16", "Q8_0"])
def test_answers_equal_the_float_model(
    recipe: str, data: Path, measured: dict[str, Any], convert: Convert
) -> None:
    with edgeq.load(convert(recipe)) as model:
        answers = [answer(model, question) for question in questions(data)]
    same = sum(a == b for a, b in zip(answers, measured["expected_answers"], strict=True))
    assert same >= 0.98 * len(answers)


LLAMA_CPPS = ["Q2_K", "Q4_K_M", "Q5_K_M"]


@pytest.fixture(scope="module")
def for_size(
    data: Path, measured: dict[str, Any], convert: Convert, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file by GPTQ with a recipe of its own, not larger than llama-quantize's Q2_K; some of
    the text to calibrate on is enough.
    """
    folder = tmp_path_factory.mktemp("gptq")
    settings = calibration.Settings(ctx=measured["perplexity_ctx"], chunks=80)
    hessians, out = folder / "hessian.gguf", folder / "made.gguf"
    text = data / "calibration.txt"
    calibration.run(convert("F16"), text, folder / "im.gguf", settings, hessian_out=hessians)
    target = Target(size=(data / "files_from_llama_cpp" / "Q2_K.gguf").stat().st_size)
    pipeline.run(EXAMPLE, out, method="gptq", hessians=hessians, target=target)
    assert out.stat().st_size <= (target.size or 0)
    return out


@pytest.fixture(scope="module")
def evaluated(data: Path, measured: dict[str, Any], convert: Convert) -> dict[str, Evaluation]:
    """Our files, and those of llama-quantize, through the text together, with F16 as reference."""
    ours = {recipe: convert(recipe) for recipe in ("F16", "Q8_0", "Q4_K_M")}
    files = {f"their {n}": data / "files_from_llama_cpp" / f"{n}.gguf" for n in LLAMA_CPPS}
    with contextlib.ExitStack() as stack:
        paths = (ours | files).items()
        models = {name: stack.enter_context(edgeq.load(path)) for name, path in paths}
        text, ctx = (data / "eval.txt").read_text(), measured["perplexity_ctx"]
        found = evaluate_all(list(models.values()), text, ctx, reference=models["F16"])
    return dict(zip(models, found))


@pytest.mark.parametrize(("recipe", "low"), [("F16", -0.002), ("Q8_0", -0.002), ("Q4_K_M", -1)])
def test_perplexity_equals_llama_perplexity(
    recipe: str, low: float, measured: dict[str, Any], evaluated: dict[str, Evaluation]
) -> None:
    theirs = measured["recipes"][recipe]["plain"]["ppl"]
    assert low < evaluated[recipe].perplexity.value / theirs - 1 <= 0.002


@pytest.mark.parametrize("name", LLAMA_CPPS)
def test_figures_of_llama_quantizes_files_are_llama_perplexitys(
    name: str, measured: dict[str, Any], evaluated: dict[str, Evaluation]
) -> None:
    """Within arithmetic: llama.cpp rounds activations in blocks of 256, we of 32, so that our
    divergence is smaller, at most by what that rounding costs there (kld_same_file).
    """
    theirs, found = measured["recipes"][name]["plain"], evaluated[f"their {name}"].divergence
    assert found is not None
    assert found.ppl.value == pytest.approx(theirs["ppl"], rel=2e-3)
    assert found.ratio.value == pytest.approx(theirs["ppl_ratio"], rel=2e-3)
    assert found.same_top.value == pytest.approx(theirs["same_top_pct"], abs=0.5)
    rounding = max(cost["kld_mean"] for cost in measured["kld_same_file"].values())
    median = dict(found.kld_percentiles)[50]
    assert -rounding <= found.kld.value - theirs["kld_mean"] <= 0.1 * rounding
    assert -rounding <= median - theirs["kld_median"] <= 0.1 * rounding


def test_files_are_nearer_than_llama_quantizes(
    data: Path, measured: dict[str, Any], convert: Convert, for_size: Path
) -> None:
    """By recipe, and far nearer with GPTQ and a recipe for the size; some windows are enough."""
    theirs = [data / "files_from_llama_cpp" / f"{name}.gguf" for name in LLAMA_CPPS]
    files = [*theirs, *map(convert, LLAMA_CPPS), for_size]
    with contextlib.ExitStack() as stack:
        base, *models = (stack.enter_context(edgeq.load(f)) for f in (convert("F16"), *files))
        text, ctx = (data / "eval.txt").read_text(), measured["perplexity_ctx"]
        found = evaluate_all(models, text, ctx, reference=base, chunks=30)
    kld = [one.divergence.kld.value for one in found if one.divergence]
    ratios = [ours / other for ours, other in zip(kld[3:], [*kld[:3], kld[0]], strict=True)]
    q2_k, q4_k_m, q5_k_m, gptq = ratios
    assert q2_k < 0.9
    assert q4_k_m < 1
    assert q5_k_m < 0.95
    assert gptq < 0.55


@pytest.mark.parametrize("name", LLAMA_CPPS)
def test_a_file_of_llama_quantize_runs(name: str, data: Path) -> None:
    with edgeq.load(data / "files_from_llama_cpp" / f"{name}.gguf") as model:
        assert answer(model, "What is the capital of Japan?") == "Tokyo"


def test_reference_logits(data: Path, convert: Convert) -> None:
    ids, expected = golden.read(data / "golden_logits.safetensors")
    with edgeq.load(convert("F16")) as model:
        assert golden.distance(model.logits(ids), expected) < 2e-3


def dequantized(path: Path, out: Path) -> Path:
    """The same weights as F32."""
    with edgeq.open_gguf(path) as gguf:
        f32 = blocks.get("F32")
        specs = [TensorSpec(t.name, t.shape, f32) for t in gguf.tensors.values()]
        with GgufWriter(out, gguf.typed_metadata(), specs) as writer:
            for t in gguf.tensors.values():
                writer.write(t.name, edgeq.dequantize(gguf.tensor(t.name), t.format))
    return out


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K_M"])
def test_rounding_of_activations_costs_no_more_than_in_llama_cpp(
    name: str, data: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    """The same file, against its weights in float arithmetic; a third of the text is enough."""
    path, text = data / "files_from_llama_cpp" / f"{name}.gguf", (data / "eval.txt").read_text()
    text = text[: len(text) // 3]
    reference = dequantized(path, tmp_path / "f32.gguf")
    with edgeq.load(path) as model, edgeq.load(reference, kv="f32") as exact:
        found = evaluate(model, text, measured["perplexity_ctx"], reference=exact).divergence
    assert found is not None
    assert 0 < found.kld.value <= measured["kld_same_file"][name]["kld_mean"]


def test_the_size_is_llama_quantizes(measured: dict[str, Any], convert: Convert) -> None:
    theirs = measured["recipes"]["Q4_K_M"]["plain"]["bytes"]
    assert abs(convert("Q4_K_M").stat().st_size - theirs) < 1024  # metadata may differ a little


def test_windows_are_llama_perplexitys() -> None:
    parts = list(windows(range(100, 110), 4, bos=1))
    assert parts == [([1, 101, 102, 103], 3), ([1, 105, 106, 107], 3)]
    assert next(windows(range(512), 512, None))[1] == 257  # 255 targets are scored


def test_a_short_text_is_refused(convert: Convert) -> None:
    with edgeq.load(convert("Q8_0")) as model:
        with pytest.raises(RequestError, match="expected at least 512, two windows"):
            edgeq.perplexity(model, "too short", ctx=256)
        for ctx in (512, 3, 0):
            with pytest.raises(RequestError, match=f"ctx = {ctx}"):
                edgeq.perplexity(model, "x" * 10000, ctx=ctx)
