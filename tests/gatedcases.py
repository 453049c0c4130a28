"""One run of the fused gate against its slow twin; see kernelcases.py, which does the same for
other kernels.
"""

import kernelkit as kit
import naive
import numpy as np
from kernelcases import MARK, at, check_codes, floats, generator, inputs, state

from edgeq import blocks
from edgeq.kernels import layout
from edgeq.kernels.program import arguments


def gated(
    isa: str,
    gate: str,
    up: str,
    *,
    rows: int,
    cols: int,
    tokens: int,
    threads: int = 1,
    chunk: int = 32,
    quantized: bool = True,
    place: kit.Place = kit.anywhere,
) -> None:
    """silu(gate · x) * (up · x), and its codes where a reader wants them."""
    rng = generator(gate, up, rows, cols, tokens)
    formats = [blocks.get(name) for name in (gate, up)]
    weights = [place(kit.packed(fmt, rows, cols, rng)) for fmt in formats]
    raw = floats(rng, tokens, cols)
    given, stood_for = zip(*(inputs(isa, fmt, raw, 1, place) for fmt in formats), strict=True)
    products = [place(np.full((tokens, rows), MARK)) for _ in formats]
    words, taken = state(tokens, 0, place), place(np.zeros(2, np.int64))
    scratch = place(np.zeros(threads * layout.MATVEC_SCRATCH, np.uint8))
    common = {"state": at(words), "rows": rows, "cols": cols, "stride": rows, "bias": 0, "add": 0}
    common |= {"scratch": at(scratch), "scratch_bytes": layout.MATVEC_SCRATCH, "group": 1}
    common |= {"ahead": layout.PREFETCH, "chunk": chunk, "private": 0}
    blocks_of = [
        arguments(
            layout.MATMUL,
            **common,
            w=at(w),
            row_bytes=w.shape[1],
            **{key: at(array) for key, array in arrays.items()},
            out=at(out),
            taken=at(taken) + 8 * k,
        )
        for k, (w, arrays, out) in enumerate(zip(weights, given, products, strict=True))
    ]
    size = tokens * rows if quantized else 0
    counts = {"d": size // 32, "sums16": size // 16, "sums32": size // 32, "ints16": size // 16}
    counts |= {"ints32": size // 32, "q": size // 4}
    parts = {name: place(np.full(count, MARK)) for name, count in counts.items()}
    h = place(np.full((tokens, rows), MARK))
    ready = arguments(
        layout.PREPARE,
        state=at(words),
        mode=2,
        x=at(products[0]),
        x_stride=rows,
        weight=at(products[1]),
        eps=0.0,
        cols=rows,
        h=at(h),
        **{name: at(array) for name, array in parts.items() if name != "q"},
        q=at(parts["q"]) if quantized else 0,
        private=0,
    )
    names = dict(zip(layout.GATED, map(at, [*blocks_of, ready]), strict=True))
    kit.run(f"gated/{gate}.{up}", isa, place(arguments(layout.GATED, **names)), threads)
    for w, fmt, x, out in zip(weights, formats, stood_for, products, strict=True):
        expected = x @ blocks.decode(w, fmt).astype(np.float64).T
        assert (np.abs(out - expected) <= 5e-7 * (np.abs(x) @ kit.reach(w, fmt).T + 8)).all()
    twin = np.array([naive.silu_gate(g.clip(-700), u) for g, u in zip(*products, strict=True)])
    np.testing.assert_allclose(h, twin, rtol=2e-6, atol=1e-30)
    if quantized:
        check_codes(isa, h, 1, parts)
