"""A stopped conversion goes on only with the same source, settings, files and program."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopping import stop
from tiny_checkpoint import CONFIG, random_weights, write_checkpoint

from edgeq import hessian, imatrix, resume
from edgeq.errors import ResourceError
from edgeq.pipeline import convert, run

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-model", WIDE)


def touch(source: Path) -> None:
    os.utime(source / "model.safetensors", (1, 1))


def other_weights(source: Path) -> None:
    write_checkpoint(source, WIDE, random_weights(WIDE, seed=8))


def test_another_conversion_to_the_same_name_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    part = stop(checkpoint, out)
    before = part.read_bytes()
    importance = {"blk.0.ffn_up.weight": np.ones(256, np.float32)}
    others: list[tuple[str, str, dict[str, Any]]] = [
        ("Q8_0", r"recipe Q4_0 \(now Q8_0\)", {}),
        ("Q4_0", r"method search \(now rtn\)", {"method": "rtn"}),
        ("Q4_0", r"importance \w+ \(now \w+\)", {"importance": importance}),
    ]
    for recipe, message, options in others:
        with pytest.raises(ResourceError, match=message) as caught:
            convert(checkpoint, out, recipe, **options)
        assert "unfinished file of another conversion" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert part.read_bytes() == before
    expected = convert(checkpoint, tmp_path / "q8.gguf", "Q8_0").read_bytes()
    assert convert(checkpoint, out, "Q8_0", force=True).read_bytes() == expected


@pytest.mark.parametrize("change", [touch, other_weights])
def test_changed_source_is_another_conversion(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    stop(checkpoint, tmp_path / "out.gguf")
    change(checkpoint)
    with pytest.raises(ResourceError, match=r"files \w+ \(now \w+\)"):
        convert(checkpoint, tmp_path / "out.gguf", "Q4_0")


def test_other_metadata_is_another_conversion(checkpoint: Path, tmp_path: Path) -> None:
    stop(checkpoint, tmp_path / "out.gguf")
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ResourceError, match=r"header \w+ \(now"):
        convert(checkpoint, tmp_path / "out.gguf", "Q4_0")


def test_other_code_is_another_conversion(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(checkpoint, tmp_path / "out.gguf")
    monkeypatch.setattr("edgeq.resume.program", lambda: "newer")
    with pytest.raises(ResourceError, match=r"program \w+ \(now newer\)"):
        convert(checkpoint, tmp_path / "out.gguf", "Q4_0")


def test_other_formats_are_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(resume.find("formats"), tmp_path / "formats")
    monkeypatch.setattr(resume, "find", lambda kind: copy)
    found = {resume.program(), resume.program.__wrapped__()}
    assert len(found) == 1  # the same text elsewhere
    for path in (copy / "q4_0.toml", copy / "recipes" / "q4_0.toml"):
        path.write_text(path.read_text() + "# more\n")
        found.add(resume.program.__wrapped__())
    assert len(found) == 3


def write_statistics(folder: Path, scale: float) -> dict[str, dict[str, Any]]:
    """The options of a conversion with each kind of file beside the source."""
    name = "blk.0.ffn_up.weight"
    sums = {name: scale * np.arange(1, 257, dtype=np.float32)[None]}
    counts = {name: np.ones(1, np.float32)}
    imatrix.write(imatrix.Imatrix(sums, counts), folder / "i.gguf", force=True)
    (folder / "h.gguf").unlink(missing_ok=True)
    hessian.write(folder / "h.gguf", {(name,): np.diag(sums[name][0])}, tokens=1)
    rule = f'{{ tensors = "{name}", format = "{"Q8_0" if scale > 1 else "Q4_1"}" }}'
    text = f'name = "Q4_0"\nfile_type = 2\nbase = "Q4_0"\nabout = ""\nrule = [{rule}]\n'
    (folder / "r.toml").write_text(text)
    return {
        "hessians": {"hessians": folder / "h.gguf", "method": "gptq"},
        "importance": {"importance": folder / "i.gguf"},
        "recipe": {"recipe": str(folder / "r.toml")},
    }


@pytest.mark.parametrize(
    ("kind", "told"),
    [("hessians", "hessians"), ("importance", "importance"), ("recipe", "header")],
)
def test_files_beside_the_source_must_be_the_same(
    checkpoint: Path, tmp_path: Path, kind: str, told: str
) -> None:
    options = write_statistics(tmp_path, 1.0)[kind]
    whole = run(checkpoint, tmp_path / "whole.gguf", **{"recipe": "Q4_0", **options})
    part = stop(checkpoint, tmp_path / "out.gguf", **options)
    before = part.read_bytes()
    copies = {file.name: file.read_bytes() for file in tmp_path.glob("[hir].*")}
    times = {name: (tmp_path / name).stat() for name in copies}
    write_statistics(tmp_path, 2.0)
    with pytest.raises(ResourceError, match=rf"another conversion: {told} \w+ \(now"):
        run(checkpoint, tmp_path / "out.gguf", **{"recipe": "Q4_0", **options})
    assert part.read_bytes() == before
    for name, content in copies.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(0, times[name].st_mtime_ns))
    report = run(checkpoint, tmp_path / "out.gguf", **{"recipe": "Q4_0", **options})
    assert report.resumed > 0
    assert report.path.read_bytes() == whole.path.read_bytes()
