"""Speed measurements: what they count, and the limits they are compared with."""

from pathlib import Path

import pytest

from edgeq import bench, convert, limits
from edgeq.errors import RequestError

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(EXAMPLE, tmp_path_factory.mktemp("bench") / "tiny.gguf", "Q8_0")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "DOT_STEPS", 1 << 12)
    monkeypatch.setattr(limits, "_file", lambda threads: Path("/nonexistent/limits"))


def test_rows_agree_with_themselves(path: Path) -> None:
    rows = bench.run(path, prompts=[16], gens=[4], threads=2, reps=2, depth=8)
    assert [(r.n_prompt, r.n_gen, r.n_depth, r.n_threads) for r in rows] == [
        (16, 0, 8, 2),
        (0, 4, 8, 2),
    ]
    for row in rows:
        assert len(row.samples_ns) == 2
        tokens = row.n_prompt + row.n_gen
        assert row.samples_ts[0] == pytest.approx(tokens * 1e9 / row.samples_ns[0])
        assert row.avg_ts == pytest.approx(sum(row.samples_ts) / 2)
        assert row.limit > 0
    # 8 layers of 256 x (512 + 256 + 3 * 768) weights; generation also reads the output matrix.
    assert rows[0].rate == pytest.approx(rows[0].avg_ts * 8 * 256 * 3072 / 1e9)
    weights = 8 * 256 * 3072 + 4096 * 256
    assert rows[1].rate == pytest.approx(rows[1].avg_ts * weights * 34 / 32 / 1e9)


def test_the_usual_tests_are_cut_to_the_context(path: Path) -> None:
    rows = bench.run(path, threads=2, reps=1, depth=240)
    assert [(r.n_prompt, r.n_gen) for r in rows] == [(16, 0), (0, 16)]


def test_a_test_must_fit_the_context(path: Path) -> None:
    with pytest.raises(RequestError, match="context length 256: a test of 300 tokens"):
        bench.run(path, prompts=[300])
    with pytest.raises(RequestError, match="context length 256: a test of 257 tokens"):
        bench.run(path, depth=256)
    with pytest.raises(RequestError, match="no tests"):
        bench.run(path, prompts=[], gens=[])


def test_limits_are_positive_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "_file", lambda threads: tmp_path / f"limits-{threads}.json")
    first = limits.measured(1, 2)
    assert first.read_gbs > 0.1
    assert first.dot_gmacs > 0.1
    assert limits.measured(1, 2) == first  # read back, not measured again
    (tmp_path / "limits-1.json").write_text("{")
    assert limits.measured(1, 2).threads == 1
