"""The commands that handle files, the terminal, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import CHECKPOINT, ROOT, Screen, edgeq

from edgeq import blocks
from edgeq.cli import _terminal
from edgeq.cli.convert import Size
from edgeq.gguf import GgufWriter, TensorSpec


def test_help_lists_every_command_with_its_first_line() -> None:
    shown = " ".join(edgeq("--help").stdout.split())
    files = sorted((ROOT / "edgeq" / "cli").glob("[!_]*.py"))
    assert len(files) >= 3
    for file in files:
        summary = file.read_text().splitlines()[0].strip('"')
        assert f" {file.stem} {summary}" in shown


@pytest.mark.parametrize(
    "name", ["bench", "calibrate", "compare", "convert", "doctor", "eval", "inspect", "run"]
)
def test_every_command_explains_itself(name: str) -> None:
    result = edgeq(name, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.stdout


@pytest.mark.parametrize(
    ("args", "said", "where"),
    [
        (["nope"], "No such command 'nope'", "edgeq"),
        (["inspect", "--nope", "x"], "No such option", "edgeq inspect"),
        (["run", "-t", "0", "x"], "0 is not in the range 1<=x<=256", "edgeq run"),
        (["bench", "-p", "abc", "x"], "'abc': expected counts", "edgeq bench"),
        (["run"], "Missing argument 'MODEL'", "edgeq run"),
    ],
)
def test_misuse_is_told_on_one_line(args: list[str], said: str, where: str) -> None:
    result = edgeq(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.startswith("edgeq: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(f": see `{where} --help`\n")


def test_without_a_command_it_explains_itself() -> None:
    result = edgeq()
    assert result.exit_code == 2
    assert "Commands:" in result.output


# --- terminal


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert _terminal.dim("x") == "\x1b[2mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert _terminal.dim("x") == "x"


def test_status_rewrites_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    status = _terminal.Status()
    status("one")
    status("two")
    status.clear()
    assert screen.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"


# --- inspect


def write_gguf(path: Path, values: np.ndarray) -> Path:
    metadata = {
        "general.architecture": "none",
        "general.name": "[red]evil\x1b[2J",
        "general.huge": float("inf"),
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(100)],
    }
    specs = [
        TensorSpec("output_norm.weight", (64,), blocks.get("F32")),
        TensorSpec("token_embd.weight", (3, 64), blocks.get("Q8_0")),
    ]
    with GgufWriter(path, metadata, specs) as writer:
        writer.write("output_norm.weight", np.ones(64, np.float32))
        fields = {"d": values, "q": np.ones((3, 2, 32), np.int32)}
        writer.write("token_embd.weight", blocks.pack(fields, "Q8_0"))
    return path


def test_inspect_shows_metadata_as_text(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", np.ones((3, 2), np.float32))
    shown = edgeq("inspect", path, "--tensors").stdout
    assert "256 parameters in 2 tensors, 14.38 bits per weight" in shown
    assert "[red]evil\\x1b[2J" in shown
    assert "100: t0 t1 t2 t3 t4 t5 t6 t7 ..." in shown
    assert "token_embd.weight    3 × 64   Q8_0" in shown


def test_inspect_json_is_complete(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", np.ones((3, 2), np.float32))
    shown = json.loads(edgeq("inspect", path, "--json").stdout)
    assert shown["version"] == 3
    assert shown["size"] == path.stat().st_size
    assert shown["bits_per_weight"] == 14.375
    assert shown["formats"]["Q8_0"] == {"tensors": 1, "parameters": 192, "bytes": 204}
    assert len(shown["metadata"]["tokenizer.ggml.tokens"]) == 100
    assert shown["metadata"]["general.huge"] == "inf"
    assert shown["tensors"][1]["shape"] == [3, 64]
    assert "problems" not in shown


def test_inspect_verify(tmp_path: Path) -> None:
    values = np.ones((3, 2), np.float32)
    good = edgeq("inspect", write_gguf(tmp_path / "good.gguf", values), "--verify")
    assert good.exit_code == 0
    assert "every block of 2 tensors is finite" in good.stdout
    values[2, 1] = np.nan
    bad = write_gguf(tmp_path / "bad.gguf", values)
    result = edgeq("inspect", bad, "--verify")
    assert result.exit_code == 2
    assert "token_embd.weight, row 2, block 1" in result.stderr
    result = edgeq("inspect", bad, "--verify", "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["problems"]) == 1


def test_inspect_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    result = edgeq("inspect", tmp_path / "a.gguf")
    assert result.exit_code == 2
    assert result.stderr.startswith("edgeq: ")
    assert len(result.stderr.splitlines()) == 1


# --- convert


def test_convert_and_its_report(tmp_path: Path) -> None:
    result = edgeq("convert", CHECKPOINT, "-o", tmp_path, "-t", "f16", "--json")
    report = json.loads(result.stdout)
    path = Path(report["file"])
    assert path == tmp_path / "tiny-home-F16.gguf"
    assert report["size"] == path.stat().st_size
    assert report["why"] == ""  # it was asked for
    assert report["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert result.stderr == ""  # no progress bar for a pipe
    again = edgeq("convert", CHECKPOINT, "-o", tmp_path, "-t", "F16")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    forced = edgeq("convert", CHECKPOINT, "-o", tmp_path, "-t", "F16", "--force")
    assert forced.stdout.startswith(f"{path}: F16, 14.")


def test_convert_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    result = edgeq("convert", CHECKPOINT, "-o", tmp_path, "-t", "Q9_X")
    assert result.exit_code == 2
    assert "Q4_K_M" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600000", 600_000),
        ("600KB", 600_000),
        ("600kb", 600_000),
        ("600kib", 600 * 1024),
        ("600mb", 600_000_000),
        ("1.5 MiB", 3 << 19),
        ("2GB", 2_000_000_000),
        ("2gib", 2 << 30),
        ("1T", 10**12),
    ],
)
def test_sizes_in_every_spelling(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["9" * 400, "1e9", "-1MB", "0", "0.1", "1PB", "MB", "\u0663MB", "4iB"]
)
def test_sizes_that_are_none(text: str) -> None:
    result = edgeq("convert", CHECKPOINT, "--size", text)
    assert result.exit_code == 2
    assert "expected" in result.stderr
    assert len(result.stderr) < 300


def test_convert_names_the_flag_that_allows_quantizing_twice(tmp_path: Path) -> None:
    once = write_gguf(tmp_path / "a.gguf", np.ones((3, 2), np.float32))
    result = edgeq("convert", once, "-o", tmp_path / "b.gguf")
    assert result.exit_code == 2
    assert "Q8_0 already" in result.stderr
    assert "--allow-requantize" in result.stderr


# --- processes


def start(*args: object, code: str = "", **options: Any) -> subprocess.Popen[str]:
    command = ["-c", code] if code else ["-m", "edgeq"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, args)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_convert_leaves_no_file(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    """The output is claimed before the work starts; slow reading gives time to interrupt."""
    code = (
        "import time, edgeq.cli\n"
        "from edgeq.sources import CheckpointSource as Source\n"
        "read = Source.read\n"
        "def slow(self, *args):\n"
        "    time.sleep(0.2)\n"
        "    return read(self, *args)\n"
        "Source.read = slow\n"
        "edgeq.cli.main()\n"
    )
    out = tmp_path / "model.gguf"
    process = start("convert", CHECKPOINT, "-o", out, "-t", "F16", code=code)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == exit_code, shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_modules_are_imported() -> None:
    """Python would show a traceback, click would say "Aborted!"; the import lasts a while."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == NAME: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from edgeq.__main__ import main\n"
        "main()\n"
    )
    for name, args in (("click", ["inspect"]), ("edgeq.cli.inspect", ["inspect", "x"])):
        process = start(*args, code=code.replace("NAME", repr(name)))
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 130, shown
        assert "Traceback" not in shown


def test_closed_streams(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", np.ones((3, 2), np.float32))
    for closed in ("<&-", ">&-", "<&- >&- 2>&-"):
        command = f'"{sys.executable}" -m edgeq inspect "{path}" --json {closed}'
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), closed
    command = f'"{sys.executable}" -m edgeq run "{path}" <&-'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "edgeq: prompt: empty: expected some text\n")


def test_nohup_is_respected() -> None:
    from edgeq.cli.convert import _stoppable

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", np.ones((3, 2), np.float32))
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "edgeq", "inspect", path, "--json"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")
