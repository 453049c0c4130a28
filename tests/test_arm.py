"""edgeq on emulated Arm boards, tests/arm/run: a short form wherever `make arm` has prepared the
emulator, and with `-m arm` everything, which takes hours. docs/arm.md says what an emulator cannot
show.
"""

import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from arm import prepare

import edgeq

ROOT = Path(__file__).resolve().parents[1]
BOARDS = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "dotprod", "max": "i8mm"}
FAMILIES = ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_NL"]
# Not these: they read the assembly that LLVM makes for Arm on any machine.
READERS = {"test_kernels_arm.py", "test_kernels_barrier.py"}
FILES = sorted({path.name for path in ROOT.glob("tests/test_kernels_*.py")} - READERS)

pytestmark = pytest.mark.skipif(
    not prepare.home().is_dir(), reason="no emulated Arm here: make arm prepares it"
)


def run(cpu: str, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / "tests" / "arm" / "run"), cpu, *map(str, command)]
    kept = {k: v for k, v in os.environ.items() if k != "EDGEQ_ISA" and k[:6] != "NUMBA_"}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**kept, **more})


def output(cpu: str, *command: object, **more: str) -> str:
    done = run(cpu, *command, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(cpu: str, *command: object, **more: str) -> dict[str, int]:
    """How many tests passed, were skipped and so on."""
    shown = output(cpu, "pytest", "-p", "no:cacheprovider", *command, **more)
    return {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", shown.splitlines()[-1])}


# -- the emulator ----------------------------------------------------------------------------------
EXECUTE = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex(sys.argv[1]) + bytes.fromhex("c0035fd6"))  # ... ret
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CFUNCTYPE(None)(address)()
print("done")
"""
SMULL, SDOT, SMMLA = "20c0220e", "2094824e", "20a4824e"  # v0, v1, v2


@pytest.mark.parametrize(
    ("cpu", "runs", "lacks"),
    [
        ("cortex-a53", SMULL, SDOT),
        ("cortex-a72", SMULL, SDOT),
        ("cortex-a76", SDOT, SMMLA),
        ("max", SMMLA, None),
    ],
)
def test_the_emulated_cpu_has_what_the_real_one_has(cpu: str, runs: str, lacks: str | None) -> None:
    """And no more: a kernel with an instruction that the board lacks would not survive here."""
    assert output(cpu, "python", "-c", EXECUTE, runs) == "done\n"
    if lacks:
        assert run(cpu, "python", "-c", EXECUTE, lacks).returncode in (
            -signal.SIGILL,
            128 + signal.SIGILL,
        )


CHOICE = "from edgeq.kernels import isa; print(isa.choose().NAME, isa.target(isa.choose())[0])"


@pytest.mark.parametrize("cpu", BOARDS)
def test_the_cpu_is_recognized(cpu: str) -> None:
    name = "generic" if cpu == "max" else cpu
    assert output(cpu, "python", "-c", CHOICE).split() == [BOARDS[cpu], name]


# -- kernels ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
@pytest.mark.parametrize(
    "test", ["test_kernels_dot.py::test_row_dot", "test_kernels_matmul.py::test_panel_times_tile"]
)
def test_a_format_of_each_family(test: str, cpu: str) -> None:
    nodes = [f"tests/{test}[{BOARDS[cpu]}-{name}]" for name in FAMILIES]
    assert results(cpu, *nodes) == {"passed": len(FAMILIES)}


def test_a_product_of_matrices() -> None:
    """smmla, which the other emulator does not know: what stands in for it there is right."""
    node = "tests/test_kernels_matmul.py::test_panel_times_tile[i8mm-Q4_K]"
    assert results("max", node) == {"passed": 1}


COMPILE = """
from edgeq import kernels
from edgeq.kernels import isa
kernels.load(["matvec/Q4_K", "matmul/Q4_K"], isa.choose())
"""


def test_whole_kernels() -> None:
    """Compiled there as on a board, by child processes."""
    assert output("cortex-a76", "python", "-c", COMPILE) == ""
    ops = ("matvec", "matmul")
    nodes = [f"tests/test_kernels_matmul.py::test_product[dotprod-Q4_K-{op}]" for op in ops]
    assert results("cortex-a76", *nodes) == {"passed": 2}


# -- everything ------------------------------------------------------------------------------------
@pytest.mark.arm
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cpu", BOARDS)
def test_kernels(cpu: str, name: str) -> None:
    """Those of the CPU's instruction set, and on one CPU the portable ones."""
    others = set(BOARDS.values()) - {BOARDS[cpu]}
    if cpu != "cortex-a72":
        others.add("portable")
    unwanted = " or ".join(f"[{isa} or -{isa}" for isa in sorted(others))
    found = results(cpu, f"tests/{name}", "-k", f"not ({unwanted})")
    assert found["passed"] > 0
    assert set(found) <= {"passed", "skipped", "deselected"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny-home.gguf"
    return edgeq.convert(ROOT / "examples" / "tiny-home", out, "Q4_K_M")


@pytest.mark.arm
@pytest.mark.parametrize("cpu", BOARDS)
def test_convert_writes_the_same_bytes(cpu: str, model: Path, tmp_path: Path) -> None:
    output(cpu, "edgeq", "convert", "examples/tiny-home", "-o", tmp_path / "a.gguf", "-t", "Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == model.read_bytes()


@pytest.mark.arm
@pytest.mark.parametrize("isa", [None, "portable"])
@pytest.mark.parametrize("cpu", BOARDS)
def test_the_demo_says_the_same(cpu: str, isa: str | None, model: Path) -> None:
    shown = output(cpu, "python", "examples/demo.py", model, **({"EDGEQ_ISA": isa} if isa else {}))
    answers = [part.splitlines()[1] for part in shown.split("\n> ")[1:]]
    assert answers == ['{"device": "heater", "room": "garage", "state": "off"}', "Tokyo", "Sunday"]
    assert shown.strip().endswith(f", {isa or BOARDS[cpu]}")


TEXT = "The heater in the garage is on. What day comes after Friday?"
LOGITS = f"""
import sys, numpy as np, edgeq
with edgeq.load(sys.argv[1]) as model:
    ids = model.tokenize({TEXT!r})
    np.save(sys.argv[2], np.concatenate([model.logits(ids[:2]), model.logits(ids)]))
"""


@pytest.mark.arm
@pytest.mark.parametrize("recipe", ["Q2_K", "Q5_0", "Q6_K"])
@pytest.mark.parametrize("cpu", BOARDS)
def test_logits_are_those_of_this_machine(cpu: str, recipe: str, tmp_path: Path) -> None:
    """Of rows (few tokens) and of panels; a hundredth or two is off, as sums in another order round
    some activations to other codes.
    """
    path = edgeq.convert(ROOT / "examples" / "tiny-home", tmp_path / "m.gguf", recipe, method="rtn")
    with edgeq.load(path) as model:
        ids = model.tokenize(TEXT)
        here = np.concatenate([model.logits(ids[:2]), model.logits(ids)])
    output(cpu, "python", "-c", LOGITS, path, tmp_path / "there.npy")
    error = np.load(tmp_path / "there.npy") - here
    assert (error.std(axis=1) < 0.05 * here.std(axis=1)).all()
