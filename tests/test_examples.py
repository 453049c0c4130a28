"""The programs in examples/ run, and the demo's answers are right."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_compare_formats_ranks_them_by_size(model: Path) -> None:
    for args in ([], [model, "blk.0.ffn_down.weight"]):
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
