"""Conversions that are stopped go on, and give the bytes that they would have given at once."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import ROOT, edgeq
from stopping import die_at, stop
from tiny_checkpoint import CONFIG, random_weights, write_checkpoint

from edgeq import pipeline
from edgeq.errors import ModelError, ResourceError
from edgeq.gguf import GgufWriter, TensorSpec, journal, open_gguf, partfile
from edgeq.pipeline import convert, run

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-model", WIDE)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_ctrl_c_and_the_same_call_again(checkpoint: Path, tmp_path: Path, share: float) -> None:
    whole = run(checkpoint, tmp_path / "whole.gguf", "Q4_0")
    out = tmp_path / "out.gguf"
    part = stop(checkpoint, out, share=share)
    assert part.read_bytes()[:4] == partfile.MARK
    assert not out.exists()
    calls: list[tuple[int, int, str]] = []
    report = run(checkpoint, out, "Q4_0", progress=lambda *call: calls.append(call))
    assert out.read_bytes() == whole.path.read_bytes()
    assert not part.exists()
    assert 0 < report.resumed < len(report.tensors)
    assert report.tensors == whole.tensors  # errors of finished tensors are remembered
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in report.tensors)


def test_stopping_again_and_again(checkpoint: Path, tmp_path: Path) -> None:
    whole = convert(checkpoint, tmp_path / "whole.gguf", "Q4_0").read_bytes()
    out = tmp_path / "out.gguf"
    for share in (0.3, 0.0, 0.6, 0.6, 0.9):  # 0.0: while the finished tensors are being checked
        assert stop(checkpoint, out, share=share).exists()
    report = run(checkpoint, out, "Q4_0")
    assert out.read_bytes() == whole
    assert report.resumed > len(report.tensors) // 2


def test_nothing_finished_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    part = stop(checkpoint, tmp_path / "out.gguf", "F16", share=0)
    assert not part.exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][95, 63] = np.nan
    source = write_checkpoint(tmp_path / "damaged", CONFIG, weights)
    with pytest.raises(ModelError, match="nan"):
        convert(source, tmp_path / "out.gguf", "F16")
    assert not list(tmp_path.glob("out*"))


def test_damaged_tensor_is_made_again(checkpoint: Path, tmp_path: Path) -> None:
    """After a power cut, pages that were noted as written may be zeros."""
    whole = convert(checkpoint, tmp_path / "whole.gguf", "Q4_0")
    out = tmp_path / "out.gguf"
    part = stop(checkpoint, out, share=0.9)
    with open_gguf(whole) as file:
        tensors = list(file.tensors.values())
    with part.open("r+b") as file:
        for tensor in tensors[:3]:
            file.seek(tensor.offset + tensor.nbytes - 1)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    assert run(checkpoint, out, "Q4_0").resumed > 0
    assert out.read_bytes() == whole.read_bytes()


def test_failure_before_work_keeps_what_is_finished(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = stop(checkpoint, tmp_path / "out.gguf")
    real = os.pwrite
    for nth in (0, 1):
        left = [nth]

        def fail(fd: int, data: Any, at: int, left: list[int] = left) -> int:
            if not left[0]:
                raise OSError(5, "Input/output error")
            left[0] -= 1
            return real(fd, data, at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(ResourceError, match="do not trust it"):
                convert(checkpoint, tmp_path / "out.gguf", "Q4_0")
        assert part.exists()
    assert run(checkpoint, tmp_path / "out.gguf", "Q4_0").resumed > 0


@pytest.mark.parametrize("cut", [1, 16, 33, 10_000])
def test_part_without_its_end_is_begun_anew(checkpoint: Path, tmp_path: Path, cut: int) -> None:
    whole = convert(checkpoint, tmp_path / "whole.gguf", "Q4_0").read_bytes()
    out = tmp_path / "out.gguf"
    part = stop(checkpoint, out)
    os.truncate(part, part.stat().st_size - cut)
    assert run(checkpoint, out, "Q4_0").resumed == 0
    assert out.read_bytes() == whole


def test_every_byte_of_a_journal_may_be_wrong(tmp_path: Path, rng: np.random.Generator) -> None:
    good = journal.Journal({"a": "b"}, 2)
    path = tmp_path / "x"
    for i in range(good.size):
        content = bytearray(good.blank())
        content[i] = int(rng.integers(256))
        path.write_bytes(content)
        with path.open("rb") as file:
            found = journal.identity_of(file.fileno())
        assert found is None or isinstance(found, dict)


def checksum(data: bytes, *cuts: int) -> int:
    total, ends = journal.Checksum(), [*cuts, len(data)]
    for start, end in zip([0, *cuts], ends, strict=True):
        total.add(memoryview(data)[start:end])
    return total.value(b"")


def test_checksum_does_not_depend_on_the_pieces(rng: np.random.Generator) -> None:
    data = rng.bytes(5 * 4096 + 77)
    whole = checksum(data)
    for cuts in ((1,), (4096,), (5, 6, 4101, 4102), (100, 9000, 9001, 20000), (20480, 20500)):
        assert checksum(data, *cuts) == whole


def test_checksum_sees_pages_that_are_missing_or_swapped(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 3 * 4096 + 5, dtype=np.uint8)
    sums = {checksum(data.tobytes())}
    for page in range(3):
        other = data.copy()
        other[4096 * page : 4096 * (page + 1)] = 0
        sums.add(checksum(other.tobytes()))
    swapped = np.concatenate([data[4096:8192], data[:4096], data[8192:]])
    sums |= {checksum(swapped.tobytes()), checksum(data[:-1].tobytes())}
    assert len(sums) == 6


# --- killed processes


def start(source: Path, out: Path, delay: float) -> subprocess.Popen[str]:
    """A conversion by the command line, slowed down so that it can be hit."""
    code = (
        "import time, edgeq.cli, edgeq.stream\n"
        "from edgeq.sources import CheckpointSource as Source\n"
        "read = Source.read\n"
        "def slow(self, *args):\n"
        f"    time.sleep({delay})\n"
        "    return read(self, *args)\n"
        "Source.read = slow\n"
        "edgeq.cli.main()\n"
    )
    args = ("convert", source, "-o", out, "-t", "Q4_0", "--method", "rtn")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_kill_9_at_random_moments(checkpoint: Path, tmp_path: Path) -> None:
    whole = convert(checkpoint, tmp_path / "whole.gguf", "Q4_0", method="rtn").read_bytes()
    out = tmp_path / "out.gguf"
    part = tmp_path / "out.gguf.part"
    chance = random.Random(4)
    for _ in range(3):
        process = start(checkpoint, out, 0.02)
        while not part.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        if out.exists():
            break
    convert(checkpoint, out, "Q4_0", method="rtn", force=True)
    assert out.read_bytes() == whole
    assert not part.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    process = start(checkpoint, out, 0.05)
    while not part.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.3)  # a few tensors
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 128 + number, shown
    assert "the same command will go on from there" in shown
    assert part.exists()
    result = edgeq("convert", checkpoint, "-o", out, "-t", "Q4_0", "--method", "rtn")
    assert result.exit_code == 0
    assert "went on with an interrupted conversion" in result.stderr
    whole = convert(checkpoint, tmp_path / "whole.gguf", "Q4_0", method="rtn")
    assert out.read_bytes() == whole.read_bytes()


SPECS = [TensorSpec(f"t{i}", (40,), pipeline.blocks.get("F32")) for i in range(6)]
CALLS = ("ftruncate", "posix_fallocate", "pwrite", "pread", "fsync", "replace", "unlink")


def write_all(path: Path) -> None:
    with GgufWriter(path, {"general.name": "new"}, SPECS, identity={"recipe": "x"}) as writer:
        for i, spec in enumerate(SPECS):
            if writer.recall(spec.name) is None:
                writer.write(spec.name, np.full(40, i, np.float32), b"memo")


def killed(path: Path, nth: int) -> bool:
    """Write in a process that is killed at its nth system call; whether it came so far."""
    child = os.fork()
    if not child:
        die_at(nth, CALLS)
        write_all(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_every_system_call(tmp_path: Path) -> None:
    """Also twice: the second run may be killed while it looks at what the first has left."""
    write_all(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    for nth in range(200):
        path.unlink(missing_ok=True)
        ended = not killed(path, nth)
        if not path.exists():
            killed(path, 3 * nth % 7)
        if not path.exists():
            write_all(path)
        assert path.read_bytes() == whole
        assert not path.with_name("x.gguf.part").exists()
        if ended:
            return
    pytest.fail("the writer never came to its end")


def test_complete_file_of_something_else_is_kept(tmp_path: Path) -> None:
    """Another model's GGUF file under our .part name has no mark and no journal."""
    write_all(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes().replace(b"new", b"old")
    part = tmp_path / "x.gguf.part"
    part.write_bytes(content)
    with pytest.raises(ResourceError, match="was not made by edgeq"):
        write_all(tmp_path / "x.gguf")
    assert part.read_bytes() == content
