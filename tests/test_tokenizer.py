"""Tokenizers: the original tokenizers' ids, broken vocabularies, special tokens, streaming."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import bpe_metadata, load, spm_metadata, token

from edgeq.blocks import get
from edgeq.errors import FormatError, TokenizerError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf
from edgeq.tokenizer import Tokenizer, load_tokenizer
from edgeq.vocab import BYTE_TO_CHAR

VOCABULARIES = ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2", "starcoder"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def reference(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Path, Tokenizer]:
    path = shared_data / "vocab" / f"ggml-vocab-{request.param}.gguf"
    with open_gguf(path) as gguf:
        return path, load_tokenizer(gguf)


def test_ids_equal_those_of_the_original_tokenizer(reference: tuple[Path, Tokenizer]) -> None:
    path, tokenizer = reference
    # newline="": the inputs hold carriage returns, which are theirs.
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{path}.out").read_text().splitlines()
    expected = [list(map(int, line.split())) for line in lines]
    assert len(texts) == len(expected) == 46
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


@pytest.mark.parametrize("kind", ["llama-spm", "llama-bpe"])
def test_a_megabyte_of_one_thing_is_quick(shared_data: Path, kind: str) -> None:
    with open_gguf(shared_data / "vocab" / f"ggml-vocab-{kind}.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    for unit in ("a", " ", "^"):
        text = unit * (1_000_000 // len(unit))
        start = time.process_time()
        ids = tokenizer.encode(text, special=True)
        assert time.process_time() - start < 2
        assert tokenizer.decode(ids) == text


def test_tiny_home_ids(shared_data: Path) -> None:
    home = shared_data / "tiny-home"
    with open_gguf(home / "files_from_llama_cpp" / "Q4_K_M.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    golden = json.loads((home / "golden.json").read_text())["tokens"]
    assert len(golden) > 3
    assert {t: tokenizer.encode(t, special=True, bos=True) for t in golden} == golden
    assert {t: tokenizer.decode(ids, special=True) for t, ids in golden.items()} == {
        text: "<s>" + text for text in golden
    }
    assert tokenizer.eog_ids == {2, 6}


def test_a_vocabulary_survives_a_file(tmp_path: Path) -> None:
    metadata = {f"tokenizer.ggml.{k}": v for k, v in spm_metadata().items()}
    path = tmp_path / "vocab.gguf"
    spec = TensorSpec("x", (1, 32), get("F32"))
    with GgufWriter(path, {"general.architecture": "none", **metadata}, [spec]) as writer:
        writer.write("x", np.zeros((1, 32), np.float32))
    with open_gguf(path) as gguf:
        stored = load_tokenizer(gguf)
    assert stored.encode("ab é🦙") == load(spm_metadata()).encode("ab é🦙") != []


# --- text and ids ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
@given(text=st.text(alphabet=st.one_of(st.sampled_from("ab <|end>\n\0é\u0301"), st.characters())))
def test_any_text_comes_back(make: Any, text: str) -> None:
    tokenizer = load(make(pre="gpt-2"))
    text = text.replace("▁", "_")  # the one character that SentencePiece takes for another
    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_prefers_higher_scores() -> None:
    metadata = spm_metadata(add_space_prefix=False)
    tokenizer = load(metadata)
    ids = tokenizer.encode("aab ab")
    assert [tokenizer.piece(i) for i in ids] == [b"a", b"ab", b" ab"]
    assert load(spm_metadata()).encode("ab") == [token(metadata, "▁ab")]


def test_empty_text_has_no_ids_but_bos() -> None:
    tokenizer = load(spm_metadata())
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", bos=True) == [1]
    assert load(spm_metadata(add_bos_token=False)).encode("", bos=True) == []
    assert load(bpe_metadata()).encode("", bos=True) == []


def test_lone_surrogates_are_replaced() -> None:
    for tokenizer in (load(spm_metadata()), load(bpe_metadata())):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("\ud83e\udd99")) == "🦙"


def test_text_is_composed_where_the_original_tokenizer_does() -> None:
    qwen, gpt = load(bpe_metadata()), load(bpe_metadata(pre="gpt-2"))
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert gpt.encode("e\u0301") != gpt.encode("é")


@pytest.mark.parametrize(
    ("pre", "words"), [("llama-bpe", ["123", "45"]), ("qwen2", ["1", "2", "3", "4", "5"])]
)
def test_whole_words_and_runs_of_digits(pre: str, words: list[str]) -> None:
    """A word that is a token is taken although no merges lead to it; digits stand in threes."""
    tokens = [*BYTE_TO_CHAR, "123", "45"]
    metadata = bpe_metadata(pre=pre, tokens=tokens, token_type=None, merges=[], eos_token_id=0)
    tokenizer = load({**metadata, "bos_token_id": 0})
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12345")] == words


def test_aliases_name_the_same_pretokenizer() -> None:
    changes = {"tokens": [*BYTE_TO_CHAR, "12"], "token_type": None, "merges": ["1 2"]}
    ids = {
        pre: load(bpe_metadata(pre=pre, **changes)).encode("It's 12\r\n x")
        for pre in ("deepseek-r1-qwen", "qwen2", "gpt-2")
    }
    assert ids["deepseek-r1-qwen"] == ids["qwen2"] != ids["gpt-2"]


# --- special tokens -------------------------------------------------------------------------


def test_control_tokens_come_from_text_only_when_asked() -> None:
    for make, text in ((spm_metadata, "<|end|>"), (bpe_metadata, "<|im_end|>")):
        metadata = make()
        tokenizer, control = load(metadata), token(make(), text)
        plain = tokenizer.encode(f"a{text}b")
        assert control not in plain
        assert tokenizer.decode(plain) == f"a{text}b"
        special = tokenizer.encode(f"a{text}b", special=True)
        assert special.count(control) == 1
        assert tokenizer.decode(special) in ("ab", "a b")
        assert text in tokenizer.decode(special, special=True)
        assert control in tokenizer.special_ids


def test_user_defined_tokens_always_match() -> None:
    for make, text in ((spm_metadata, "<think>"), (bpe_metadata, "<|fun|>")):
        tokenizer, wanted = load(make()), token(make(), text)
        ids = tokenizer.encode(f"a{text}b{text}")
        assert ids.count(wanted) == 2
        assert tokenizer.decode([wanted]) == text
        assert wanted not in tokenizer.special_ids


def test_longer_special_tokens_go_first() -> None:
    metadata = spm_metadata()
    metadata["tokens"][3:5] = ["<s>>", "<s>>>"]
    tokenizer = load(metadata)
    assert tokenizer.partition("x<s>>>>", special=True) == ["x", 4, ">"]
    assert tokenizer.partition("<s>> <s>", special=True) == [3, " ", 1]


def test_ends_of_an_answer() -> None:
    metadata = spm_metadata()
    tokenizer = load(metadata)
    assert tokenizer.eog_ids == {2, token(metadata, "<|end|>")}
    eot = load(spm_metadata(eot_token_id=9, eom_token_id=10))
    assert eot.eog_ids == tokenizer.eog_ids | {9, 10}


def test_an_end_declared_as_text_is_still_a_control_token() -> None:
    metadata = bpe_metadata()
    metadata["token_type"][:] = 1
    tokenizer = load({**metadata, "eos_token_id": 0})
    end = token(metadata, "<|im_end|>")
    assert end in tokenizer.eog_ids
    assert end not in tokenizer.encode("<|im_end|>")


def test_defaults_of_the_formats() -> None:
    spm = load(spm_metadata(bos_token_id=None, eos_token_id=None))
    assert (spm.bos_id, spm.eos_id, spm.add_bos, spm.add_eos) == (1, 2, True, False)
    bpe = load(bpe_metadata(pre="gpt-2"))
    assert (bpe.bos_id, bpe.add_bos) == (None, False)
    assert load(bpe_metadata(pre="llama-bpe", bos_token_id=7)).add_bos


# --- odd vocabularies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens: missing"),
        ({"tokens": []}, "0 entries"),
        ({"tokens": np.arange(9)}, "array of strings"),
        ({"scores": None}, "scores: missing"),
        ({"scores": np.zeros(3, np.float32)}, "3 entries"),
        ({"scores": np.zeros(999, np.uint8)}, "type uint8: expected float32"),
        ({"scores": np.full(999, np.nan, np.float32)}, r"scores\[0\]: nan"),
        ({"scores": np.full(999, np.inf, np.float32)}, r"scores\[0\]: inf"),
        ({"token_type": np.zeros(3, np.int32)}, "3 entries"),
        ({"token_type": np.zeros(999, np.int8)}, "type int8: expected int32"),
        ({"token_type": np.zeros(999, np.float32)}, "type float32"),
        ({"bos_token_id": 9999, "add_bos_token": True}, "no bos_token_id"),
        ({"bos_token_id": "1"}, "'1': expected int"),
        ({"bos_token_id": True}, "True: expected int"),
        ({"add_bos_token": 1}, "1: expected bool"),
        ({"model": "bert"}, "'bert': expected one of gpt2, llama"),
        ({"model": 3}, "3: expected one of"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, TokenizerError), match=message) as caught:
        load(spm_metadata(**changes))
    assert str(caught.value).startswith("x.gguf: tokenizer.ggml.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["<0x-1>", "<0xGG>", "<0x1>", "<0x041>", "<0x٤١>", "<0x_1>", "x"])
def test_bad_byte_tokens_are_refused(text: str) -> None:
    metadata = spm_metadata()
    metadata["tokens"][6] = text
    with pytest.raises(TokenizerError, match="expected <0x00> to <0xFF>"):
        load(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": None}, "merges: missing"),
        ({"merges": np.zeros(3, np.uint8)}, "array of strings"),
        ({"merges": ["ab"]}, "'ab': expected two parts"),
        ({"merges": [" b"]}, "expected two parts"),
        ({"merges": ["a "]}, "expected two parts"),
        ({"pre": None}, "pre: '': expected one of"),
        ({"pre": "surprise"}, "'surprise': expected one of .*gpt-2, .*llama-bpe, .*qwen2"),
    ],
)
def test_bad_merges_and_pretokenizers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, TokenizerError), match=message):
        load(bpe_metadata(**changes))


def test_merges_of_unknown_texts_are_left_out() -> None:
    odd = ["a b", "q zz", "zz q", "b a", "a b", "Ġ ab"]
    tokenizer = load(bpe_metadata(merges=odd))
    assert "3 of 6" in tokenizer.warnings[0]
    assert tokenizer.encode(" ab") == [token(bpe_metadata(), "Ġab")]


def test_equal_tokens_use_the_lowest_id() -> None:
    metadata = spm_metadata()
    metadata["tokens"][-1] = "ab"
    tokenizer = load(metadata)
    assert "1 texts occur twice" in tokenizer.warnings[0]
    assert tokenizer.encode("bab")[-1] == metadata["tokens"].index("ab")
    metadata = bpe_metadata()
    metadata["tokens"][-3] = "ab"
    assert load(metadata).encode("ab") == [metadata["tokens"].index("ab")]


def test_odd_types_and_long_arrays_are_warned_about() -> None:
    metadata = spm_metadata(scores=np.zeros(999, np.float32))
    metadata["token_type"][-2:] = [7, -5]
    warnings = " ".join(load(metadata).warnings)
    assert "2 unknown types" in warnings
    assert "999 entries" in warnings


@pytest.mark.parametrize("bad", [9999, -1, 2**31])
def test_special_ids_outside_the_vocabulary_are_ignored(bad: int) -> None:
    tokenizer = load(spm_metadata(eos_token_id=bad, eot_token_id=bad, bos_token_id=bad))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, None, False)
    assert len([w for w in tokenizer.warnings if str(bad) in w]) == 3
    assert max(tokenizer.eog_ids) < tokenizer.n_vocab


def test_no_end_at_all_is_warned_about() -> None:
    tokenizer = load(
        bpe_metadata(tokens=[*BYTE_TO_CHAR], token_type=None, eos_token_id=None, merges=[])
    )
    assert tokenizer.eog_ids == frozenset()
    assert "no end-of-text token" in tokenizer.warnings[-1]


def test_missing_bytes_become_unknown() -> None:
    metadata = spm_metadata()
    for value in range(0x80, 0x100):
        metadata["tokens"][6 + value] = f"w{value}"
    metadata["token_type"][6 + 0x80 : 6 + 0x100] = 1
    assert load(metadata).encode("a漢")[1:] == [0, 0, 0]
    assert load({**metadata, "unknown_token_id": 2**32 - 1}).encode("漢a")[1:] == load(
        spm_metadata(add_space_prefix=False)
    ).encode("a")


@pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
def test_strange_tokens_are_harmless(make: Any) -> None:
    metadata = make(pre="gpt-2")
    strange = ["", "z" * 1_000_000, "\udcff\udcfe", "\0", "\x017", "\x01unknown"]
    metadata["tokens"] += strange
    for key in ("scores", "token_type"):
        if key in metadata:
            metadata[key] = np.append(metadata[key], np.ones(len(strange), metadata[key].dtype))
    tokenizer = load(metadata)
    assert tokenizer.decode(tokenizer.encode("ab\0\x017z é")) == "ab\0\x017z é"
    at = metadata["tokens"].index("\udcff\udcfe")
    assert tokenizer.piece(at) == b"\xff\xfe"
    assert tokenizer.decode([at]) == "\ufffd\ufffd"


def test_ids_outside_the_vocabulary_are_refused() -> None:
    tokenizer = load(spm_metadata())
    for bad in (-1, tokenizer.n_vocab, 2**40):
        with pytest.raises(TokenizerError, match=f"token {bad}: expected an id from 0 to"):
            tokenizer.decode([5, bad])
    assert tokenizer.decode(np.array([token(spm_metadata(), "ab")])) == "ab"


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_a_file_without_vocabulary_loads(model: str | None) -> None:
    tokenizer = load({"model": model})
    assert tokenizer.eog_ids == frozenset()
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(TokenizerError, match="it holds no tokenizer: give token ids"):
            use()


# --- streaming ------------------------------------------------------------------------------


@given(text=st.text(max_size=20))
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    tokenizer = load(spm_metadata())
    text = text.replace("▁", "_").replace("\ufffd", "").encode("utf-8", "ignore").decode()
    decoder = tokenizer.decoder()
    shown = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(shown) == text
    assert decoder.flush() == ""


def test_what_is_cut_off_is_replaced() -> None:
    tokenizer = load(spm_metadata())
    decoder = tokenizer.decoder()
    llama = tokenizer.encode("🦙")
    assert [decoder.push(i) for i in llama[:-1]] == [""] * 4
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert tokenizer.decode(llama[1:3] + tokenizer.encode("é")[1:]) == "\ufffdé"


def test_only_the_added_space_is_dropped() -> None:
    tokenizer = load(spm_metadata())
    ids = tokenizer.encode("  ab ab")
    assert tokenizer.decode(ids) == "  ab ab"
    decoder = tokenizer.decoder()
    assert [decoder.push(i) for i in (1, token(spm_metadata(), "▁ab"))] == ["", "ab"]
    later = tokenizer.decoder(continues=True)
    assert later.push(token(spm_metadata(), "▁ab")) == " ab"
    assert load(spm_metadata(add_space_prefix=False)).decode(ids) == "   ab ab"
