"""Tokenizer files of a checkpoint -> GGUF metadata, as llama.cpp's converter writes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.checkpoint.files import read_json
from edgeq.checkpoint.special import added_tokens, chat_templates, named_texts, special_tokens
from edgeq.checkpoint.spm_model import read_spm_model
from edgeq.checkpoint.tokenizer_json import base_vocabulary, check_kind, merges, pretokenizer
from edgeq.errors import FormatError, TokenizerError
from edgeq.vocab import END_TEXTS, MAX_TOKENS, TokenType

__all__ = ["vocabulary_metadata"]

_TRACES = (
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "spiece.model",
    "tokenizer.tiktoken",
)
# Classes whose add_prefix_space has no effect; llama.cpp's converter leaves it out for them.
_NO_PREFIX = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclass
class _Table:
    """Rows of the vocabulary, to be padded to the size that the model's embedding has."""

    tokens: dict[int, str]
    scores: dict[int, float]
    types: dict[int, int]

    def put(self, token: int, text: str, score: float, kind: int) -> None:
        self.tokens[token], self.scores[token], self.types[token] = text, score, kind

    def columns(self, n: int) -> tuple[list[str], list[float], list[int]]:
        """Texts, scores and types of ids 0 to n - 1; what is missing becomes [PADi]."""
        return (
            [self.tokens.get(i, f"[PAD{i}]") for i in range(n)],
            [self.scores.get(i, -10000.0) for i in range(n)],
            [int(self.types.get(i, TokenType.UNUSED)) for i in range(n)],
        )


def vocabulary_metadata(
    folder: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Every `tokenizer.*` key of a checkpoint folder, ready for GgufWriter.

    tokenizer.model (SentencePiece BPE) is preferred to tokenizer.json (byte-level BPE). A folder
    with no tokenizer file at all gives {"tokenizer.ggml.model": "none"}. Values are str, bool, int,
    list[str], float32 [vocab] and int32 [vocab].

    Raises FormatError for malformed files, TokenizerError for a tokenizer that is not supported.

    >>> vocabulary_metadata(Path("/nowhere"), {}, {})
    {'tokenizer.ggml.model': 'none'}
    """
    settings = _json(folder / "tokenizer_config.json")
    table = _json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        metadata = _spm(folder, dict(config), table, settings)
    elif table:
        metadata = _bpe(folder, dict(config), table, settings)
    else:
        _check_none(folder)
        return {"tokenizer.ggml.model": "none"}
    _add_ends(metadata, generation_config)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    _add_templates(metadata, chat_templates(folder, settings))
    return _checked(metadata, folder)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check_none(folder: Path) -> None:
    found = next((name for name in _TRACES if (folder / name).exists()), None)
    if found:
        raise TokenizerError(
            f"{folder}: {found}, but neither tokenizer.model nor tokenizer.json: download one"
        )


def _n_vocab(config: dict[str, Any], least: int, folder: Path) -> int:
    """Rows of the model's embedding, as config.json says; without it, the tokens there are."""
    inner = config.get("text_config")
    n = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    if n is None:
        return least
    if type(n) is not int or not 0 < n <= MAX_TOKENS:
        raise FormatError(
            f"{folder / 'config.json'}: vocab_size {n!r:.40}: expected 1 to {MAX_TOKENS}"
        )
    return n


def _spm(
    folder: Path, config: dict[str, Any], table: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    model = read_spm_model(folder / "tokenizer.model")
    rows = _Table({}, {}, {})
    for i, piece in enumerate(model.pieces):
        rows.put(i, piece.text, piece.score, piece.kind)
    for text, token in _json(folder / "added_tokens.json").items():
        if type(token) is int:
            rows.put(token, text, -1000.0, TokenType.USER_DEFINED)
    for token, entry in added_tokens({}, settings, folder / "tokenizer_config.json").items():
        rows.put(token, *_added(entry, frozenset()))
    # Added tokens never enlarge the vocabulary: without config.json's word it is the model's.
    n = _n_vocab(config, len(model.pieces), folder)
    tokens, scores, types = rows.columns(n)
    listed = added_tokens(table, {}, folder / "tokenizer.json")
    prefix = settings.get("add_prefix_space")
    prefix = prefix if isinstance(prefix, bool) else None if model.add_space_prefix else False
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
        **special_tokens(table, listed, settings, config, n),
        **({} if prefix is None else {"add_space_prefix": prefix}),
    }


def _bpe(
    folder: Path, config: dict[str, Any], table: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    model = check_kind(table, path)
    rows = _Table({}, {}, {})
    for token, text in base_vocabulary(model, path).items():
        rows.put(token, text, 0.0, TokenType.NORMAL)
    named = frozenset(named_texts(settings).values())
    added = added_tokens(table, settings, path)
    for token, entry in added.items():
        rows.put(token, *_added(entry, named))
    least = max(rows.tokens) + 1
    n = _n_vocab(config, least, folder)
    if n < least:
        raise TokenizerError(f"{path}: token id {least - 1}, but config.json has vocab_size {n}")
    tokens, _, types = rows.columns(n)
    prefix = settings.get("add_prefix_space")
    keep = isinstance(prefix, bool) and settings.get("tokenizer_class") not in _NO_PREFIX
    return {
        "model": "gpt2",
        "pre": pretokenizer(table, path),
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": merges(model, path),
        # Said aloud, because readers assume a BOS for some pre-tokenizers.
        "add_bos_token": False,
        **special_tokens(table, added, settings, config, n),
        **({"add_space_prefix": prefix} if keep else {}),
    }


def _added(entry: dict[str, Any], named: frozenset[str]) -> tuple[str, float, TokenType]:
    """Text, score and type of an added token."""
    text: str = entry["content"]
    if entry.get("special") or text in named or _looks_special(text):
        return text, -1000.0, TokenType.CONTROL
    # User-defined tokens are matched in the text itself, where ▁ is still a space.
    return text.replace("▁", " "), -1000.0, TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Some models declare tokens as ordinary text that are plainly not."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(left) and text.endswith(right) for left, right in brackets
    )


def _add_ends(metadata: dict[str, Any], generation_config: Mapping[str, Any]) -> None:
    """End tokens that only generation_config.json names, unless readers know their text anyway."""
    found = generation_config.get("eos_token_id")
    ends = found if isinstance(found, list) else [found]
    n = len(metadata["tokens"])
    for token in ends:
        if type(token) is not int or not 0 <= token < n:
            continue
        if "eos_token_id" not in metadata:
            metadata["eos_token_id"] = token
        elif token != metadata["eos_token_id"] and metadata["tokens"][token] not in END_TEXTS:
            metadata.setdefault("eot_token_id", token)


def _add_templates(metadata: dict[str, Any], templates: dict[str, str]) -> None:
    names = sorted(templates.keys() - {"default"})
    metadata.update({f"tokenizer.chat_template.{name}": templates[name] for name in names})
    if names:
        metadata["tokenizer.chat_templates"] = names
    if "default" in templates:
        metadata["tokenizer.chat_template"] = templates["default"]


def _checked(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """JSON can hold lone surrogates, GGUF cannot: refuse them before anything is written."""
    for key, value in metadata.items():
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        try:
            "\n".join(texts).encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{folder}: {key}: a text is not Unicode ({error.reason})") from error
    return metadata
