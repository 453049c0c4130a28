"""What a start that compiles nothing imports and holds: a board with 512 MB must have room."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edgeq
from edgeq import kernels, memory
from edgeq.kernels import cache
from edgeq.kernels import isa as isas

ROOT = Path(__file__).resolve().parents[1]
MOST = 80 << 20  # bytes beside file and KV cache: Python, NumPy, the vocabulary, buffers
LIMIT, MODEL = 400_000_000, 105_000_000  # bytes: all there is; a model's file

ANSWER = """
import json, sys, edgeq
from edgeq import memory
with edgeq.load(sys.argv[1], threads=2) as model:
    said = "".join(model.chat([{"role": "user", "content": "What is the capital of Japan?"}],
                              temperature=0))
    print(json.dumps([said, memory.peak(), model.kv_bytes, sorted(sys.modules)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere LLVM links kernels")
def test_a_warm_start_is_small(tmp_path: Path) -> None:
    path = edgeq.convert(ROOT / "examples" / "tiny-home", tmp_path / "tiny.gguf", "Q8_0")
    command = [sys.executable, "-c", ANSWER, str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the first one may have to compile
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    said, peak, kv, modules = json.loads(done.stdout)
    assert said == "Tokyo"
    heavy = {"numba", "llvmlite.binding", "importlib.metadata", "rich", "prompt_toolkit", "gguf"}
    assert not heavy & set(modules)
    assert peak - path.stat().st_size - kv < MOST


def bench(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_first_start_fits_a_small_board(tmp_path: Path) -> None:
    """A model of 105 MB, all kernels to be compiled, 400 MB for everything."""
    lowmemory, path = bench("lowmemory"), tmp_path / "m.gguf"
    subprocess.run([sys.executable, ROOT / "tests/bench/smollm.py", path], check=True)
    assert path.stat().st_size == pytest.approx(MODEL, rel=0.02)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEQ_CACHE": str(tmp_path / "cache")}
    with lowmemory.cage(LIMIT) as place:
        if place is None:
            pytest.skip("no memory cgroup can be made here: it takes root")
    run = ["run", str(path), "one two three", "-n", "4", "-c", "2048", "-t", "2", "--temp", "0"]
    found = lowmemory.measure([sys.executable, "-m", "edgeq", *run], env, LIMIT)
    assert found["code"] == 0, found["said"]
    assert found["limited"]
    assert list(tmp_path.glob("cache/edgeq/kernels-*/*.o"))
    assert MODEL < found["peak"] < LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_compiling_is_small(tmp_path: Path) -> None:
    """The first start on a board: a compiler has what an engine before its KV cache leaves."""
    lowmemory = bench("lowmemory")
    isa = isas.choose()
    name = "attend/2.q4_0.q8_0"  # one of the largest
    command = [sys.executable, "-m", "edgeq.kernels.compile", str(tmp_path), name]
    cpu, features = isas.target(isa)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEQ_ISA": isa.NAME}
    env |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    found = lowmemory.measure(command, env, LIMIT)
    assert found["code"] == 0, found["said"]
    assert len(list(tmp_path.glob("*.o"))) == 1
    assert 50_000_000 < found["peak"] < LIMIT - MODEL - MOST  # the lower one: it was seen at work


@pytest.mark.parametrize(("free", "children"), [(400 << 20, 1), (4 << 30, 2)])
@pytest.mark.skipif(os.name != "posix", reason="needs the program true")
def test_compilers_at_once(
    free: int, children: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as memory allows."""
    started: list[list[str]] = []
    make = kernels._child

    def child(names: list[str], *rest: Any) -> subprocess.Popen[str]:
        started.append(names)
        return make(names, *rest)

    monkeypatch.setattr(cache, "folder", lambda isa: tmp_path)
    monkeypatch.setattr(sys, "executable", "true")
    monkeypatch.setattr(memory, "available", lambda: free)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(kernels, "_child", child)
    kernels._compile(["lead", "serve", "walk"], isas.choose(), None)
    assert len(started) == children
    assert sorted(name for names in started for name in names) == ["lead", "serve", "walk"]
