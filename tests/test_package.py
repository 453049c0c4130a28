"""The wheel, installed in an empty environment, has everything that a checkout has."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from edgeq import blocks
from edgeq.gguf import GgufWriter, TensorSpec

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="needs pip")

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def output(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # An environment of its own for the build would download hatchling every time.
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    output(*PIP, "wheel", "--no-deps", *here, "--wheel-dir", folder, ROOT)
    return next(folder.glob("edgeq-*.whl"))


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with edgeq from the wheel, and our own dependencies."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    output(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def run(binaries: Path, *command: str, cwd: Path) -> str:
    """Far from the checkout, so that nothing is found there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return output(binaries / command[0], *command[1:], cwd=cwd, env=environment)


def test_installed_package_finds_its_data(binaries: Path, tmp_path: Path) -> None:
    code = (
        "import edgeq, json; from edgeq.blocks import formats; from edgeq.data import find;"
        "from edgeq.recipe import recipes;"
        "print(json.dumps([edgeq.__file__, str(find('devices')), str(find('formats')),"
        " sorted(formats()), sorted(recipes())]))"
    )
    found = json.loads(run(binaries, "python", "-c", code, cwd=tmp_path))
    package, devices, formats = (Path(path).resolve() for path in found[:3])
    assert package.is_relative_to(binaries.parent.resolve())
    assert devices == package.parent / "devices"
    assert formats == package.parent / "formats"
    assert (devices / "generic.toml").is_file()
    assert found[3] == sorted(blocks.formats())
    shipped = (ROOT / "formats" / "recipes").glob("*.toml")
    assert found[4] == sorted(path.stem.upper() for path in shipped)


def test_installed_command_inspects_a_file(binaries: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    spec = TensorSpec("output_norm.weight", (32,), blocks.get("F32"))
    with GgufWriter(path, {"general.architecture": "none"}, [spec]) as writer:
        writer.write(spec.name, np.ones(32, np.float32))
    shown = run(binaries, "edgeq", "inspect", str(path), "--json", cwd=tmp_path)
    assert json.loads(shown)["formats"] == {"F32": {"tensors": 1, "parameters": 32, "bytes": 128}}


def test_installed_command_lists_every_command(binaries: Path, tmp_path: Path) -> None:
    shown = run(binaries, "edgeq", "--help", cwd=tmp_path)
    for file in (ROOT / "edgeq" / "cli").glob("[!_]*.py"):
        assert f"\n  {file.stem} " in shown


def test_version_is_the_package_version(binaries: Path, tmp_path: Path, wheel: Path) -> None:
    assert (
        run(binaries, "edgeq", "--version", cwd=tmp_path) == f"edgeq {wheel.name.split('-')[1]}\n"
    )
