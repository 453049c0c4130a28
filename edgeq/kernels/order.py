"""The order in which row kernels see weights and activations where sums stay in their lanes.

A step is 256 weights: eight parts of 32 with two halves of four words, a word being four weights.
With the bits of part p and word i counted from the low end, words are ordered by (p0, i1, p1, half,
i0, p2). So every vector of 16, 32 or 64 bytes holds words of several groups, each lane sums up one
group, and few multiplications by scales are left; and in all of GGUF's layouts that order is one
interleaving of two loads, with a shift that is the same for each byte of a word.
"""

from collections.abc import Sequence

from edgeq.blocks import Run
from edgeq.errors import KernelError
from edgeq.kernels.codes import Coding, looked_up, place_of
from edgeq.kernels.llvm import I8, I32, Emit, Value, vector

__all__ = ["STEP", "codes_in_order", "groups_of", "part_offset", "word_offset"]

STEP = 256  # weights
QUARTER = 16  # bytes: half a part
Half = tuple[int, int]  # part, half of it


def part_offset(e: Emit, part: Value) -> Value:
    """Bytes from the start of a step to the first word of a part (i64)."""
    bits = [e.b.and_(e.b.lshr(part, e.i64(k)), e.i64(1)) for k in range(3)]
    terms = [e.b.mul(bit, e.i64(size)) for bit, size in zip(bits, (128, 32, 4), strict=True)]
    return e.b.add(e.b.add(terms[0], terms[1]), terms[2])


def word_offset(half: int, word: int) -> int:
    """Bytes from the first word of a part to another one.

    >>> [word_offset(half, word) for half in (0, 1) for word in range(4)]
    [0, 8, 64, 72, 16, 24, 80, 88]
    """
    return 64 * (word // 2) + 16 * half + 8 * (word % 2)


def _halves(start: int, width: int) -> tuple[int, list[Half]]:
    """Of the vector that starts at byte `start`: bit i1, and per 16 bytes whose words it holds
    beside those of four parts further on.
    """
    quarters = range(start // QUARTER, (start + width) // QUARTER)
    return quarters[0] >> 2 & 1, [(q >> 3 | q & 2, q & 1) for q in quarters]


def groups_of(c: Coding, start: int, width: int) -> tuple[int, ...]:
    """Group of each word of a vector."""
    _, halves = _halves(start, width)
    near = [(32 * part + QUARTER * half) // c.fmt.group for part, half in halves]
    further = 4 * 32 // c.fmt.group
    return tuple(g + k for g in near for k in (0, further) * 2)


def codes_in_order(e: Emit, c: Coding, step: Value, start: int, width: int) -> Value:
    """i8[width]: codes of the vector that starts at byte `start` of a step."""
    i1, halves = _halves(start, width)
    both = [halves, [(part + 4, half) for part, half in halves]]
    q = c.fmt.fields["q"]
    if q.type == "i8":
        places = [[sum(_element(c, half)) + q.at for half in side] for side in both]
        v = _gathered(e, step, places[0], places[1], i1)
        return e.b.xor(v, e.fill(I8, width, 0x80)) if c.shift else v
    out, low = None, 0
    for run in q.runs:
        v = _run(e, c, run, step, both, i1, low)
        out = v if out is None else e.b.or_(out, v)
        low += run.bits
    return looked_up(e, c, out)


def _element(c: Coding, half: Half) -> tuple[int, int]:
    """(weight within its block, first byte of that block in a step) where a half starts."""
    block, element = divmod(32 * half[0] + QUARTER * half[1], c.fmt.block)
    return element, block * c.fmt.bytes


def _run(
    e: Emit, c: Coding, run: Run, step: Value, both: list[list[Half]], i1: int, low: int
) -> Value:
    """The run's bits of a vector, moved to bit `low` of each byte."""
    if run.lanes < QUARTER:
        return _flags(e, c, run, step, both, i1, low)
    found = [[_place(c, run, half) for half in side] for side in both]
    places = [[byte for byte, _ in side] for side in found]
    shifts = [s for a, b in zip(*found, strict=True) for s in (a[1], b[1]) * 2]
    v = _gathered(e, step, places[0], places[1], i1)
    return e.bits_of_words(v, shifts, (1 << run.bits) - 1, low)


def _place(c: Coding, run: Run, half: Half) -> tuple[int, int]:
    """(byte, shift) of a half's first weight in a step."""
    element, block = _element(c, half)
    byte, shift = place_of(run, element)
    return block + byte, shift


def _flags(
    e: Emit, c: Coding, run: Run, step: Value, both: list[list[Half]], i1: int, low: int
) -> Value:
    """The same for a bit per weight: the bytes with these bits are spread, then tested."""
    if (run.bits, run.lanes) != (1, 1):
        raise KernelError(f"{c.fmt.name}: a run of {run.bits} bits in {run.lanes} lanes")
    words = [
        (half, 2 * i1 + i0) for pair in zip(*both, strict=True) for i0 in (0, 1) for half in pair
    ]
    blocks = list(dict.fromkeys(_element(c, half)[1] for half, _ in words))
    loaded = e.gather([e.load(I32, step, block + run.at) for block in blocks])
    source, wanted = [], []
    for half, word in words:
        element, block = _element(c, half)
        byte, shift = place_of(run, element + 4 * word)
        source += [4 * blocks.index(block) + byte - run.at] * 4
        wanted += [1 << (shift + k) for k in range(4)]
    spread = e.pick(e.b.bitcast(loaded, vector(I8, 4 * len(blocks))), source)
    found = e.b.and_(spread, e.const(I8, wanted))
    zero = e.fill(I8, len(wanted), 0)
    return e.b.select(e.b.icmp_unsigned("!=", found, zero), e.fill(I8, len(wanted), 1 << low), zero)


def _gathered(e: Emit, step: Value, near: Sequence[int], far: Sequence[int], i1: int) -> Value:
    """Two words (`i1`: the upper two) of the 16 bytes at each place, each followed by that of the
    place further on.
    """
    width = QUARTER * len(near)
    first, end = min(*near, *far), max(*near, *far) + QUARTER
    if end - first > 2 * width or any((place - first) % 4 for place in (*near, *far)):
        return _interleaved(e, _loaded(e, step, near), _loaded(e, step, far), i1)
    # One permutation of one or two loads, which end where the last place does.
    size = min(width, end - first)
    loads = [e.load(vector(I32, size // 4), step, at) for at in dict.fromkeys((first, end - size))]
    wanted = [
        place + 8 * i1 + 4 * i0 - first
        for pair in zip(near, far, strict=True)
        for i0 in (0, 1)
        for place in pair
    ]
    behind = end - first - 2 * size  # of the second load, counted on from the first one's end
    order = [at // 4 if at < size else (at - behind) // 4 for at in wanted]
    return e.b.bitcast(e.pick(loads[0], order, *loads[1:]), vector(I8, width))


def _loaded(e: Emit, step: Value, places: Sequence[int]) -> Value:
    """i8 lanes of 16 bytes from each place, by as few loads as they allow."""
    if all(place == places[0] + QUARTER * k for k, place in enumerate(places)):
        return e.load(vector(I8, QUARTER * len(places)), step, places[0])
    middle = len(places) // 2
    first = _loaded(e, step, places[:middle])
    if places[:middle] == places[middle:]:
        return e.pick(first, list(range(first.type.count)) * 2)
    return e.join([first, _loaded(e, step, places[middle:])])


def _interleaved(e: Emit, a: Value, b: Value, i1: int) -> Value:
    """Of each 16 bytes the lower or upper two words of a, each followed by that of b."""
    count = a.type.count // 4
    words = [e.b.bitcast(v, vector(I32, count)) for v in (a, b)]
    second = 0 if a is b else count
    order = [
        side + 4 * quarter + 2 * i1 + i0
        for quarter in range(count // 4)
        for i0 in (0, 1)
        for side in (0, second)
    ]
    return e.b.bitcast(e.pick(words[0], order, words[1] if second else None), a.type)
