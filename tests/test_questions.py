"""Questions: the file's format, exact answers, choices, counting."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.engine import Model
from edgeq.errors import FormatError, RequestError, ResourceError
from edgeq.estimate import wilson
from edgeq.questions import Answer, Question, ask, by_task, read, summary

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
JAPAN = "What is the capital of Japan?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = edgeq.convert(EXAMPLE, tmp_path_factory.mktemp("questions") / "q8.gguf", "Q8_0")
    with edgeq.load(path) as loaded:
        yield loaded


def write(path: Path, *records: Any) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_kinds_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "1 + 1 = ?", "answer": " 2 ", "task": "sums"},
        "",
        {"question": "1 + 1 = ?", "answer": ["2", "two"]},
        {"question": "The sky is", "choices": ["loud", "blue"], "answer": 1},
    )
    assert read(path) == [
        Question("1 + 1 = ?", ("2",), (), "sums", f"{path}:1"),
        Question("1 + 1 = ?", ("2", "two"), (), "questions", f"{path}:3"),
        Question("The sky is", ("blue",), ("loud", "blue"), "questions", f"{path}:4"),
    ]


def test_pairs_of_escapes_are_whole_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", r'{"question": "\ud83d\ude00", "answer": "b"}')
    assert [question.question for question in read(path)] == ["\U0001f600"]


def test_files_of_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\r\n')
    assert [(q.question, q.answers) for q in read(tmp_path / "q.jsonl")] == [("a", ("b",))]


GOOD = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ('{"question": "a", "answer": ' + "1" * 5000 + "}", "thousands of digits"),
        ({"question": "a\ud800", "answer": "b"}, r"\\ud800 is half of a pair"),
        ({"question": "a", "answer": ["b", "\udc00"]}, r"\\udc00 is half of a pair"),
        ({**GOOD, "task": "\udfff"}, r"\\udfff is half of a pair"),
        ("[1]", r"line = \[1\]: expected an object"),
        ({"answer": "b"}, "question missing: expected a text"),
        ({"question": " ", "answer": "b"}, "question = .*: expected a text that is not empty"),
        ({"question": "a"}, "answer missing: expected a text"),
        ({"question": "a", "answer": 1}, "answer = 1: expected a text"),
        ({"question": "a", "answer": []}, "expected a text, or a list of texts"),
        ({"question": "a", "answer": ["b", ""]}, "none of them empty"),
        ({**GOOD, "task": 3}, "task = 3: expected a text"),
        ({**GOOD, "choises": ["b"]}, "unknown key choises: expected one of question, answer"),
        ({"question": "a", "answer": 0, "choices": ["b"]}, "at least two texts"),
        ({"question": "a", "answer": 0, "choices": ["b", 2]}, "at least two texts"),
        ({"question": "a", "answer": 2, "choices": ["b", "c"]}, "index of a choice, 0 to 1"),
        ({"question": "a", "answer": True, "choices": ["b", "c"]}, "index of a choice"),
        ({"question": "a", "answer": "b", "choices": ["b", "c"]}, "index of a choice"),
    ],
)
def test_a_bad_line_is_named(bad: Any, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, bad)
    with pytest.raises(FormatError, match=rf"q\.jsonl:2: .*{told}") as raised:
        read(path)
    assert len(str(raised.value)) < 300


def test_files_that_are_no_questions(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no questions"):
        read(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(FormatError, match=r"line 1, byte 14: invalid .*: expected a UTF-8 text"):
        read(tmp_path / "latin.jsonl")
    with pytest.raises(ResourceError, match="No such file"):
        read(tmp_path / "none.jsonl")


def test_exact_answers_through_the_chat_template(model: Model) -> None:
    told: list[tuple[int, int, int]] = []
    asked = [Question(JAPAN, ("Kyoto",)), Question(JAPAN, ("tokyo", "Tokyo"))]
    answers = ask(model, asked, progress=lambda *now: told.append(now))
    assert answers == [Answer("Tokyo", False, False), Answer("Tokyo", True, True)]
    assert told == [(1, 2, 0), (2, 2, 1)]


def test_plain_text_is_continued_to_the_end_of_its_line(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def generate(self: Model, prompt: Any, **options: Any) -> Iterator[str]:
        seen.append((prompt, options))
        yield " blue\n and"

    monkeypatch.setattr(Model, "generate", generate)
    assert ask(model, [Question("The sky is", ("blue",))], raw=True)[0].right
    ids = [model.tokenizer.bos_id, *model.tokenize("The sky is")]
    assert seen == [(ids, {"temperature": 0, "max_tokens": 32})]


@pytest.mark.parametrize("raw", [False, True])
def test_choices_are_scored_by_their_log_probability(model: Model, raw: bool) -> None:
    choices = ("Tokyo", "Mexico City", "Port Louis", "Rome")
    found = ask(model, [Question(JAPAN, ("Tokyo",), choices)], raw=raw)[0]
    lengths = []
    for choice, score in zip(choices, found.scores, strict=True):
        if raw:
            start = 1 + len(model.tokenize(JAPAN))
            ids = [1, *model.tokenize(f"{JAPAN} {choice}")]
        else:
            prompt = [1, *model.tokenize(f"<|user|>{JAPAN}<|end|><|assistant|>", special=True)]
            start, ids = len(prompt), prompt + model.tokenize(choice)
        logits = model.logits(ids).astype(np.float64)
        ln = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        exact = sum(ln[i - 1, ids[i]] for i in range(start, len(ids)))
        assert score == pytest.approx(exact, rel=0.03, abs=0.01)
        lengths.append(len(ids) - start)
    best = max(range(4), key=lambda i: found.scores[i] / lengths[i])
    assert found.text == choices[best]
    assert found.right == (best == 0)
    assert found.right_raw == (max(found.scores) == found.scores[0])


def test_a_question_too_long_is_named(model: Model) -> None:
    for extra in ({}, {"choices": ("b", "c")}):
        long = Question("word " * 300, ("b",), where="q.jsonl:7", **extra)
        with pytest.raises(RequestError, match=r"^q\.jsonl:7: .*context of 256"):
            ask(model, [long])


def test_counts_per_task() -> None:
    asked = [Question("a", ("b",), task=t) for t in ("x", "y", "x", "x")]
    answers = [Answer("", *right) for right in ((1, 1), (1, 0), (0, 1), (0, 0))]
    counts = by_task(asked, answers)
    assert [(t, c.count, c.right, c.right_raw) for t, c in counts.items()] == [
        ("x", 3, 1, 2),
        ("y", 1, 1, 0),
    ]
    table = summary(asked, answers)
    assert table["total"]["accuracy"] == 0.5
    assert (table["total"]["low"], table["total"]["high"]) == wilson(2, 4)
    assert len(table["answers"]) == 4


def test_wilson_intervals_hold_their_probability() -> None:
    """95 % of the intervals around samples contain the truth (99 % of them for sure)."""
    rng = np.random.default_rng(3)
    for truth in (0.1, 0.5, 0.97):
        hits = rng.binomial(40, truth, 4000)
        inside = np.mean([low <= truth <= high for low, high in (wilson(int(h), 40) for h in hits)])
        assert 0.92 < inside < 0.98
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)
