"""What threads tell each other is ordered on Arm too, whose memory is weaker than x86's: no
emulator on x86 would show that it is not. Numba's code of the kernels that synchronize is compiled
for each core here, and the instructions are looked at.

A load that acquires (ldar, ldaxr, and ldadd, swp with an a) keeps what follows it behind; a store
that releases (stlr, stlxr, an l) keeps what precedes it before (Arm Architecture Reference Manual,
B2.3). The writes of an op are so seen by whoever passes its barrier: each thread's arrival
releases them, the last arrival acquires all of them and releases the next generation, and who waits
acquires that. Other kernels use the same words (`add_at`, `poke`) for counters.
"""

import re
from functools import cache

import armkit
import llvmlite.binding as llvm
import pytest
from numba import cfunc

from edgeq.kernels import compile as compiling
from edgeq.kernels import isa as isas
from edgeq.kernels.program import TEAM_KERNELS
from edgeq.kernels.words import SIGNATURE

CPUS = {"cortex-a53": False, "cortex-a72": False, "cortex-a76": True}  # has atomics that are one
ATOMIC = re.compile(r"^\t((?:ld|st)(?:a|l|x|ax|lx|ap)r|(?:ldadd|swp|cas)\w*)\t", re.MULTILINE)


@cache
def intermediate(name: str) -> str:
    """Numba's code of a kernel, with nothing in it of the machine that it is made on."""
    body = compiling.body(name, isas.modules()["portable"])
    text = cfunc(SIGNATURE, error_model="numpy")(body)._library.get_llvm_str()
    return re.sub(r"^target (?:triple|datalayout) = .*$", "", text, flags=re.MULTILINE)


def atomics(text: str, cpu: str) -> list[str]:
    """Atomic instructions in what a module becomes on a core."""
    machine = armkit.machine(cpu)
    head = f'target triple = "{armkit.TRIPLE}"\ntarget datalayout = "{machine.target_data}"\n'
    return ATOMIC.findall(machine.emit_assembly(llvm.parse_assembly(head + text)))


def expected(text: str, single: bool) -> list[str]:
    """For each atomic operation that the kernel names, the instructions that order it fully."""
    adds, swaps = (len(re.findall(rf"atomicrmw {op} ", text)) for op in ("add", "xchg"))
    loads = len(re.findall(r"load atomic ", text))
    if single:
        changes = ["ldaddal"] * adds + ["swpal"] * swaps
    else:
        changes = ["ldaxr", "stlxr"] * (adds + swaps)
    return sorted(["ldar"] * loads + changes)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", TEAM_KERNELS)
def test_what_threads_share_is_ordered(name: str, cpu: str) -> None:
    text = intermediate(name)
    assert "atomic" in text
    assert sorted(atomics(text, cpu)) == expected(text, CPUS[cpu])


@pytest.mark.parametrize("cpu", CPUS)
def test_weaker_orders_would_be_seen(cpu: str) -> None:
    """The same kernel without them gives other instructions."""
    text = intermediate("walk")
    weak = text.replace(" seq_cst", " monotonic")
    assert weak != text
    found = atomics(weak, cpu)
    assert not {"ldar", "ldaxr", "stlxr", "ldaddal", "swpal"} & set(found)
    assert found
