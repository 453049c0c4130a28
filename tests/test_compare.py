"""The decision table, from the example's checkpoint to the page."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import CHECKPOINT, edgeq

from edgeq import compare as comparing
from edgeq import pipeline
from edgeq.compare import DEFAULTS, Candidate, Lengths, Plan, compare, conversions, parse
from edgeq.compare.speed import measure
from edgeq.errors import RequestError, ResourceError
from edgeq.questions import Question

TEXT = "The lamp in the hall is on. Turn off the fan and close the window at noon. " * 20
QUESTIONS = (
    Question("What is the capital of Japan?", ("Tokyo",), task="capital"),
    Question("What is the capital of Japan?", ("Tokyo",), ("Rome", "Tokyo"), task="choice"),
)
SLOW = Lengths(prompt=16, gen=4, repetitions=1, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "work"


def plan(**more: Any) -> Plan:
    given = {"candidates": [parse("Q8_0"), parse("q2_k:rtn")], "ctx": 64, "lengths": None}
    return Plan(TEXT, **{**given, **more})


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    return compare(CHECKPOINT, plan(questions=QUESTIONS, lengths=SLOW), folder)


def test_rows_hold_what_was_measured(document: dict[str, Any], folder: Path) -> None:
    rows = document["rows"]
    assert [row["name"] for row in rows] == ["F16", "Q8_0", "Q2_K rtn"]
    assert document["reference"] == "F16"
    for row in rows:
        assert row["size"] == Path(row["file"]).stat().st_size
        assert sum(t["nbytes"] for t in row["tensors"]) < row["size"]
        assert row["speed"]["prefill"]["value"] > 0
        assert row["speed"]["decode"]["value"] > 0
        assert (row["speed"]["prompt"], row["speed"]["gen"]) == (16, 4)
        assert row["speed"]["peak_ram"] > row["size"]
        assert row["questions"]["tasks"]["capital"]["right"] == 1
    klds = [row["evaluation"]["divergence"]["kld"]["value"] for row in rows]
    assert klds[0] == 0 < klds[1] < 0.01 < klds[2]
    errors = [row["relative_rmse"] for row in rows]
    assert errors == sorted(errors)
    assert rows[2]["bits_per_weight"] == pytest.approx(3.47, abs=0.01)
    assert {t["format"] for t in rows[2]["tensors"]} >= {"Q2_K", "Q6_K", "F32"}
    assert all(t["relative_rmse"] < 0.5 for t in rows[2]["tensors"])
    assert json.loads(json.dumps(document)) == document


def test_files_are_used_again_as_long_as_they_fit(
    document: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    run = pipeline.run

    def count(source: Any, out: Path, *args: Any, **more: Any) -> Any:
        made.append(out.name)
        return run(source, out, *args, **more)

    monkeypatch.setattr(pipeline, "run", count)
    again = compare(CHECKPOINT, plan(), folder)
    assert made == []
    for old, new in zip(document["rows"], again["rows"], strict=True):
        for key in ("tensors", "relative_rmse", "size"):
            assert new[key] == old[key]
    (folder / "Q2_K-rtn.gguf").unlink()
    compare(CHECKPOINT, plan(), folder)
    assert made == ["Q2_K-rtn.gguf"]
    compare(CHECKPOINT, plan(options={"allow_requantize": True}), folder)  # another way to make it
    assert len(made) == 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Q2_K-rtn.gguf", b"precious"),  # no notes
        ("Q2_K-rtn.json", b"precious"),  # no notes, though their name
        ("Q2_K-rtn.json", b'{"key": 3, "file": [1, 2]}'),
    ],
)
def test_what_is_not_ours_is_never_replaced(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ResourceError, match=f"{name}: was not made by an earlier comparison"):
        compare(CHECKPOINT, plan(), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]  # before any work


def test_a_file_that_changed_is_not_ours_any_more(tmp_path: Path) -> None:
    path = conversions.convert(CHECKPOINT, parse("F16"), tmp_path, {}).path
    path.write_bytes(b"precious")
    with pytest.raises(ResourceError, match=r"F16\.gguf: was not made by"):
        conversions.convert(CHECKPOINT, parse("F16"), tmp_path, {})
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("role", ["candidate", "reference"])
def test_a_file_to_compare_is_never_replaced(role: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    conversions.convert(CHECKPOINT, parse("F16"), folder, {})
    link = tmp_path / "link.gguf"
    link.symlink_to(folder / "F16.gguf")
    before = (folder / "F16.gguf").read_bytes()
    given = [parse(str(link)), parse("F16")]
    more = {"candidates": given} if role == "candidate" else {"reference": given[0]}
    asked = plan(**{"candidates": given[1:], **more})
    with pytest.raises(RequestError, match=r"F16\.gguf: is the file to compare itself"):
        compare(CHECKPOINT, asked, folder)
    assert (folder / "F16.gguf").read_bytes() == before


def test_a_change_of_any_option_makes_the_file_again(tmp_path: Path) -> None:
    """Arrays differ by their content, files by their time."""
    file = tmp_path / "x"
    file.write_bytes(b"1")
    importance = {"w": np.arange(2000, dtype=np.float32)}
    other = {"w": importance["w"] + (np.arange(2000) == 999)}
    options = [{}, {"a": 1}, {"importance": importance}, {"importance": other}, {"hessian": file}]
    keys = [conversions._key(CHECKPOINT, parse("Q8_0"), given) for given in options]
    assert len(set(keys)) == len(keys)
    same = {"importance": {"w": importance["w"].copy()}}
    assert conversions._key(CHECKPOINT, parse("Q8_0"), same) == keys[2]
    os.utime(file, (1, 1))
    assert conversions._key(CHECKPOINT, parse("Q8_0"), options[-1]) != keys[-1]


def test_a_finished_file_can_be_compared_and_be_the_reference(
    document: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    their = tmp_path / "their.gguf"
    their.write_bytes((folder / "Q8_0.gguf").read_bytes())
    found = compare(
        CHECKPOINT, plan(candidates=[parse("Q8_0")], reference=parse(str(their))), folder
    )
    by_name = {row["name"]: row for row in found["rows"]}
    assert found["reference"] == "their.gguf"
    assert by_name["their.gguf"]["relative_rmse"] is None
    assert by_name["Q8_0"]["evaluation"]["divergence"]["kld"]["value"] == 0


def test_models_go_through_the_text_in_groups_that_fit(
    document: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    together = comparing.evaluate_all

    def count(models: Any, *args: Any, **more: Any) -> Any:
        sizes.append(len(models))
        return together(models, *args, **more)

    monkeypatch.setattr(comparing, "evaluate_all", count)
    monkeypatch.setattr(comparing.memory, "available", lambda: 1 << 32)
    whole = compare(CHECKPOINT, plan(), folder)
    monkeypatch.setattr(comparing, "_groups", lambda rows: ([row] for row in rows))
    single = compare(CHECKPOINT, plan(), folder)
    assert sizes == [3, 2, 2]
    for a, b in zip(whole["rows"], single["rows"], strict=True):
        a["evaluation"].pop("seconds")
        b["evaluation"].pop("seconds")
        assert a == b


def test_groups_hold_at_least_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing.memory, "available", lambda: 0)
    rows: list[Any] = [object.__new__(comparing._Row) for _ in range(3)]
    for row in rows:
        row.conversion = comparing.Conversion(CHECKPOINT / "config.json")
    assert list(comparing._groups(rows)) == [[row] for row in rows]
    assert list(comparing._groups([])) == [[]]


def test_candidates() -> None:
    assert parse("Q4_K_M:rtn") == Candidate("Q4_K_M", "rtn")
    assert [candidate.name for candidate in DEFAULTS][::6] == ["F16", "Q2_K"]
    with pytest.raises(RequestError, match=r"-t Q4_0:best: method 'best': expected .*rtn, search"):
        parse("Q4_0:best")
    with pytest.raises(RequestError, match="Q9"):
        parse("Q9")
    same = [Candidate("x", file=Path("a/m.gguf")), Candidate("x", file=Path("b/m.gguf"))]
    with pytest.raises(RequestError, match=r"m\.gguf: twice, as different things"):
        compare(CHECKPOINT, plan(candidates=same), Path())


def test_a_failed_measurement_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(ResourceError, match=r"bad\.gguf: its speed could not be measured: .*GGUF"):
        measure(tmp_path / "bad.gguf", SLOW)


def test_the_command_prints_and_writes(
    document: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "q.jsonl").write_text('{"question": "Hi?", "answer": "<script>"}\n')
    common = ["compare", CHECKPOINT, "-f", tmp_path / "t.txt", "-c", 64, "--dir", folder]
    common += ["--no-speed", "-t", "Q8_0,Q2_K:rtn"]
    outputs = ["--html", tmp_path / "c.html", "--json", tmp_path / "c.json"]
    result = edgeq(*common, "--questions", tmp_path / "q.jsonl", *outputs)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[4:7]] == ["F16", "Q8_0", "Q2_K"]
    assert "peak RAM" not in lines[1]
    assert "0/1" in lines[5]
    written = json.loads((tmp_path / "c.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["F16", "Q8_0", "Q2_K rtn"]
    page = (tmp_path / "c.html").read_text()
    assert "&lt;script&gt;" in page
    alone = edgeq(*common, "--json", "-")
    assert json.loads(alone.stdout)["source"] == str(CHECKPOINT)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "Missing option '-f'"),
        (["-f", "README.md", "-t", "Q9"], "Q9"),
        (["-f", "README.md", "--html", "no/such/folder.html"], "its folder does not exist"),
    ],
)
def test_the_command_refuses_before_work(args: list[str], told: str) -> None:
    result = edgeq("compare", CHECKPOINT, *args)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_narrow_terminal_gets_two_tables(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeq.cli import compare as command

    command._print(document)
    assert capsys.readouterr().out.count("F16 (ref)") == 1
    monkeypatch.setattr(command, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    command._print(document)
    shown = capsys.readouterr().out
    assert shown.count("F16 (ref)") == 2
    assert "…" not in shown


def test_a_method_without_its_statistics_is_refused_before_any_work(tmp_path: Path) -> None:
    wanted = plan(candidates=[parse("Q4_K_M:gptq")])
    with pytest.raises(RequestError, match="method gptq needs Hessians"):
        compare(CHECKPOINT, wanted, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, option: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = edgeq("compare", str(CHECKPOINT), "-f", str(text), option, str(text))
    assert done.exit_code == 2
    assert done.stderr == f"edgeq: {text}: is the text itself: give another name for the output\n"
    assert text.read_text() == TEXT
