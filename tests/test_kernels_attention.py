"""Rotary embedding into the cache, and attention over it."""

import kernelcases as cases
import kernelkit as kit
import pytest

each_isa = pytest.mark.parametrize("isa", kit.ISAS)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
@each_isa
def test_rope(isa: str, halves: bool, norm: bool) -> None:
    """Neighbours or halves; all of a head or part of it; heads that are no whole vectors."""
    for dim, turned in ((64, 64), (64, 32), (20, 20), (80, 20), (2, 2)):
        for tokens, position, threads in ((1, 0, 1), (1, 37, 3), (5, 14, 2), (20, 3, 5)):
            shape = {"dim": dim, "turned": turned, "halves": halves, "norm": norm}
            cases.rope(isa, tokens=tokens, position=position, threads=threads, **shape)


@each_isa
def test_rope_of_single_heads(isa: str) -> None:
    shape = {"dim": 32, "turned": 16, "halves": True, "threads": 2}
    cases.rope(isa, tokens=3, position=2, heads=1, kv_heads=1, **shape)
    cases.rope(isa, tokens=3, position=2, heads=6, kv_heads=6, **shape)


@pytest.mark.parametrize("share", [1, 2, 3, 4])
@pytest.mark.parametrize("queries", kit.QUERIES)
@each_isa
def test_attend(isa: str, queries: int, share: int) -> None:
    """Query tiles that cut a token's heads apart or join tokens; contexts of part of a vector, of
    exactly one step of 128 keys, and of several.
    """
    for tokens, position, dim, threads in (
        (1, 0, 64, 1),
        (1, 126, 64, 2),
        (1, 127, 20, 1),
        (1, 128, 32, 3),
        (20, 0, 32, 5),
        (9, 120, 16, 2),
        (3, 254, 80, 1),
        (17, 300, 8, 3),
    ):
        shape = {"dim": dim, "heads": 2 * share, "kv_heads": 2, "threads": threads}
        cases.attend(isa, queries, tokens=tokens, position=position, **shape)


@each_isa
def test_attend_to_one_of_many(isa: str) -> None:
    """Scores far apart: the softmax of a later step replaces what an earlier one summed."""
    for queries in kit.QUERIES:
        shape = {"dim": 64, "heads": 4, "kv_heads": 1, "scale": 60.0}
        cases.attend(isa, queries, tokens=3, position=290, **shape)
