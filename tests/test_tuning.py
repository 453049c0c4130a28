"""Parameters of decoding: how they are chosen, kept and used."""

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

import edgeq
from edgeq import blocks, products, tuning
from edgeq.kernels import cache, layout
from edgeq.kernels import isa as isas
from edgeq.tuning import AHEAD, CHUNK, Tuning

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
DEFAULT = Tuning()


class Timed:
    """A layer whose speed depends on the parameters; each time is off by the next of `noise`."""

    def __init__(self, faster: dict[Tuning, float], noise: list[float] | None = None) -> None:
        self.faster, self.noise, self.asked = faster, noise or [1.0], 0

    def seconds(self, option: Tuning) -> float:
        self.asked += 1
        return self.noise[self.asked % len(self.noise)] / self.faster.get(option, 1.0)


@pytest.mark.parametrize(
    ("gain", "noise", "wins"),
    [
        (1.10, [1.0], True),
        (1.01, [1.0], False),  # too little
        (1.04, [1.0] * 19 + [3.0], True),  # something else ran now and then
        (1.04, [1.0, 1.3, 0.8, 1.2, 0.9, 1.4, 0.7], False),  # too noisy to tell
    ],
)
def test_the_default_stays_unless_another_is_clearly_faster(
    gain: float, noise: list[float], wins: bool
) -> None:
    other = Tuning(1024, 0)
    layer: Any = Timed({other: gain}, noise)
    expected = other if wins else DEFAULT
    assert tuning._fastest(layer, [DEFAULT, other, Tuning(0, 0)]) == expected


def test_one_parameter_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = {
        Tuning(a, c, w): 1 + (a == 4096) / 2 + (c == 64) / 2 + (w == 2048) / 2
        for a in AHEAD
        for c in CHUNK
        for w in AHEAD
    }
    monkeypatch.setattr(tuning, "_Layer", lambda *_, **__: Timed(faster))
    assert tuning.measure(isas.choose(), 1, 2) == Tuning(4096, 64, 2048)


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any result may come of it, from the lists; it says what it does."""
    monkeypatch.setattr(tuning, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    said: list[str] = []
    found = tuning.measure(isas.choose(), 2, 2, lambda what, *_: said.append(what))
    assert found.ahead in AHEAD
    assert found.chunk in CHUNK
    assert found.ahead_wide in AHEAD
    assert said[-1] == "measuring this machine"


def test_a_layer_passes_the_parameters_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "Program", MagicMock())
    for name, ahead in (("Q3_K", 123), ("Q8_0", 67), ("F16", 67)):
        layer = tuning._Layer(blocks.get(name), isas.choose(), MagicMock(), {}, threads=1, nbytes=1)
        assert layer.seconds(Tuning(123, 48, 67)) >= 0
        words = dict(zip(layout.MATMUL, layer._args[0].tolist()))
        assert (words["ahead"], words["chunk"]) == (ahead, 48)


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    found = [Tuning(2048, 16), Tuning(0, 64)]
    monkeypatch.setattr(cache, "recall", lambda name, isa: kept.get(name))
    monkeypatch.setattr(cache, "remember", lambda name, isa, values: kept.update({name: values}))
    monkeypatch.setattr(tuning, "measure", lambda *_: found.pop(0))
    isa = isas.choose()
    assert [tuning.tuned(isa, 2, 2).ahead for _ in range(3)] == [2048] * 3
    assert tuning.tuned(isa, 2, 2, again=True) == Tuning(0, 64)


@pytest.mark.parametrize("value", ["much", -5, float("inf"), 2**63 - 1, True, None, 0.5])
def test_a_damaged_entry_is_measured_again(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    kept: list[dict[str, Any]] = [
        {"ahead": 0, "chunk": value, "ahead_wide": 0},
        {"ahead": 0, "chunk": 16},
        {"ahead": 0, "chunk": 16, "ahead_wide": 0, "more": 1},
    ]
    monkeypatch.setattr(cache, "recall", lambda name, isa: kept.pop())
    monkeypatch.setattr(cache, "remember", lambda *_: None)
    monkeypatch.setattr(tuning, "measure", lambda *_: Tuning(0, 256))
    while kept:
        assert tuning.tuned(isas.choose(), 2, 2) == Tuning(0, 256)


def test_no_memory_to_measure_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tuning:
        raise MemoryError

    monkeypatch.setattr(tuning, "measure", fail)
    monkeypatch.setattr(cache, "recall", lambda name, isa: None)
    assert tuning.tuned(isas.choose(), 2, 2) == DEFAULT


def test_every_choice_gives_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a loaded model uses what was found."""
    path = edgeq.convert(EXAMPLE, tmp_path / "tiny.gguf", "Q4_K_M")
    passes, results = importlib.import_module("edgeq.passes"), []
    for choice in (DEFAULT, Tuning(0, 16), Tuning(8192, 7)):
        monkeypatch.setattr(passes, "tuned", lambda *_, choice=choice: choice)
        with edgeq.load(path, threads=2) as model:
            assert model._passes.net.tuning == choice
            ops = model._passes.net.body(many=False)
            at = [layout.MATMUL.index(name) for name in ("ahead", "chunk", "rows")]
            for op in (op for op in ops if op.kernel.startswith("matvec")):
                ahead, chunk, rows = op.args[at].tolist()
                assert (ahead, chunk) == (choice.ahead, choice.turn(rows, 2))
            for op in (op for op in ops if op.kernel.startswith("gated")):
                for ahead, chunk, rows in (part.args[at].tolist() for part in op.within[:2]):
                    assert (ahead, chunk) == (choice.ahead, choice.turn(rows, 2, 32, 2))
                    assert chunk % 32 == 0
            results.append(model.logits(range(5, 10)))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
