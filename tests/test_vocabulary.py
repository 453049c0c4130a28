"""Checkpoint tokenizers to GGUF metadata: llama.cpp's values, Hugging Face's ids, broken files."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgeq.checkpoint import open_checkpoint
from edgeq.checkpoint.vocabulary import vocabulary_metadata
from edgeq.errors import EdgeqError, FormatError, TokenizerError
from edgeq.gguf import open_gguf
from edgeq.tokenizer import load_tokenizer
from edgeq.vocab import PRETOKENIZERS

G = "tokenizer.ggml."


def equal(a: Any, b: Any) -> bool:
    same_kind = type(a) is type(b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
    return same_kind and np.array_equal(a, b)


def test_tiny_home_equals_what_llama_cpp_wrote(shared_data: Path) -> None:
    home = shared_data / "tiny-home"
    with open_checkpoint(home / "checkpoint") as hf:
        made = vocabulary_metadata(hf.path, hf.config, hf.generation_config)
    with open_gguf(home / "files_from_llama_cpp" / "Q4_K_M.gguf") as gguf:
        expected = {k: v for k, v in gguf.metadata.items() if k.startswith("tokenizer.")}
        assert len(expected) == 11
        assert {
            k for k in expected.keys() | made.keys() if not equal(expected.get(k), made.get(k))
        } == set()


# --- tokenizer.model ------------------------------------------------------------------------


def message(number: int, payload: bytes) -> bytes:
    assert len(payload) < 1 << 14
    return bytes([number << 3 | 2, len(payload) & 127 | 128, len(payload) >> 7]) + payload


def number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])


def piece(text: str, score: float = 0.0, kind: int | None = None) -> bytes:
    head = message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
    return message(1, head + (b"" if kind is None else number(3, kind)))


def spm_model(*pieces: bytes, kind: int = 2, prefix: int = 1) -> bytes:
    specials = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3)
    data = b"".join(piece(f"<0x{i:02X}>", 0, 6) for i in range(256))
    settings = message(2, number(3, kind)) + message(3, message(1, b"identity") + number(3, prefix))
    return specials + data + b"".join(pieces) + settings


def folder(path: Path, **files: Any) -> Path:
    """Folder with files: `tokenizer__json={...}` becomes tokenizer.json."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def convert(path: Path, config: dict[str, Any] | None = None, **generation: Any) -> dict[str, Any]:
    return vocabulary_metadata(path, config or {}, generation)


def load(metadata: dict[str, Any]) -> Any:
    return load_tokenizer(SimpleNamespace(path=Path("x.gguf"), metadata=metadata))


def test_sentencepiece_tables(tmp_path: Path) -> None:
    model = spm_model(piece("▁a", -1.5), piece("b", -2.25, 1), piece("x▁y", -3, 4))
    decoder = {
        "1": {"content": "<s>", "special": True},
        "262": {"content": "<|fun|>", "special": False},
        "263": {"content": "▁▁", "special": False},
        "999": {"content": "beyond", "special": False},
    }
    folder(
        tmp_path,
        tokenizer__model=model,
        added_tokens__json={"<pad>": 264, "<old>": 265},
        tokenizer_config__json={"added_tokens_decoder": decoder, "add_bos_token": True},
    )
    made = convert(tmp_path, {"vocab_size": 267, "bos_token_id": 1, "eos_token_id": 2})
    assert (made[G + "model"], made[G + "pre"]) == ("llama", "default")
    assert made[G + "tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert made[G + "tokens"][259:] == [
        *("▁a", "b", "x▁y", "<|fun|>", "  ", "<pad>", "<old>", "[PAD266]")
    ]
    assert made[G + "token_type"][259:].tolist() == [1, 1, 4, 3, 4, 4, 4, 5]
    assert made[G + "scores"][258:].tolist() == [0, -1.5, -2.25, -3, *[-1000] * 4, -10000]
    assert made[G + "token_type"][:5].tolist() == [2, 3, 3, 6, 6]
    assert made[G + "scores"][1] == -1000
    assert (made[G + "bos_token_id"], made[G + "eos_token_id"]) == (1, 2)
    assert made[G + "add_bos_token"] is True
    assert G + "add_space_prefix" not in made
    assert load(made).encode("a  ") == [259, 263]


def test_space_prefix_follows_the_model_then_the_configuration(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer__model=spm_model(piece("a"), prefix=0))
    assert convert(tmp_path)[G + "add_space_prefix"] is False
    folder(tmp_path, tokenizer_config__json={"add_prefix_space": True})
    assert convert(tmp_path)[G + "add_space_prefix"] is True


def test_truncated_models_are_refused(tmp_path: Path) -> None:
    # The model type comes last, and without it the type is another.
    whole = (
        piece("<unk>", 0, 2) + piece("a", 1) + message(3, number(3, 0)) + message(2, number(3, 2))
    )
    path = tmp_path / "tokenizer.model"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises((FormatError, TokenizerError), match=r"tokenizer\.model"):
            convert(tmp_path)
    path.write_bytes(whole)
    assert convert(tmp_path)[G + "tokens"] == ["<unk>", "a"]


def test_damaged_models_never_crash(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = np.frombuffer(spm_model(piece("a")), np.uint8)
    refused = 0
    for _ in range(200):
        data = whole.copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        folder(tmp_path, tokenizer__model=data.tobytes())
        try:
            load(convert(tmp_path))
        except EdgeqError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "0 pieces"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 20, "more than 70 bits"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "but 0 are left"),
        (b"\x08\x01", "expected a message"),
        (spm_model(kind=1), "model type 1: expected BPE"),
        (spm_model(piece("a", kind=7)), "type 7"),
        (spm_model(piece("a", float("nan"))), "score nan"),
        (message(1, message(1, b"\xff")), "not UTF-8"),
    ],
)
def test_bad_models_are_refused(tmp_path: Path, data: bytes, fact: str) -> None:
    folder(tmp_path, tokenizer__model=data)
    with pytest.raises((FormatError, TokenizerError), match=fact):
        convert(tmp_path)


# --- tokenizer.json -------------------------------------------------------------------------

TEXT = """It's 12345 o'clock; WE'LL see, don't we?  Two  spaces, tabs\t\tand\r\n\nlines.
naïve café – Größe: 漢字 and 🦙🦙 ½ ٣٤ e\u0301 'S' "quotes" ((())) x+=1;  trailing   """
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZERS[name].splits[0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name in ("llama-bpe", "qwen2")
}


def train(pre: str) -> tokenizers.Tokenizer:
    """A small Hugging Face tokenizer with added tokens."""
    hf = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    hf.pre_tokenizer = SPLITS[pre]
    hf.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        hf.normalizer = tokenizers.normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator([TEXT, TEXT[40:]], trainer)
    hf.add_special_tokens(["<|begin|>", "<|im_end|>"])
    hf.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return hf


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_ids_equal_those_of_hugging_face(tmp_path: Path, pre: str) -> None:
    hf = train(pre)
    hf.save(str(tmp_path / "tokenizer.json"))
    made = convert(tmp_path)
    assert (made[G + "model"], made[G + "pre"]) == ("gpt2", pre)
    ours = load(made)
    for text in (TEXT, TEXT[::-1], TEXT.upper(), TEXT + "<|im_end|>\n<think> " + TEXT[7:]):
        expected = hf.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == expected
    assert ours.decode(ours.encode(TEXT)) == (
        TEXT.replace("e\u0301", "é") if pre == "qwen2" else TEXT
    )
    n = hf.get_vocab_size()
    assert made[G + "token_type"][-4:].tolist() == [1, 3, 3, 4]
    assert len(made[G + "tokens"]) == n
    assert made[G + "add_bos_token"] is False


def bpe_json(**changes: Any) -> dict[str, Any]:
    table = json.loads(train("qwen2").to_str())
    model = changes.pop("model", {})
    return {**table, **changes, "model": {**table["model"], **model}}


def test_padding_and_names_of_special_tokens(tmp_path: Path) -> None:
    table = bpe_json()
    n = len(table["model"]["vocab"])
    settings = {
        "bos_token": {"content": "<|begin|>"},
        "eos_token": "<|im_end|>",
        "pad_token": "<think>",
        "add_bos_token": True,
        "add_prefix_space": False,
    }
    folder(tmp_path, tokenizer__json=table, tokenizer_config__json=settings)
    made = convert(tmp_path, {"vocab_size": n + 5, "eos_token_id": 3})
    first = table["added_tokens"][0]["id"]
    assert (made[G + "bos_token_id"], made[G + "eos_token_id"]) == (first, first + 1)
    assert made[G + "padding_token_id"] == first + 2
    assert made[G + "token_type"][first:].tolist() == [
        3,
        3,
        3,
        *[5] * (len(made[G + "tokens"]) - first - 3),
    ]
    assert made[G + "tokens"][-1] == f"[PAD{n + 4}]"
    assert (made[G + "add_bos_token"], made[G + "add_space_prefix"]) == (True, False)
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    folder(tmp_path, tokenizer_config__json=settings)
    assert G + "add_space_prefix" not in convert(tmp_path)


def test_the_post_processor_says_whether_bos_goes_first(tmp_path: Path) -> None:
    hf = train("llama-bpe")
    begin = hf.token_to_id("<|begin|>")
    hf.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A",
                pair="<|begin|> $A <|begin|>:1 $B:1",
                special_tokens=[("<|begin|>", begin)],
            ),
        ]
    )
    hf.save(str(tmp_path / "tokenizer.json"))
    folder(tmp_path, tokenizer_config__json={"bos_token": "<|begin|>", "eos_token": "<|im_end|>"})
    made = convert(tmp_path)
    assert (made[G + "add_bos_token"], made[G + "add_sep_token"]) == (True, False)
    assert load(made).encode("It's", bos=True) == hf.encode("It's").ids


def test_ends_from_the_generation_configuration(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer__json=bpe_json())
    made = convert(tmp_path, {}, eos_token_id=[7, 8, 10**9, True])
    assert (made[G + "eos_token_id"], made[G + "eot_token_id"]) == (7, 8)
    known = made[G + "tokens"].index("<|im_end|>")
    made = convert(tmp_path, {"eos_token_id": 7}, eos_token_id=[known, 7])
    assert made[G + "eos_token_id"] == 7
    assert G + "eot_token_id" not in made
    assert load(made).eog_ids == {7, known}


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"model": {"type": "WordPiece"}}, "'WordPiece': expected BPE"),
        ({"model": {"byte_fallback": True}}, "expected tokenizer.model"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "'</w>': not supported"),
        ({"model": {"ignore_merges": True}}, "ignore_merges with the splits of qwen2"),
        ({"model": {"vocab": {}}}, "vocab: empty"),
        ({"model": {"vocab": [1]}}, "vocab: expected a table"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "= 0: expected a unique id"),
        ({"model": {"vocab": {"a": -1}}}, "= -1: expected"),
        ({"model": {"vocab": {"a": 2**40}}}, "expected a unique id"),
        ({"model": {"vocab": {"a": True}}}, "= True: expected"),
        ({"model": {"vocab": {"a": 1.0}}}, "expected a unique id"),
        ({"model": {"vocab": {"\ud800": 0}}}, "not Unicode"),
        ({"model": {"merges": None}}, "merges: expected a list"),
        ({"model": {"merges": ["ab"]}}, "'ab': expected two texts"),
        ({"model": {"merges": [["a", ""]]}}, "expected two texts"),
        ({"model": {"merges": [["a", 1]]}}, "expected two texts"),
        ({"pre_tokenizer": None}, "expected tables"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "expected byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "not supported"),
        ({"normalizer": {"type": "Lowercase"}}, "expected none or NFC"),
        ({"added_tokens": {"a": 1}}, "added tokens: expected a list"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "added token -1"),
        ({"added_tokens": [{"id": 1}]}, "added token 1: expected an id and a content"),
        ({"added_tokens": ["x"]}, "added token None"),
    ],
)
def test_bad_tokenizer_json_is_refused(tmp_path: Path, changes: dict[str, Any], fact: str) -> None:
    folder(tmp_path, tokenizer__json=bpe_json(**changes))
    with pytest.raises((FormatError, TokenizerError), match=fact) as caught:
        convert(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_splits_are_never_compiled(tmp_path: Path) -> None:
    bomb = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    steps = [bomb, {"type": "ByteLevel", "use_regex": False}]
    folder(tmp_path, tokenizer__json=bpe_json(pre_tokenizer={"pretokenizers": steps}))
    with pytest.raises(TokenizerError, match=r"splits .*\(a\+\)\+.*known are gpt-2, llama-bpe"):
        convert(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b"[]", b""],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_bad_json_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    folder(tmp_path, tokenizer__json=bpe_json())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgeqError, match=name):
        convert(tmp_path)


def test_more_tokens_than_the_model_has_rows(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer__json=bpe_json())
    with pytest.raises(TokenizerError, match=r"but config\.json has vocab_size 100"):
        convert(tmp_path, {"vocab_size": 100})
    for bad in (0, -1, "32", 2**40, True):
        with pytest.raises(FormatError, match="vocab_size"):
            convert(tmp_path, {"vocab_size": bad})


# --- folders and chat templates -------------------------------------------------------------


def test_a_folder_without_tokenizer_says_none(tmp_path: Path) -> None:
    assert convert(tmp_path) == {G + "model": "none"}
    folder(tmp_path, merges__txt=b"a b")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor"):
        convert(tmp_path)


def test_chat_templates(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer__json=bpe_json())
    assert not any("chat" in key for key in convert(tmp_path))
    folder(tmp_path, chat_template__json={"chat_template": "third"})
    assert convert(tmp_path)["tokenizer.chat_template"] == "third"
    named = [{"name": "default", "template": "a"}, {"name": "tool use!", "template": "b"}]
    folder(tmp_path, tokenizer_config__json={"chat_template": named})
    made = convert(tmp_path)
    assert made["tokenizer.chat_template"] == "a"
    assert made["tokenizer.chat_template.tool_use_"] == "b"
    assert made["tokenizer.chat_templates"] == ["tool_use_"]
    folder(tmp_path, tokenizer_config__json={"chat_template": "second"})
    assert convert(tmp_path)["tokenizer.chat_template"] == "second"
    folder(tmp_path, chat_template__jinja="first — é".encode())
    assert convert(tmp_path)["tokenizer.chat_template"] == "first — é"
    for bad in (b"\xff", b"x" * (1 << 21)):
        folder(tmp_path, chat_template__jinja=bad)
        with pytest.raises(FormatError, match=r"chat_template\.jinja"):
            convert(tmp_path)
