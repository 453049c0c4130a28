"""Calibration: what is watched, what is added up, and that an interruption changes nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shell import CHECKPOINT, ROOT, edgeq

from edgeq import blocks, calibration, convert, hessian, imatrix, load, open_gguf, passes
from edgeq.calibration import Settings
from edgeq.calibration.sums import Sums
from edgeq.calibration.work import Work
from edgeq.errors import EdgeqError, FormatError, ModelError, RequestError, ResourceError

TEXT = "The lamp in the hall is on. Turn off the heater in room 12, then open door 7. " * 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CHECKPOINT, tmp_path_factory.mktemp("model") / "f16.gguf", "F16")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# --- watching


def test_every_weight_is_fed_once(model: Path) -> None:
    with load(model) as m, open_gguf(model) as file:
        shapes = {name: info.shape for name, info in file.tensors.items() if len(info.shape) == 2}
        seen = [(name, x.shape) for names, x in m.inputs([1, 2, 3]) for name in names]
    assert sorted(name for name, _ in seen) == sorted(shapes)
    assert all(shape == (3, shapes[name][1]) for name, shape in seen)


def test_inputs_are_those_of_the_products(model: Path) -> None:
    """The first is the normed embedding, the last times the output matrix gives the logits."""
    ids = list(range(300, 340))
    with load(model) as m, open_gguf(model) as file:
        embedding = blocks.decode(file.tensor("token_embd.weight"), "F16")
        norm = blocks.decode(file.tensor("blk.0.attn_norm.weight"), "F32")
        inputs = [(names, x.copy()) for names, x in m.inputs(ids)]
        logits = m.logits(ids)
        epsilon = m.arch.rms_epsilon
    rows = embedding[ids]
    expected = norm * rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + epsilon)
    assert inputs[0][0] == tuple(f"blk.0.attn_{part}.weight" for part in "qkv")
    np.testing.assert_allclose(inputs[0][1], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inputs[-1][1] @ embedding.T, logits, rtol=1e-3, atol=1e-3)


def test_long_chunks_are_read_in_batches(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(500, 560))

    def watched() -> dict[tuple[str, ...], np.ndarray]:
        parts: dict[tuple[str, ...], list[np.ndarray]] = {}
        with load(model) as m:
            for names, x in m.inputs(ids):
                parts.setdefault(names, []).append(x.copy())
        return {names: np.concatenate(xs) for names, xs in parts.items()}

    whole = watched()
    monkeypatch.setattr(passes, "BATCH", 16)
    for names, x in watched().items():
        np.testing.assert_allclose(x, whole[names], rtol=1e-3, atol=1e-3)


def test_only_what_is_wanted_is_run(model: Path) -> None:
    wanted = {"blk.0.attn_output.weight", "blk.1.ffn_up.weight"}
    with load(model) as m:
        few = [(names, x.copy()) for names, x in m.inputs([5, 6, 7, 8], wanted)]
        every = {name: x.copy() for names, x in m.inputs([5, 6, 7, 8]) for name in names}
        assert m.seen == []
    assert [names for names, _ in few] == [(name,) for name in sorted(wanted)]
    for (name,), x in few:
        np.testing.assert_array_equal(x, every[name])


# --- sums


def test_llama_imatrix_finds_the_same(shared_data: Path, model: Path) -> None:
    """Its file lacks six of the 494 chunks' tokens: it reads eight chunks at a time, in the end
    six, and the six last tokens came as a batch of their own, too small for it to count. It adds in
    float32. Two layers are enough here: nothing that comes later differs.
    """
    text = (shared_data / "tiny-home" / "calibration.txt").read_text()
    theirs = imatrix.read(shared_data / "tiny-home" / "imatrix.gguf")
    wanted = [name for name in theirs.sums if name.startswith(("blk.0.", "blk.1."))]
    sums = Sums()
    with load(model) as m:
        work = Work(m, text, Settings(ctx=theirs.chunk_size), budget=0)
        for number, chunk in enumerate(work.chunks):
            last = 255 if number >= len(work.chunks) - 6 else 256
            for names, x in m.inputs(chunk, wanted):
                sums.add(names, x[:last])
    ours = sums.imatrix([], len(work.chunks), 256)
    assert sorted(ours.sums) == wanted
    for name, found in ours.importance().items():
        assert ours.counts[name] == theirs.counts[name]
        np.testing.assert_allclose(found, theirs.importance()[name], rtol=1e-3)


def test_experts_count_what_is_routed_to_them(rng: np.random.Generator) -> None:
    sums = Sums()
    batches = [rng.standard_normal((n, 5)).astype(np.float32) for n in (7, 3)]
    chosen = [np.array([rng.permutation(4)[:2] for _ in x]) for x in batches]
    for x, experts in zip(batches, chosen, strict=True):
        sums.add_routed("e", x, experts, 5)
    expected, counts = np.zeros((5, 5)), np.zeros(5)
    for x, experts in zip(batches, chosen, strict=True):
        for row, used in zip(x, experts, strict=True):
            for expert in used:
                expected[expert] += row.astype(float) ** 2
                counts[expert] += 1
    np.testing.assert_allclose(sums.sums["e"], expected)
    np.testing.assert_array_equal(sums.counts["e"], counts)
    assert counts[4] == 0  # and no division by it
    assert (sums.imatrix([], 1, 10).importance()["e"][4] == 1).all()


def test_hessians_do_not_depend_on_the_budget(model: Path, text: Path, tmp_path: Path) -> None:
    files = []
    for budget in (1, 2_000_000, 1 << 40):
        out, h = tmp_path / f"{budget}.gguf", tmp_path / f"{budget}-h.gguf"
        report = calibration.run(
            model, text, out, Settings(ctx=64, chunks=2), hessian_out=h, budget=budget
        )
        files.append((report.passes, out.read_bytes(), h.read_bytes()))
    assert [passes for passes, _, _ in files][::2] == [32, 1]
    assert 1 < files[1][0] < 32
    assert len({content[1:] for content in files}) == 1
    means = report.imatrix.importance()
    with hessian.read(h) as found:
        assert found.weights.keys() == means.keys()
        for name in ("blk.0.attn_v.weight", "blk.7.ffn_down.weight"):
            matrix = found.get(name)
            assert matrix is not None
            np.testing.assert_array_equal(matrix, matrix.T)
            np.testing.assert_allclose(matrix.diagonal(), means[name], rtol=1e-5)


def test_hessian_is_the_mean_outer_product(model: Path, text: Path, tmp_path: Path) -> None:
    name, h = "blk.2.ffn_down.weight", tmp_path / "h.gguf"
    settings = Settings(ctx=32, chunks=2)
    calibration.run(model, text, tmp_path / "i.gguf", settings, hessian_out=h)
    with load(model) as m:
        ids = m.tokenizer.encode(TEXT, bos=True)[:64]
        ids[32] = ids[0]
        xs = [x.copy() for first in (0, 32) for _, x in m.inputs(ids[first : first + 32], [name])]
    x = np.concatenate(xs).astype(np.float64)
    with hessian.read(h) as found:
        assert found.tokens == 64
        np.testing.assert_allclose(found.get(name), x.T @ x / 64, rtol=1e-4, atol=1e-5)


# --- interruption

KILLED = """
import os, signal, sys
from edgeq import calibration
def progress(done, total):
    if done == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
model, text, out, h = sys.argv[1:5]
calibration.run(model, text, out, calibration.Settings(ctx=128), hessian_out=h, budget=9_000_000,
                save_every=0, progress=progress)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    settings, out, h = Settings(ctx=128), tmp_path / "i.gguf", tmp_path / "h.gguf"
    whole = calibration.run(
        model, text, tmp_path / "whole.gguf", settings, hessian_out=tmp_path / "whole-h.gguf"
    )
    chunks = whole.imatrix.chunk_count
    for done in (2, chunks + 3):  # in the first pass, then in the second
        command = [sys.executable, "-c", KILLED, *map(str, (model, text, out, h, done))]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        assert not h.exists()
    report = calibration.run(model, text, out, settings, hessian_out=h, budget=1)
    assert report.passes == 4  # as it was begun: the budget of the first run holds
    assert report.resumed == chunks + 3  # what was saved before the kill
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert h.read_bytes() == (tmp_path / "whole-h.gguf").read_bytes()
    assert list(tmp_path.glob("*.state")) == []


def interrupt(model: Path, text: Path, out: Path) -> None:
    """Stop after the first chunk, as Ctrl-C does."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.run(model, text, out, Settings(ctx=64), save_every=0, progress=stop)


def test_another_run_does_not_go_on_from_it(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    interrupt(model, text, out)
    text.write_text(TEXT + "more")
    with pytest.raises(ResourceError, match="another model, text or settings"):
        calibration.run(model, text, out, Settings(ctx=64))
    report = calibration.run(model, text, out, Settings(ctx=64), force=True)
    assert report.resumed == 0


def test_other_code_does_not_go_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, text, tmp_path / "i.gguf")
    monkeypatch.setattr(calibration, "program", lambda: "newer")
    with pytest.raises(ResourceError, match="or of another edgeq: finish that one"):
        calibration.run(model, text, tmp_path / "i.gguf", Settings(ctx=64))


def test_damaged_state_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    interrupt(model, text, out)
    progress = out.with_name("i.gguf.state") / "progress.npz"
    progress.write_bytes(progress.read_bytes()[:-100])
    with pytest.raises(ResourceError, match=r"progress\.npz: cannot be read: remove"):
        calibration.run(model, text, out, Settings(ctx=64))


def test_a_folder_of_somebody_else_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i.gguf.state"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(ResourceError, match=r"i\.gguf\.state: was not made by a calibration"):
            calibration.run(model, text, tmp_path / "i.gguf", Settings(ctx=64), force=force)
    assert [path.read_bytes() for path in folder.iterdir()] == [b"precious"]


def test_what_was_killed_while_it_wrote_is_ours(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    folder = tmp_path / "i.gguf.state"
    folder.mkdir()
    (folder / "new-run.json").write_text("{")
    interrupt(model, text, out)
    (folder / "new-progress.npz").touch()
    calibration.run(model, text, out, Settings(ctx=64))
    assert not folder.exists()


def test_two_runs_do_not_share_a_state(model: Path, text: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(ResourceError, match="another process works here"):
            calibration.run(model, text, tmp_path / "i.gguf", Settings(ctx=64))

    calibration.run(model, text, tmp_path / "i.gguf", Settings(ctx=64, chunks=1), progress=again)


# --- refusals


def overflowing(model: Path, path: Path) -> Path:
    """The model, with the largest number of its format in one matrix."""
    content = bytearray(model.read_bytes())
    with open_gguf(model) as file:
        info = file.tensors["blk.3.ffn_up.weight"]
    huge = np.full(info.nbytes // 2, np.inf, np.float16).tobytes()
    content[info.offset : info.offset + info.nbytes] = huge
    path.write_bytes(content)
    return path


def test_activations_that_are_no_numbers(model: Path, text: Path, tmp_path: Path) -> None:
    bad = overflowing(model, tmp_path / "bad.gguf")
    with pytest.raises(ModelError, match=r"blk\.3\.ffn_down\.weight: input channel 0 is (nan|inf)"):
        calibration.run(bad, text, tmp_path / "i.gguf", Settings(ctx=64), save_every=0)
    assert list(tmp_path.glob("i.gguf*")) == []


@pytest.mark.parametrize(
    ("content", "settings", "error", "message"),
    [
        (b"too short", Settings(ctx=64), RequestError, "expected at least 128, two windows of 64"),
        (b"caf\xe9", Settings(), FormatError, "line 1, byte 3: unexpected end"),
        (TEXT.encode(), Settings(ctx=1000), RequestError, "ctx = 1000: expected"),
        (TEXT.encode(), Settings(ctx=2), RequestError, "ctx = 2: expected"),
    ],
)
def test_texts_and_settings_that_do_not_do(
    content: bytes,
    settings: Settings,
    error: type[EdgeqError],
    message: str,
    model: Path,
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(error, match=message):
        calibration.run(model, text, tmp_path / "i.gguf", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("what", ["text", "model", "other output"])
def test_no_input_is_ever_overwritten(model: Path, text: Path, tmp_path: Path, what: str) -> None:
    copy, out = tmp_path / "m.gguf", tmp_path / "i.gguf"
    copy.hardlink_to(model)
    h = {"text": text, "model": copy, "other output": out}[what]
    with pytest.raises(RequestError, match=f"is the {what} itself"):
        calibration.run(model, text, out, Settings(ctx=64), hessian_out=h, force=True)
    assert text.read_text() == TEXT
    assert not out.exists()


# --- command line


def test_command_on_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """It converts the folder for the run; options and the report."""
    out = tmp_path / "i.gguf"
    flags = ("-c", 64, "--chunks", 3, "--process-output", "-o", out, "--json")
    result = edgeq("calibrate", CHECKPOINT, "-f", text, *flags)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["entries"], report["chunks"], report["tokens"]) == (57, 3, 192)
    assert report["datasets"] == ["text.txt"]  # never the whole path
    assert "is converted to floats of 16 bits" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.gguf", "text.txt"]
    assert "token_embd.weight" in imatrix.read(out).sums  # a tied output matrix
    brain = convert(CHECKPOINT, tmp_path / "bf16.gguf", "BF16")  # what the folder holds
    with load(brain) as m:
        same = calibration.collect(m, TEXT, Settings(ctx=64, chunks=3, process_output=True))
    for name, values in imatrix.read(out).sums.items():
        np.testing.assert_array_equal(values, same.sums[name])


def test_command_merges_and_shows(text: Path, model: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.gguf" for name in "abc")
    assert edgeq("calibrate", model, "-f", text, "-c", 64, "--chunks", 2, "-o", a).exit_code == 0
    more = ("-f", text, "-c", 64, "--chunks", 3, "--in-file", a, "-o", b)
    assert "56 entries, 5 chunks of 64 tokens" in edgeq("calibrate", model, *more).stdout
    assert edgeq("calibrate", "--in-file", a, "--in-file", b, "-o", c).exit_code == 0
    assert imatrix.read(c).counts["blk.0.attn_q.weight"] == 7 * 64
    shown = edgeq("calibrate", "--in-file", c, "--show-statistics").stdout.splitlines()
    assert shown[0].split()[:3] == ["layer", "tensor", "Σ"]
    assert len(shown) == 1 + 56 + 1 + 8
    report = json.loads(edgeq("calibrate", "--in-file", c, "--show-statistics", "--json").stdout)
    assert len(report["tensors"]) == 56
    assert [layer["layer"] for layer in report["layers"]] == list(range(8))
    over = edgeq("calibrate", "--in-file", a, "--in-file", b, "-o", b, "--force")
    assert (over.exit_code, "is the file to merge itself" in over.stderr) == (2, True)
    old = tmp_path / "old.dat"
    assert edgeq("calibrate", "--in-file", c, "--output-format", "dat", "-o", old).exit_code == 0
    assert imatrix.read(old).sums.keys() == imatrix.read(c).sums.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give MODEL and -f FILE"),
        (("model.gguf",), "a text is needed"),
        (("model.gguf", "-f", "none.txt"), "none.txt: cannot be read: No such file"),
        (("none", "-f", __file__), "none: not found: give a GGUF file or a checkpoint folder"),
        (("--in-file", "none.gguf", "-o", "x.gguf"), "none.gguf"),
    ],
)
def test_command_refuses(flags: tuple[str, ...], message: str) -> None:
    result = edgeq("calibrate", *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
