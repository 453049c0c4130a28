"""The programs in examples/ run, and the demo's answers are right."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest

import edgeq

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *args: object, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edgeq.convert(EXAMPLES / "tiny-home", tmp_path_factory.mktemp("model"), "Q4_K_M")


def test_demo_answers_its_questions(model: Path) -> None:
    shown = run("demo.py", model)
    answers = [part.splitlines()[1] for part in shown.split("\n> ")[1:]]
    assert answers == ['{"device": "heater", "room": "garage", "state": "off"}', "Tokyo", "Sunday"]
    assert " tok/s, peak RAM " in shown.splitlines()[-1]


def test_generate_is_reproducible(model: Path) -> None:
    texts = [run("generate.py", model, "The file").rpartition("\n\n")[0] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40


def test_chat_reuses_what_it_has_read(model: Path) -> None:
    shown = run("chat.py", model, stdin="What is the capital of Japan?\nAnd of France?\n\n")
    first, second = (line for line in shown.splitlines() if "tokens reused" in line)
    assert first.startswith("[0 tokens reused")
    assert not second.startswith("[0 tokens reused")


@pytest.mark.parametrize(
    ("name", "args", "tokens", "shown"),
    [
        ("generate.py", ["Once"], 5, "5 tokens, 2.0 per second"),
        ("generate.py", ["Once"], 1, "1 tokens, - per second"),
        ("demo.py", [], 5, "15 tokens at 2 tok/s"),
        ("demo.py", [], 1, "3 tokens at - tok/s"),
    ],
)
def test_rates_leave_out_the_first_token(
    name: str, args: list[str], tokens: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes from the prompt's logits."""
    stats = SimpleNamespace(generated_tokens=tokens, generation_seconds=2.0)
    model = MagicMock(stats=stats, threads=2, isa="fake")
    model.__enter__.return_value = model
    with patch("edgeq.load", return_value=model):
        runpy.run_path(str(EXAMPLES / name))["main"]("m.gguf", *args)
    assert shown in capsys.readouterr().out.splitlines()[-1]
    model.__exit__.assert_called_once()


def test_chat_ends_with_its_input(model: Path) -> None:
    assert run("chat.py", model, stdin="").endswith("> \n")


def test_compare_formats_ranks_them_by_size(tmp_path: Path) -> None:
    # The original floats: weights decoded from Q6_K are almost exact in Q6_K again.
    floats = edgeq.convert(EXAMPLES / "tiny-home", tmp_path, "F16")
    for args in ([], [floats, "blk.0.ffn_down.weight"]):
        rows = [line.split() for line in run("compare_formats.py", *args).splitlines()[1:]]
        errors = {name: float(error) for name, _, error in rows}
        assert len(rows) == 8
        assert errors["Q8_0"] < errors["Q6_K"] < errors["Q4_K"] < errors["Q2_K"]


@pytest.mark.parametrize("name", ["demo.py", "generate.py", "chat.py"])
def test_examples_explain_themselves(name: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr.count(f"usage: python {name}")) == (1, 1)


def test_programs_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
