"""Statistics of an evaluation against plain formulas, and against llama.cpp's own figures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq import divergence, engine
from edgeq.engine import Model
from edgeq.errors import ModelError, RequestError
from edgeq.evaluate import evaluate, evaluate_all

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
TEXT = "The lamp in the hall is on. Turn off the fan and close the window at noon. " * 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    return {r: edgeq.convert(EXAMPLE, folder / f"{r}.gguf", r) for r in ("F16", "Q2_K")}


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> Iterator[tuple[Model, Model]]:
    """Coarse and exact."""
    with edgeq.load(files["Q2_K"]) as coarse, edgeq.load(files["F16"]) as exact:
        yield coarse, exact


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def plain_statistics(models: tuple[Model, Model], ids: list[int], ctx: int) -> dict[str, Any]:
    """Whole windows of logits, formulas as in the sources of llama-perplexity."""
    nll, base, kld, same = [], [], [], []
    for start in range(0, len(ids) - ctx + 1, ctx):
        window = [models[0].tokenizer.bos_id, *ids[start + 1 : start + ctx]]
        half = ctx // 2
        q, p = (log_softmax(model.logits(window)[half:-1]) for model in models)
        at = np.arange(len(q)), window[half + 1 :]
        nll += list(-q[at])
        base += list(-p[at])
        kld += list((np.exp(p) * (p - q)).sum(axis=1))
        same += list(p.argmax(axis=1) == q.argmax(axis=1))
    n, a, b = len(nll), np.array(nll), np.array(base)
    dp = 100 * (np.exp(-a) - np.exp(-b))
    cov = ((a * b).mean() - a.mean() * b.mean()) / (n - 1)
    sa, sb = (math.sqrt(((x * x).mean() - x.mean() ** 2) / (n - 1)) for x in (a, b))
    ppl, ppl_base = math.exp(a.mean()), math.exp(b.mean())
    return {
        "ppl": (ppl, ppl * sa),
        "ppl_base": (ppl_base, ppl_base * sb),
        "correlation": 100 * cov / (sa * sb),
        "ln_ratio": (a.mean() - b.mean(), math.sqrt(sa**2 + sb**2 - 2 * cov)),
        "difference": (
            ppl - ppl_base,
            math.sqrt((ppl * sa) ** 2 + (ppl_base * sb) ** 2 - 2 * ppl * ppl_base * cov),
        ),
        "kld": (np.mean(kld), np.std(kld) / math.sqrt(n - 1)),
        "kld_percentiles": np.percentile(kld, divergence.KLD_PERCENTS),
        "dp": (dp.mean(), dp.std() / math.sqrt(n - 1)),
        "dp_percentiles": np.percentile(dp, divergence.DP_PERCENTS),
        "dp_rms": math.sqrt((dp**2).mean()),
        "same_top": 100 * np.mean(same),
        "count": n,
    }


def test_streamed_statistics_are_those_of_whole_windows(models: tuple[Model, Model]) -> None:
    ids = models[0].tokenizer.encode(TEXT, bos=True)
    expected = plain_statistics(models, ids, 200)
    found = evaluate(models[0], TEXT, 200, reference=models[1])
    assert (found.tokens, found.windows) == (expected["count"], len(ids) // 200)
    d = found.divergence
    assert d is not None
    for name in ("ppl", "ppl_base", "ln_ratio", "difference", "kld", "dp"):
        estimate = getattr(d, name)
        assert (estimate.value, estimate.error) == pytest.approx(expected[name], rel=2e-3), name
    for name in ("kld_percentiles", "dp_percentiles"):
        values = [value for _, value in getattr(d, name)]
        assert values == pytest.approx(expected[name], rel=5e-3, abs=2e-4), name
    assert d.ratio.value == pytest.approx(d.ppl.value / d.ppl_base.value)
    assert d.correlation == pytest.approx(expected["correlation"], rel=1e-4)
    assert d.dp_rms.value == pytest.approx(expected["dp_rms"], rel=2e-3)
    assert d.same_top.value == pytest.approx(expected["same_top"], abs=0.5)
    assert d.kld.value > 0.01


def test_a_model_against_itself(models: tuple[Model, Model]) -> None:
    exact = models[1]
    found = evaluate(exact, TEXT, 64, reference=exact, chunks=3)
    d = found.divergence
    assert d is not None
    assert (d.kld.value, d.same_top.value, d.ratio.value, d.ln_ratio.error) == (0, 100, 1, 0)
    assert (d.dp_rms.value, d.dp_rms.error, d.difference.error) == (
        0,
        0,
        pytest.approx(0, abs=1e-6),
    )
    assert d.correlation == pytest.approx(100)
    assert found.perplexity == d.ppl == d.ppl_base


def test_several_models_at_once_get_what_each_gets_alone(models: tuple[Model, Model]) -> None:
    coarse, exact = models
    together = evaluate_all([coarse, exact], TEXT, 64, reference=exact, chunks=3)
    for model, found in zip(models, together):
        alone = evaluate(model, TEXT, 64, reference=exact, chunks=3)
        assert (found.perplexity, found.divergence) == (alone.perplexity, alone.divergence)
    plain = evaluate(coarse, TEXT, 64, chunks=3)
    assert plain.perplexity.value == pytest.approx(together[0].perplexity.value, rel=1e-9)
    assert plain.divergence is None


def test_parts_are_the_logits(models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """From any position on, in pieces of any size, in batches shorter than the prompt."""
    model = models[1]
    ids = model.tokenize(TEXT)[:150]
    whole = model.logits(ids)
    assert whole.shape == (150, 4096)
    monkeypatch.setattr(model._passes, "batch", 70)
    for first, outputs in ((0, 64), (40, 33), (69, 1), (100, 7), (149, 64)):
        monkeypatch.setattr(model._passes, "outputs", outputs)
        model.reset()
        parts = [part.copy() for part in model.parts(ids, first)]
        assert max(map(len, parts)) <= outputs
        found = np.concatenate(parts)
        assert np.abs(found - whole[first:]).max() < 0.02 * np.abs(whole).max()
        assert model.seen == ids


def test_progress_tells_the_perplexity_so_far(models: tuple[Model, Model]) -> None:
    said: list[tuple[int, int, float]] = []
    found = evaluate(models[1], TEXT, 64, chunks=2, progress=lambda *now: said.append(now))
    assert [now[:2] for now in said] == [(1, 2), (2, 2)]
    assert said[-1][2] == pytest.approx(found.perplexity.value)
    assert found.windows == 2
    assert found.tokens == 2 * 31


def test_the_usual_window_is_cut_to_the_context(models: tuple[Model, Model]) -> None:
    assert evaluate(models[1], TEXT, chunks=1).ctx == 256


def test_models_of_other_vocabularies_are_refused(
    models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse, exact = models
    encode = type(exact.tokenizer).encode

    def another(self: Any, *args: Any, **more: Any) -> list[int]:
        ids = encode(self, *args, **more)
        return ids[::-1] if self is exact.tokenizer else ids

    monkeypatch.setattr(type(exact.tokenizer), "encode", another)
    with pytest.raises(RequestError, match=r"F16\.gguf: not the vocabulary of .*Q2_K\.gguf"):
        evaluate(coarse, TEXT, 64, reference=exact)


def test_logits_that_are_no_numbers(
    models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Model, ids: list[int], first: int = 0) -> Iterator[np.ndarray]:
        yield np.full((len(ids) - first, 4096), np.nan, np.float32)

    monkeypatch.setattr(engine.Model, "parts", broken)
    for reference in (None, models[1]):
        with pytest.raises(ModelError, match=r"Q2_K\.gguf: logits that are no numbers"):
            evaluate(models[0], TEXT, 64, reference=reference)
