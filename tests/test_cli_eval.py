"""`edgeq eval`: its tables, its JSON, and what it refuses."""

import json
from pathlib import Path

import pytest
from shell import CHECKPOINT, edgeq

from edgeq import convert

TEXT = "The lamp in the hall is on. Turn off the fan and close the window at noon. " * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two models, a text and questions."""
    folder = tmp_path_factory.mktemp("eval")
    for recipe in ("F16", "Q2_K"):
        convert(CHECKPOINT, folder / f"{recipe}.gguf", recipe, method="rtn")
    (folder / "text.txt").write_text(TEXT)
    choice = {"question": "The sky is", "choices": ["blue", "loud"], "answer": 0, "task": "[b]x"}
    plain = {"question": "What is the capital of Japan?", "answer": "Tokyo"}
    (folder / "q.jsonl").write_text(f"{json.dumps(choice)}\n{json.dumps(plain)}\n")
    return folder


def test_perplexity_alone(files: Path) -> None:
    args = ["eval", files / "Q2_K.gguf", "-f", files / "text.txt", "-c", 64, "--chunks", 2]
    shown = edgeq(*args)
    assert shown.exit_code == 0, shown.stderr
    assert "2 windows of 64" in shown.stdout
    found = json.loads(edgeq(*args, "--json").stdout)
    assert found["divergence"] is None
    assert found["tokens"] == 62
    assert f"{found['perplexity']['value']:.4f}" in shown.stdout


def test_reference_and_questions(files: Path) -> None:
    args = ["eval", files / "Q2_K.gguf", "-f", files / "text.txt", "-c", 64]
    args += ["--reference", files / "F16.gguf", "--questions", files / "q.jsonl"]
    shown = edgeq(*args).stdout
    for line in ("perplexity of the reference", "KL divergence, mean", "99.9 %", "same top token"):
        assert line in shown
    assert "[b]x" in shown
    found = json.loads(edgeq(*args, "--json").stdout)
    assert 0.01 < found["divergence"]["kld"]["value"] < 1
    assert found["divergence"]["kld_percentiles"][0][0] == 100
    assert [a["right"] for a in found["questions"]["answers"]][1] is True
    assert len(found["questions"]["answers"][0]["scores"]) == 2
    assert found["questions"]["tasks"]["questions"]["accuracy"] == 1


def test_what_is_refused(files: Path) -> None:
    model = files / "Q2_K.gguf"
    cases = [
        ([model], "nothing to do"),
        ([model, "--reference", model, "--questions", files / "q.jsonl"], "needs a text"),
        ([model, "-f", files / "text.txt", "-c", 512], "-c 512: the context holds 256 tokens"),
        ([model, "-f", files / "text.txt", "-c", 5000], "ctx = 5000: expected a whole number"),
        ([model, "-f", files / "q.jsonl"], "two windows of 256"),
        ([model, "-f", model], "expected a UTF-8 text"),
        ([model, "--questions", files / "text.txt"], "text.txt:1: not JSON"),
        (["no.gguf", "-f", files / "text.txt"], "no.gguf: no such file"),
    ]
    for args, told in cases:
        result = edgeq("eval", *args)
        assert result.exit_code == 2, args
        assert told in result.stderr
        assert "Traceback" not in result.stderr
