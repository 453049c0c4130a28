"""No kernel touches a byte beyond its arrays: each array ends, or starts, at a forbidden page."""

import sys
from collections.abc import Callable, Iterator

import kernelkit as kit
import kvkit
import pytest
from kernelfence import Case, Fence, case

from edgeq import blocks
from edgeq.kernels import isa as isas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and mprotect")

each_isa = pytest.mark.parametrize("isa", kit.ISAS)
by_format = pytest.mark.parametrize(
    ("isa", "name"), [(isa, name) for isa in kit.ISAS for name in kit.formats_of(isa)]
)
Check = Callable[[list[Case]], None]


@pytest.fixture(scope="module")
def fence() -> Iterator[Fence]:
    server = Fence()
    yield server
    server.close()


@pytest.fixture
def check(fence: Fence) -> Check:
    """Fails when a case crashes or gives a wrong result beside the fence."""

    def ask(cases: list[Case]) -> None:
        assert fence.ask(cases) is None

    return ask


def lengths(name: str) -> tuple[int, ...]:
    return {256: (256, 512), 32: (32, 288), 1: (1, 31, 64)}[blocks.get(name).block]


def test_the_fence_stings(check: Check) -> None:
    """A byte inside may be read; one outside kills the child and nothing else."""
    inside = [case("touch", offset) for offset in range(4)]
    check(inside)
    for edge, offset in (("end", 4), ("front", -1)):
        with pytest.raises(AssertionError, match=rf"{edge}: touch .{offset}. .*SIGSEGV"):
            check([*inside, case("touch", offset)])
    check(inside)


@pytest.mark.parametrize("name", kit.FORMATS)
@each_isa
def test_emitted(check: Check, isa: str, name: str) -> None:
    lanes = isas.modules()[isa].WIDTH // 4
    check([case("dot", isa, name, cols=cols) for cols in lengths(name)])
    shapes = [{"rows": rows, "cols": cols} for cols in lengths(name) for rows in (1, lanes)]
    check([case("panel", isa, name, **shape) for shape in shapes])


@by_format
def test_products(check: Check, isa: str, name: str) -> None:
    kit.kernel(f"matvec/{name}", isa)  # compile here, not in the child
    lanes = isas.modules()[isa].WIDTH // 4
    shapes = [
        {"cols": cols, "tokens": tokens, "rows": rows}
        for cols in lengths(name)
        for tokens, rows in ((1, 1), (3, lanes + 1), (9, 2 * lanes))
    ]
    more = {"threads": 2, "bias": True, "add": True}
    for op in ("matvec", "matmul"):
        check([case("product", op, isa, name, **shape, **more) for shape in shapes])


@each_isa
def test_gated(check: Check, isa: str) -> None:
    kit.kernel("gated/Q4_K.Q4_K", isa)
    cases = [
        case("gated", isa, "Q4_K", "Q4_K", tokens=tokens, rows=rows, cols=256, threads=2)
        for tokens, rows in ((1, 32), (1, 288), (4, 96))
    ]
    floats = {"tokens": 2, "rows": 37, "cols": 31, "quantized": False}
    check([*cases, case("gated", isa, "F16", "F16", **floats)])


@by_format
def test_embed(check: Check, isa: str, name: str) -> None:
    kit.kernel(f"embed/{name}", isa)
    shape = {"tokens": 3, "threads": 2}
    check([case("embed", isa, name, cols=cols, **shape) for cols in lengths(name)])


@each_isa
def test_prepare(check: Check, isa: str) -> None:
    kit.kernel("prepare/1", isa)
    cases = [
        case("prepare", isa, columns, mode=mode, tokens=tokens, cols=cols, threads=2)
        for columns in (1, isas.modules()[isa].TILE_COLS)
        for mode in (0, 1, 2)
        for tokens, cols in ((1, 32), (1, 96), (columns + 1, 64))
    ]
    floats = {"tokens": 2, "cols": 37, "quantized": False}
    cases += [case("prepare", isa, 1, mode=mode, **floats) for mode in (1, 2)]
    check([*cases, case("gather", isa, tokens=5, wanted=2, cols=19)])


by_types = pytest.mark.parametrize("types", kvkit.PAIRS, ids=".".join)


@by_types
@each_isa
def test_rope(check: Check, isa: str, types: tuple[str, str]) -> None:
    kit.kernel(f"rope/{'.'.join(types)}", isa)
    shapes = [
        {"dim": 64, "turned": 64, "halves": True, "norm": True},
        {"dim": 20, "turned": 8, "halves": False, "norm": False},
        {"dim": 6, "turned": 6, "halves": False, "norm": True},
    ]
    for tokens, position in ((1, 31), (7, 25)):
        more = {"tokens": tokens, "position": position, "threads": 2, "types": types}
        check([case("rope", isa, **shape, **more) for shape in shapes])


@by_types
@each_isa
def test_attend(check: Check, isa: str, types: tuple[str, str]) -> None:
    for queries in kit.queries_of(isa, types[0]):
        kit.kernel(f"attend/{queries}.{'.'.join(types)}", isa)
        shape = {"heads": 6, "kv_heads": 2, "threads": 2, "types": types}
        cases = [
            case("attend", isa, queries, tokens=tokens, position=at, dim=dim, span=span, **shape)
            for tokens, at, dim, span in (
                (1, 0, 64, 1),
                (1, 288, 20, 1),
                (5, 283, 16, 1),
                (17, 111, 40, 9),
            )
        ]
        check(cases)
