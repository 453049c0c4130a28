"""Bundles for boards without internet: what is in them, and what must not happen to other files."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import edgeq
from edgeq import blocks, deploy, wheel
from edgeq.cli import app
from edgeq.errors import FormatError, RequestError, ResourceError
from edgeq.gguf import GgufWriter, TensorSpec

ROOT = Path(__file__).resolve().parents[1]
PIP = """#!/bin/sh
while [ "$1" != --dest ]; do shift; done
echo "Collecting numpy"
{extra}
echo "$@" >>"$2/../calls"
echo wheel >"$2/numpy-1-py3-none-any.whl"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    spec = TensorSpec("output_norm.weight", (32,), blocks.get("F32"))
    with GgufWriter(path, {"general.architecture": "none"}, [spec]) as writer:
        writer.write(spec.name, np.ones(32, np.float32))
    return path


def use_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: str = "") -> None:
    """Instead of pip and its network: a script that notes what it is asked for."""
    script = tmp_path / "python"
    script.write_text(PIP.format(extra=extra))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_pip(monkeypatch, tmp_path)


def test_a_bundle_has_everything(pip: None, tmp_path: Path, model: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    folder = tmp_path / "b"
    made = deploy.make(folder, model=model, progress=lambda *step: steps.append(step))
    assert (made.folder, made.machine, made.model) == (folder, "aarch64", "tiny.gguf")
    assert (folder / "models/tiny.gguf").read_bytes() == model.read_bytes()
    for name in ("install.sh", "start.sh"):
        assert (folder / name).stat().st_mode & 0o111
    sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} | {"SHA256SUMS"} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    for digest, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pythons"] == ["3.11", "3.13"]
    assert made.size == sum(entry["bytes"] for entry in manifest["files"].values())
    first, second = (folder / "calls").read_text().splitlines()
    assert "--python-version 3.11" in first
    assert "--python-version 3.13" in second
    assert "--platform manylinux_2_28_aarch64 " in first
    assert steps[-1][:2] == (3, 4)
    assert any("Collecting numpy" in text for _, _, text in steps)
    assert not (tmp_path / "b.part").exists()


def test_an_earlier_bundle_is_replaced_only_by_force(pip: None, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    deploy.make(folder, pythons=["3.12"])
    (folder / "old").touch()
    with pytest.raises(ResourceError, match="--force"):
        deploy.make(folder)
    assert (folder / "old").exists()
    deploy.make(folder, pythons=["3.12"], force=True)
    assert not (folder / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "python"]


def test_a_link_to_a_bundle_stays_one(pip: None, tmp_path: Path) -> None:
    deploy.make(tmp_path / "b", pythons=["3.12"])
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "b" / "old").touch()
    made = deploy.make(tmp_path / "link", pythons=["3.12"], force=True)
    assert made.folder == tmp_path / "b"
    assert not (tmp_path / "link" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "link", "python"]


def test_a_finished_bundle_with_the_name_of_an_unfinished_one(pip: None, tmp_path: Path) -> None:
    deploy.make(tmp_path / "b.part", pythons=["3.12"])
    before = (tmp_path / "b.part" / "SHA256SUMS").read_bytes()
    with pytest.raises(ResourceError, match="move it away"):
        deploy.make(tmp_path / "b", pythons=["3.12"])
    assert (tmp_path / "b.part" / "SHA256SUMS").read_bytes() == before
    assert not (tmp_path / "b.part" / deploy.MARK).exists()


def test_foreign_folders_are_left_alone(pip: None, tmp_path: Path) -> None:
    for name in ("mine", "b.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"kind": "photos"}')
    for name in ("mine", "b"):
        with pytest.raises(ResourceError, match="exists and"):
            deploy.make(tmp_path / name, force=True)
        assert not (tmp_path / "b").exists()
    for name in ("mine", "b.part"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["manifest.json"]


def test_what_was_left_unfinished_is_made_anew(pip: None, tmp_path: Path) -> None:
    part = tmp_path / "b.part"
    (part / "wheels").mkdir(parents=True)
    (part / "wheels" / "half.whl").touch()
    (part / deploy.MARK).touch()
    deploy.make(tmp_path / "b", pythons=["3.12"])
    assert not list((tmp_path / "b").rglob("half.whl"))


def test_an_interrupted_run_leaves_nothing(pip: None, tmp_path: Path, model: Path) -> None:
    def stop(done: int, total: int, text: str) -> None:
        if "tiny.gguf" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy.make(tmp_path / "b", model=model, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "tiny.gguf"]


def test_a_failing_pip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_pip(monkeypatch, tmp_path, "echo 'ERROR: no numba for you'; echo later; exit 1")
    done = CliRunner().invoke(app, ["deploy", "--bundle", str(tmp_path / "b")])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("Python 3.11 on aarch64: ERROR: no numba for you\n")
    use_pip(monkeypatch, tmp_path, "echo 'Retrying: NewConnectionError'; echo 'ERROR: no'; exit 1")
    with pytest.raises(ResourceError, match=r"ERROR: no: is this machine online\?$"):
        deploy.make(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_no_model_is_fetched_for_a_bundle_that_cannot_be(
    pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.hub.model", lambda name: pytest.fail("fetched"))
    words = ["deploy", "-m", "user/repo", "--bundle"]
    for rest, why in (
        ([str(tmp_path)], "is no bundle"),
        ([str(tmp_path / "b"), "--machine", "armv6l"], "machine 'armv6l': expected aarch64 or"),
    ):
        done = CliRunner().invoke(app, [*words, *rest])
        assert done.exit_code == 2
        assert why in done.stderr


def test_what_cannot_be_finished_is_refused(
    pip: None, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "b"
    for version in ("3.10", "2.7", "3", "4.1", "x", ""):
        with pytest.raises(RequestError, match=r"expected a version from 3\.11"):
            deploy.make(bundle, pythons=[version])
    (tmp_path / "text").write_text("no model")
    with pytest.raises(FormatError, match="text"):
        deploy.make(bundle, model=tmp_path / "text")
    with pytest.raises(RequestError, match="rename"):
        deploy.make(bundle, model=model.rename(tmp_path / "a\nb.gguf"))
    with pytest.raises(ResourceError, match="create it first"):
        deploy.make(tmp_path / "no" / "b")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(ResourceError, match=r"needs about 200.0 MiB, 1.0 MiB are free"):
        deploy.make(bundle)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="no pip"):
        deploy.make(bundle)
    assert not list(tmp_path.glob("b*"))


def test_the_command_reports(pip: None, tmp_path: Path, model: Path) -> None:
    words = ["deploy", "--bundle", str(tmp_path / "b"), "-m", str(model), "--machine", "x86_64"]
    done = CliRunner().invoke(app, [*words, "--python", "3.12", "--json"])
    report = json.loads(done.stdout)
    assert (report["machine"], report["pythons"]) == ("x86_64", ["3.12"])
    done = CliRunner().invoke(app, [*words, "--force"])
    assert "linux-x86_64, Python 3.11 and 3.13" in done.stdout


# -- our own wheel ---------------------------------------------------------------------------------
def test_the_wheel_can_be_installed(tmp_path: Path) -> None:
    path = wheel.build(tmp_path)
    assert wheel.build(tmp_path).read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        about = file.read(f"edgeq-{edgeq.__version__}.dist-info/METADATA").decode()
    assert {"edgeq/formats/q4_k.toml", "edgeq/devices/deploy/install.sh"} <= names
    assert not [name for name in names if "__pycache__" in name]
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = re.findall(r"^Requires-Dist: (.*)$", about.replace("_", "-"), re.MULTILINE)
    assert {need.replace("_", "-") for need in needs} <= set(listed)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", target, path], check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "edgeq", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
    )
    assert shown.stdout == f"edgeq {edgeq.__version__}\n", shown.stderr


def test_what_the_wheel_needs_is_said_by_edgeq_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an installed package lies who knows whose pyproject.toml."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "theirs"\ndependencies = ["evil"]\n'
    )
    monkeypatch.setattr(wheel, "PACKAGE", tmp_path / "edgeq")
    about: list[str | None] = ["Name: edgeq\nVersion: 7\n", None]
    installed = SimpleNamespace(read_text=lambda name: about.pop(0))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    assert wheel.build(tmp_path).name == "edgeq-7-py3-none-any.whl"
    with pytest.raises(ResourceError, match="neither a checkout nor an installation"):
        wheel.build(tmp_path)
