"""Rows and tiles on cores without dot-product instructions (Raspberry Pi 3, 4, Zero 2 W): by their
assembly, and by llvm-mca where it is installed.
"""

import re

import armcode
import pytest

from edgeq import blocks

NAMES = [name for name, fmt in blocks.formats().items() if fmt.value != "x"]
BYTES_PER_CYCLE = {  # of each of four threads: what memory delivers to all of them, over the clock
    "cortex-a72": 5.5 / 1.5 / 4,  # Raspberry Pi 4, STREAM copy
    "cortex-a53": 1.57 / 1.0 / 4,  # Raspberry Pi Zero 2 W, memset
}
MOST_SPILLS = {"cortex-a72": 1, "cortex-a53": 5}  # LLVM lets loads run further ahead in order
# Of tiles: eight columns have more sums than there are registers. Products per cycle.
MOST_TILE_SPILLS = {"cortex-a72": 14, "cortex-a53": 60}
MORE_TILE_SPILLS = {("cortex-a72", "Q6_K"): 40}
LEAST_PRODUCTS = {"cortex-a72": 5.9, "cortex-a53": 2.2}

each_cpu = pytest.mark.parametrize("cpu", BYTES_PER_CYCLE)
each_format = pytest.mark.parametrize("name", NAMES)


def instructions(loop: str, names: str) -> int:
    return len(re.findall(rf"^\t(?:{names})\t", loop, re.MULTILINE))


@each_format
@each_cpu
def test_products_add_up_where_they_are_made(cpu: str, name: str) -> None:
    """Half of the multiplications or more add to what others gave, in 16 bits; few sums are widened
    and no lane is moved on its own.
    """
    loop = armcode.row_kernel(name, cpu).inner
    assert armcode.products(loop) == 256
    assert instructions(loop, "smlal2?") >= 16
    whole = blocks.get(name).table or blocks.get(name).fields["q"].type == "i8"
    assert instructions(loop, "saddlp|sadalp") <= (16 if whole else 4)
    assert instructions(loop, "addp") <= 16
    assert not instructions(loop, "ext|ins|umov|smov|trn.|zip2")
    assert armcode.stack_accesses(loop) <= MOST_SPILLS[cpu]


@pytest.mark.skipif(armcode.tool() is None, reason="llvm-mca is not installed")
@each_format
@each_cpu
def test_decoding_waits_for_memory(cpu: str, name: str) -> None:
    fmt = blocks.get(name)
    allowed = 256 / fmt.block * fmt.bytes / BYTES_PER_CYCLE[cpu]
    assert armcode.cycles_of(armcode.row_kernel(name, cpu), 256, cpu) <= allowed


@each_format
@each_cpu
def test_tiles_keep_most_in_registers(cpu: str, name: str) -> None:
    found = armcode.tile_kernel(name, cpu)
    assert found.products % 256 == 0
    most = MORE_TILE_SPILLS.get((cpu, name), MOST_TILE_SPILLS[cpu])
    assert armcode.stack_accesses(found.inner) <= most


@pytest.mark.skipif(armcode.tool() is None, reason="llvm-mca is not installed")
@each_format
@each_cpu
def test_tiles_multiply(cpu: str, name: str) -> None:
    wanted = armcode.tile_products(cpu)
    cost = armcode.cycles_of(armcode.tile_kernel(name, cpu), wanted, cpu)
    assert wanted / cost >= LEAST_PRODUCTS[cpu]
