"""Moving 16 x 16 squares between the blocks of a matrix and lane rows, transposed in registers.

`starts` int64 [16] says where each lane's block begins. All arrays are contiguous.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.quantizers.search.lanes import LANES, address, is_flat, row_address


def _picks(bit, part):
    """Of two vectors, the elements whose index has `part` at `bit`: a pair shares two places."""
    picks = [e & ~bit | part | (LANES if e & bit else 0) for e in range(LANES)]
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), picks)


def _transposed(builder, rows):
    """16 vectors of 16: element j of vector i goes to element i of vector j."""
    for bit in (1, 2, 4, 8):
        swapped = list(rows)
        for i in (i for i in range(LANES) if not i & bit):
            pair = rows[i], rows[i | bit]
            swapped[i] = builder.shuffle_vector(*pair, _picks(bit, 0))
            swapped[i | bit] = builder.shuffle_vector(*pair, _picks(bit, bit))
        rows = swapped
    return rows


def _blocks(context, builder, array, value, starts, at):
    """Addresses of the 16 items from `at` on, in each of the 16 blocks of an array."""
    kind = types.Array(types.int64, 1, "C")
    data = context.make_array(kind)(context, builder, starts).data
    for lane in range(LANES):
        start = builder.load(builder.gep(data, [ir.Constant(at.type, lane)]))
        yield address(context, builder, array, value, builder.add(start, at))


def _rows(context, builder, array, value, at):
    """Addresses of the lane rows at .. at + 15 of an array."""
    for i in range(LANES):
        row = builder.add(at, ir.Constant(at.type, i))
        yield row_address(context, builder, array, value, row)


def _copy(builder, sources, targets, align):
    rows = [builder.load(source, align=align) for source in sources]
    for row, target in zip(_transposed(builder, rows), targets):
        builder.store(row, target, align=align)


@intrinsic
def gather_square(typing, source, starts, at, out):
    """Lane rows at .. at + 15 of `out` = items at .. at + 15 of each block of `source`, float32."""

    def codegen(context, builder, sig, args):
        source, starts, at, out = args
        blocks = _blocks(context, builder, sig.args[0], source, starts, at)
        _copy(builder, blocks, _rows(context, builder, sig.args[3], out, at), 4)
        return context.get_dummy_value()

    if not (is_flat(source, types.float32) and is_flat(out, types.float32)):
        return None
    return types.void(source, starts, types.int64, out), codegen


@intrinsic
def scatter_square(typing, lanes, at, starts, out):
    """Items at .. at + 15 of each block of `out` = lane rows at .. at + 15 of `lanes`, int8."""

    def codegen(context, builder, sig, args):
        lanes, at, starts, out = args
        rows = _rows(context, builder, sig.args[0], lanes, at)
        _copy(builder, rows, _blocks(context, builder, sig.args[3], out, starts, at), 1)
        return context.get_dummy_value()

    if not (is_flat(lanes, types.int8) and is_flat(out, types.int8)):
        return None
    return types.void(lanes, types.int64, starts, out), codegen
