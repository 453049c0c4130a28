"""The engine on the small trained model: prompts, cache, generation, errors."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import golden
import numpy as np
import pytest

import edgeq
from edgeq.engine import Model
from edgeq.errors import KernelError, ModelError, RequestError, ResourceError

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edgeq.convert(EXAMPLE, tmp_path_factory.mktemp("engine") / "tiny.gguf", "Q8_0")


@pytest.fixture(scope="module")
def loaded(path: Path):
    with edgeq.load(path, threads=2) as model:
        yield model


@pytest.fixture
def model(loaded: Model) -> Model:
    loaded.reset()
    return loaded


def test_it_answers(model: Model) -> None:
    assert "".join(model.chat(QUESTION, temperature=0)) == "Tokyo"
    stats = model.stats
    assert stats.finish == "stop"
    assert (stats.prompt_tokens, stats.generated_tokens) == (13, 5)
    assert stats.prompt_seconds > 0
    assert stats.generation_seconds > 0


def test_logits_equal_the_reference(shared_data: Path, tmp_path: Path) -> None:
    ids, expected = golden.read(shared_data / "tiny-home" / "golden_logits.safetensors")
    with edgeq.load(edgeq.convert(EXAMPLE, tmp_path / "f16.gguf", "F16")) as model:
        assert golden.distance(model.logits(ids), expected) < 2e-3


def test_a_conversation_reuses_the_cache(model: Model) -> None:
    first = "".join(model.chat(QUESTION, temperature=0))
    again = [*QUESTION, {"role": "assistant", "content": first}, *QUESTION]
    second = "".join(model.chat(again, temperature=0))
    assert model.stats.cached_tokens >= 13
    model.reset()
    assert "".join(model.chat(again, temperature=0)) == second
    assert model.stats.cached_tokens == 0


def test_the_same_seed_gives_the_same_text(model: Model) -> None:
    texts = ["".join(model.generate("The", max_tokens=20, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_has_the_length_asked_for(model: Model) -> None:
    for n in (0, 1, 5):
        "".join(model.generate("The", max_tokens=n, temperature=0))
        assert model.stats.generated_tokens == n
        assert model.stats.finish == "length"


def test_stop_texts_end_the_answer_and_are_not_shown(model: Model) -> None:
    whole = "".join(model.generate("The", max_tokens=30, temperature=0))
    stop = whole[8:12]
    pieces = list(model.generate("The", max_tokens=30, temperature=0, stop=[stop]))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert model.stats.finish == "stop"
    with pytest.raises(RequestError, match="stop"):
        model.generate("The", stop=[""])


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "seed": 3}])
def test_speculation_does_not_change_the_answer(model: Model, sampling: dict) -> None:
    prompts = ["one two three four five six\n" * 3, "The device", "<|user|>Copy: a b c d<|end|>"]
    for prompt in prompts:
        texts = []
        for draft in (False, True):
            model.reset()
            pieces = model.generate(prompt, max_tokens=80, draft_ngram=draft, **sampling)
            texts.append(("".join(pieces), model.stats.finish, len(model.seen)))
        assert texts[0] == texts[1]
        assert 0 <= model.stats.accepted_tokens <= model.stats.drafted_tokens


def test_speculation_finds_repeated_text(model: Model) -> None:
    list(model.generate("one two three\n" * 8, max_tokens=60, temperature=0, draft_ngram=True))
    assert model.stats.accepted_tokens > 20


def test_few_tokens_at_once_are_bit_for_bit_single_steps(model: Model) -> None:
    ids = model.tokenize("The device is switched on when it is warm")[:7]
    together = model.step(ids).copy()
    model.reset()
    single = [model.step([i])[0].copy() for i in ids]
    np.testing.assert_array_equal(together, single)


def test_the_context_ends_the_answer(path: Path) -> None:
    with edgeq.load(path, ctx=20) as model:
        assert "".join(model.generate([1, 5, 9], temperature=0, repeat_penalty=1.5))
        assert model.stats.finish in ("context", "stop")
        list(model.generate([300] * 20, temperature=0))
        assert (model.stats.finish, model.stats.generated_tokens) == ("context", 1)
        with pytest.raises(RequestError, match=r"21 tokens, context of 20 .*context_length_exceed"):
            list(model.generate([5] * 21))


@pytest.mark.parametrize("ids", [[-1], [4096], [2**40], []])
def test_ids_are_checked(model: Model, ids: list[int]) -> None:
    with pytest.raises(RequestError):
        list(model.generate(ids))
    with pytest.raises(RequestError):
        model.logits(ids)


def test_settings_are_checked(path: Path, model: Model) -> None:
    with pytest.raises(RequestError, match="temperature"):
        model.generate("The", temperature=-1)
    for options in ({"threads": 0}, {"threads_batch": 257}, {"ctx": 0}, {"ctx": 257}, {"kv": "q8"}):
        with pytest.raises(RequestError):
            edgeq.load(path, **options)


@pytest.mark.parametrize(
    "options", [{"max_tokens": -2}, {"max_tokens": 2.5}, {"stop": 5}, {"stop": ["a", 1]}]
)
def test_options_are_checked(model: Model, options: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        model.generate("The", **options)


def test_a_cache_that_does_not_fit_is_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setattr("edgeq.memory.available", lambda: 1 << 19)
    with pytest.raises(ResourceError, match=r"context 256 needs 1 MiB, 0 MiB .* use -c 128 or"):
        edgeq.load(path, ctx=256)
    free = path.stat().st_size + (1 << 19)
    monkeypatch.setattr("edgeq.memory.available", lambda: free)
    with edgeq.load(path) as model:  # without a wish: half of what is free beside the weights
        assert model.ctx == 64
        assert model.warnings == ["context of 64 instead of 256: memory is short"]


def test_nothing_is_written_past_the_cache(path: Path) -> None:
    with edgeq.load(path, ctx=16) as model:
        for ids in ([5] * 17, [4096], [-1]):
            with pytest.raises(RequestError):
                model.feed(ids)
        for ids in ([4096], [-1], [5] * 8, []):
            with pytest.raises(RequestError):
                model.step(ids)
        model.feed([5] * 16)
        with pytest.raises(RequestError, match="17 tokens: the context holds 16"):
            model.feed([5])


def test_a_closed_model_says_so(path: Path) -> None:
    for threads in (1, 2):
        with edgeq.load(path, threads=threads) as model:
            answer = model.generate("The")
        with pytest.raises(ResourceError, match="closed"):
            next(answer)


def test_a_second_request_ends_the_first_answer(model: Model) -> None:
    first, second = (model.generate("The", temperature=0, max_tokens=9) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(RequestError, match="another request"):
        list(first)
    assert list(second)


def test_a_file_that_changed_is_refused(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with edgeq.load(copy) as model:
        copy.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(ResourceError, match="changed"):
            list(model.generate("The"))


def test_ctrl_c_ends_a_long_prompt_at_once(path: Path, monkeypatch) -> None:
    with edgeq.load(path, threads=2) as model:
        expected = model.feed(list(range(7, 207)), logits=True).copy()
        for moment in (0, 1, 2):
            model.reset()
            with interrupt_after(monkeypatch, moment), pytest.raises(KeyboardInterrupt):
                model.feed(list(range(7, 207)), logits=True)
            model.reset()
            again = model.feed(list(range(7, 207)), logits=True)
            np.testing.assert_array_equal(again, expected)


@contextlib.contextmanager
def interrupt_after(monkeypatch, moment: int):
    """KeyboardInterrupt in the thread that waits for a program, at one of a few moments."""
    from edgeq.kernels import program

    wait, main, seen = threading.Event.wait, threading.main_thread(), []

    def interrupted(self, timeout=None):
        """0: while the thread that runs the program starts; else some time after it did."""
        if threading.current_thread() is main:
            seen.append(self)
            if len(seen) == (1 if moment == 0 else 2):
                wait(self, moment / 1000)
                raise KeyboardInterrupt
        return wait(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(program.threading.Event, "wait", interrupted)
        yield


def test_logits_that_are_no_numbers_are_an_error(model: Model, monkeypatch) -> None:
    monkeypatch.setattr(model._passes.net, "logits", np.full_like(model._passes.net.logits, np.nan))
    with pytest.raises(ModelError, match="logits"):
        list(model.generate("The", max_tokens=3))


def test_bytes_of_one_character_come_together(model: Model) -> None:
    ids = model.tokenize("漢字")
    assert len(ids) > 2  # byte pieces
    assert model.detokenize(ids) == "漢字"


def test_many_lives(path: Path) -> None:
    for threads in (1, 2, 4):
        with edgeq.load(path, threads=threads) as model:
            assert "".join(model.chat(QUESTION, temperature=0)) == "Tokyo"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni", "neon", "dotprod"])
def test_instruction_sets_agree(path: Path, isa: str) -> None:
    from edgeq.kernels import isa as isas

    if isa not in {m.NAME for m in isas.available()}:
        pytest.skip(f"this CPU has no {isa}")
    code = (
        "import sys, edgeq\n"
        "with edgeq.load(sys.argv[1]) as m:\n"
        "    print(m.isa, *m.chat([{'role': 'user', 'content': sys.argv[2]}], temperature=0))\n"
        "assert 'numba' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(path), "hall: window on"]
    env = {**os.environ, "EDGEQ_ISA": isa}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.split(None, 1)[0] == isa
    assert '"room":"hall"' in out.replace(" ", "")


def test_an_unknown_instruction_set_is_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EDGEQ_ISA", "mmx")
    with pytest.raises(KernelError, match="EDGEQ_ISA: 'mmx'"):
        edgeq.load(path)
