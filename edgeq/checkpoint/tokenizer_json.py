"""Reader of tokenizer.json with a byte-level BPE vocabulary.

Regular expressions of the file are compared with known ones, never compiled.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeq.errors import FormatError, TokenizerError
from edgeq.vocab import MAX_TOKENS, PRETOKENIZERS

__all__ = ["base_vocabulary", "check_kind", "merges", "pretokenizer"]


def check_kind(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `model` table, if it is a byte-level BPE that GGUF can express. Raises TokenizerError."""
    model = _table(table, "model", path)
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{path}: model type {model['type']!r:.40}: expected BPE")
    if model.get("byte_fallback"):
        raise TokenizerError(
            f"{path}: a SentencePiece vocabulary: expected tokenizer.model: download it too"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{path}: model.{key} {model[key]!r:.40}: not supported")
    _check_normalizer(table.get("normalizer"), path)
    return model


def base_vocabulary(model: dict[str, Any], path: Path) -> dict[int, str]:
    """Texts by id. Raises FormatError for ids that are not small unique integers."""
    texts: dict[int, str] = {}
    for text, token in _table(model, "vocab", path).items():
        if type(token) is not int or not 0 <= token < MAX_TOKENS or token in texts:
            raise FormatError(f"{path}: vocab[{text!r:.40}] = {token!r:.40}: expected a unique id")
        texts[token] = text
    if not texts:
        raise FormatError(f"{path}: vocab: empty: expected tokens")
    return texts


def merges(model: dict[str, Any], path: Path) -> list[str]:
    """Merges as "left right", best first. Raises FormatError."""
    found = model.get("merges")
    if not isinstance(found, list):
        raise FormatError(f"{path}: merges: expected a list")
    return [_merge(item, path) for item in found]


def _merge(item: Any, path: Path) -> str:
    parts = item.split(" ") if isinstance(item, str) else item
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not all(isinstance(p, str) and p for p in parts)
    ):
        raise FormatError(f"{path}: merges: {item!r:.40}: expected two texts")
    # A space would end the left part; byte-level vocabularies write it as Ġ.
    return " ".join(part.replace(" ", "Ġ") for part in parts)


def pretokenizer(table: dict[str, Any], path: Path) -> str:
    """Name of the pre-tokenizer that splits as the file says. Raises TokenizerError."""
    splits = tuple(_splits(table.get("pre_tokenizer"), path))
    names = [name for name, known in PRETOKENIZERS.items() if known.splits == splits]
    if not names:
        known = ", ".join(PRETOKENIZERS)
        raise TokenizerError(f"{path}: pre_tokenizer splits {splits!r:.200}: known are {known}")
    if (
        _table(table, "model", path).get("ignore_merges")
        and not PRETOKENIZERS[names[0]].whole_words
    ):
        raise TokenizerError(f"{path}: ignore_merges with the splits of {names[0]}: not supported")
    return names[0]


def _splits(pre: Any, path: Path) -> Iterator[str]:
    """Regular expressions of a pre-tokenizer that ends in bytes."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and "pretokenizers" in pre else [pre]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise FormatError(f"{path}: pre_tokenizer: expected tables")
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise TokenizerError(f"{path}: pre_tokenizer: expected byte-level BPE")
    for step in steps:
        yield from _step(step, path)


def _step(step: dict[str, Any], path: Path) -> Iterator[str]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield PRETOKENIZERS["gpt-2"].splits[0]
    elif kind == "Digits" and step.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern")
        yield str(pattern.get("Regex") if isinstance(pattern, dict) else pattern)
    else:
        raise TokenizerError(f"{path}: pre_tokenizer step {step!r:.200}: not supported")


def _check_normalizer(normalizer: Any, path: Path) -> None:
    """Text must reach the splits as it is, or in Unicode normal form C."""
    steps = [normalizer] if normalizer else []
    if isinstance(normalizer, dict) and isinstance(normalizer.get("normalizers"), list):
        steps = normalizer["normalizers"]
    if any(step != {"type": "NFC"} for step in steps):
        raise TokenizerError(f"{path}: normalizer {normalizer!r:.200}: expected none or NFC")


def _table(parent: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {key}: expected a table")
    return value
