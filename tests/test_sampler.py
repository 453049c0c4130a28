"""Sampling steps against their slow twins, and the settings around them."""

import math

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edgeq import sampler
from edgeq.errors import FormatError, ModelError, RequestError
from edgeq.sampler import Candidates, Sampler, everything

VOCABULARIES = [1, 2, 63, 64, 1000]


def random_logits(n: int, seed: int = 0) -> np.ndarray:
    """Rounded to quarters, so that equal logits are common."""
    return (np.random.default_rng(seed).normal(0, 3, n).astype(np.float32) * 4).round() / 4


def pairs(c: Candidates) -> naive.Pairs:
    return [(int(i), float(x)) for i, x in zip(c.ids, c.logits, strict=True)]


@pytest.mark.parametrize("n", VOCABULARIES)
@pytest.mark.parametrize(
    ("repeat", "presence", "frequency"), [(1.3, 0, 0), (1, 0.5, 0), (1, 0, 0.25), (0.8, -1, 2)]
)
def test_penalize(n: int, repeat: float, presence: float, frequency: float) -> None:
    logits = random_logits(n)
    before = logits.copy()
    history = np.random.default_rng(1).integers(0, n, 30).tolist()
    got = sampler.penalize(logits, history, repeat=repeat, presence=presence, frequency=frequency)
    want = naive.penalize(logits.tolist(), history, repeat, presence, frequency)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("n", VOCABULARIES)
@pytest.mark.parametrize("k", [0, 1, 2, 15, 40, 999, 5000])
def test_top_k(n: int, k: int) -> None:
    c = everything(random_logits(n))
    assert pairs(sampler.top_k(c, k)) == naive.top_k(pairs(c), k)


def test_top_k_of_equal_logits_keeps_the_lowest_ids() -> None:
    flat = np.zeros(10_000, np.float32)
    assert sampler.top_k(everything(flat), 3).ids.tolist() == [0, 1, 2]
    flat[9_000] = 1
    assert sampler.top_k(everything(flat), 3).ids.tolist() == [9_000, 0, 1]


@pytest.mark.parametrize("n", VOCABULARIES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.9999, 1.0])
def test_top_p(n: int, p: float) -> None:
    for seed in range(5):
        c = everything(random_logits(n, seed))
        assert pairs(sampler.top_p(c, p)) == naive.top_p(pairs(c), p)


@pytest.mark.parametrize("n", VOCABULARIES)
@pytest.mark.parametrize("p", [0.0, 0.01, 0.05, 0.5, 1.0])
def test_min_p(n: int, p: float) -> None:
    c = everything(random_logits(n))
    assert pairs(sampler.min_p(c, p)) == naive.min_p(pairs(c), p)


@pytest.mark.parametrize("t", [0.3, 1.0, 2.5])
def test_temperature_and_draw(t: float) -> None:
    c = everything(random_logits(50))
    for u in np.random.default_rng(2).random(200):
        got = sampler.draw(sampler.temperature(c, t), u)
        assert got == naive.draw(naive.temperature(pairs(c), t), u)


def test_draws_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    state = Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3).start()
    counts = np.bincount([state.sample(logits, []) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2], atol=0.03)


def test_chain_order_is_penalties_top_k_top_p_min_p_temperature() -> None:
    logits, history = random_logits(500), [3, 3, 9] * 40
    settings = Sampler(1.7, 30, 0.8, 0.1, 1.2, 10, 0.3, 0.2, seed=11)
    draws = np.random.default_rng(11).random(50)
    state = settings.start()
    for u in draws:
        left = list(enumerate(naive.penalize(logits.tolist(), history[-10:], 1.2, 0.3, 0.2)))
        left = naive.min_p(naive.top_p(naive.top_k(left, 30), 0.8), 0.1)
        assert state.sample(logits, history) == naive.draw(naive.temperature(left, 1.7), u)


def test_same_seed_same_tokens_and_no_seed_differs() -> None:
    logits = random_logits(1000)

    def tokens(seed: int | None) -> list[int]:
        state = Sampler(temperature=2.0, min_p=0.0, seed=seed).start()
        return [state.sample(logits, []) for _ in range(40)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([0, 5, 1, 5], np.float32)
    assert Sampler(temperature=0.0).start().sample(logits, []) == 1
    assert Sampler(temperature=0.0, presence_penalty=1.0).start().sample(logits, [1]) == 3


@pytest.mark.parametrize(("last_n", "want"), [(0, 1), (1, 1), (2, 0), (-1, 0)])
def test_penalties_look_back_repeat_last_n_tokens(last_n: int, want: int) -> None:
    state = Sampler(temperature=0.0, presence_penalty=3.0, repeat_last_n=last_n).start()
    assert state.sample(np.array([4, 5, 0], np.float32), [1, 2]) == want


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("settings", [Sampler(), Sampler(temperature=0.0), Sampler(top_k=0)])
def test_unusable_logits_are_one_clear_error(value: float, settings: Sampler) -> None:
    with pytest.raises(ModelError, match=r"^logits: found (NaN|only -inf|\+inf): .*--verify"):
        settings.start().sample(np.full(100, value, np.float32), [1, 2])


def test_one_nan_is_an_error_and_masked_tokens_are_not() -> None:
    logits = random_logits(100)
    logits[50] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        Sampler().start().sample(logits, [])
    logits[:] = -math.inf
    logits[70] = -2
    assert Sampler(temperature=100.0, top_k=0, top_p=1.0).start().sample(logits, []) == 70


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="shape"):
        Sampler().start().sample(np.zeros(shape, np.float32), [])


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=80),
    st.builds(
        Sampler,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 100),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        repeat_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-100, 100),
        seed=st.integers(0, 9),
    ),
)
def test_any_logits_give_a_possible_token_or_a_model_error(
    values: list[float], settings: Sampler
) -> None:
    logits = np.array(values, np.float32)
    try:
        token = settings.start().sample(logits, [0])
    except ModelError:
        assert not (np.isfinite(logits).all() and np.abs(logits).max() < 1e30)
    else:
        assert logits[token] > -math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", 1e9),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -5),
        ("top_k", 2**40),
        ("top_k", 1.5),
        ("top_p", -1.0),
        ("top_p", 2.0),
        ("min_p", 1.5),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("seed", -1),
        ("seed", 2**70),
        ("seed", 0.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} .*: expected"):
        Sampler(**{name: value}).start()


def test_file_overrides_defaults_and_given_overrides_the_file() -> None:
    stored = {
        "general.sampling.temp": np.float32(0.25),
        "general.sampling.top_k": 7,
        "general.sampling.top_p": 0.5,
        "general.sampling.min_p": 0.125,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.penalty_last_n": -1,
        "general.sampling.mirostat": 2,
    }
    assert Sampler.from_metadata({}) == Sampler()
    assert Sampler.from_metadata(stored) == Sampler(0.25, 7, 0.5, 0.125, 1.5, -1)
    assert Sampler.from_metadata(stored, temperature=0.0, top_k=None, seed=4) == Sampler(
        0.0, 7, 0.5, 0.125, 1.5, -1, seed=4
    )
    assert Sampler.from_metadata({"general.sampling.top_k": -1}).top_k == 0


def test_unusable_stored_setting_names_its_key_and_can_be_overridden() -> None:
    stored = {"general.sampling.temp": "warm"}
    with pytest.raises(FormatError, match=r"general\.sampling\.temp 'warm': expected"):
        Sampler.from_metadata(stored)
    assert Sampler.from_metadata(stored, temperature=1.0).temperature == 1.0
    with pytest.raises(RequestError, match="unknown setting 'heat'"):
        Sampler.from_metadata({}, heat=1)
