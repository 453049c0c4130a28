"""Special tokens and chat templates, from the JSON files of a checkpoint.

The order in which the files are asked is that of llama.cpp's converter (gguf.SpecialVocab).
"""

import re
from pathlib import Path
from typing import Any

from edgeq.checkpoint.files import read_json, read_small
from edgeq.errors import FormatError

__all__ = ["added_tokens", "chat_templates", "named_texts", "special_tokens"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
}  # "seperator" is the format's spelling
_MAX_TEMPLATE = 1 << 20  # bytes


def added_tokens(
    tokenizer: dict[str, Any], tokenizer_config: dict[str, Any], where: Path
) -> dict[int, dict[str, Any]]:
    """Tokens added to the base vocabulary, id -> {"content", "special", ...}.

    Raises FormatError.
    """
    found: dict[int, dict[str, Any]] = {}
    listed = tokenizer.get("added_tokens") or []
    by_id = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(by_id, dict):
        raise FormatError(f"{where}: added tokens: expected a list, or a table of ids")
    for token, entry in [*((_get(entry, "id"), entry) for entry in listed), *by_id.items()]:
        if isinstance(token, str) and re.fullmatch("[0-9]{1,9}", token):
            token = int(token)
        if type(token) is not int or token < 0 or not isinstance(_get(entry, "content"), str):
            raise FormatError(f"{where}: added token {token!r:.40}: expected an id and a content")
        found[token] = entry
    return found


def special_tokens(
    tokenizer: dict[str, Any],
    added: dict[int, dict[str, Any]],
    tokenizer_config: dict[str, Any],
    config: dict[str, Any],
    n_vocab: int,
) -> dict[str, Any]:
    """Keys such as bos_token_id and add_bos_token (without their prefix) and their values.

    tokenizer: tokenizer.json; added: what `added_tokens` found.
    """
    texts = named_texts(tokenizer_config)
    roles = list(_ROLES)
    flags: dict[str, bool] = {}
    _read_post_processor(tokenizer, texts, roles, flags, bool(tokenizer_config))
    ids: dict[str, int] = {}
    listed = {entry["content"]: token for token, entry in added.items()}
    texts_config = config.get("text_config")
    for role in roles:
        flag = tokenizer_config.get(f"add_{role}_token")
        if isinstance(flag, bool):
            flags[role] = flag
        places = (
            listed.get(texts.get(role, "")) if tokenizer_config else None,
            config.get(f"{role}_token_id"),
            _get(texts_config, f"{role}_token_id"),
        )
        valid = [i for i in places if type(i) is int and 0 <= i < n_vocab]
        if valid:
            ids[role] = valid[0]
    return {
        **{f"{_KEYS.get(role, role)}_token_id": i for role, i in ids.items()},
        **{
            f"add_{role}_token": flag
            for role, flag in flags.items()
            if role in ("bos", "eos", "sep")
        },
    }


def named_texts(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Text of each role that tokenizer_config.json names, with the roles' usual stand-ins."""
    texts = {}
    for role in (*_ROLES, "eot", "eom"):
        entry = tokenizer_config.get(f"{role}_token")
        text = _get(entry, "content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text:
            texts[role] = text
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if role not in texts and stand_in in texts:
            texts[role] = texts[stand_in]
    return texts


def _read_post_processor(
    tokenizer: dict[str, Any],
    texts: dict[str, str],
    roles: list[str],
    flags: dict[str, bool],
    configured: bool,
) -> None:
    """What the post-processor's template puts around a text."""
    processor = tokenizer.get("post_processor")
    steps = _get(processor, "processors") or [processor]
    for step in steps if isinstance(steps, list) else []:
        single = _get(step, "single")
        if _get(step, "type") != "TemplateProcessing" or not isinstance(single, list):
            continue
        first, last = (
            (_special(single[0]), _special(single[-1])) if len(single) > 1 else (None, None)
        )
        if first:
            if not configured:
                texts["bos"] = first
            flags["bos"] = first in (texts.get("bos"), texts.get("cls"))
        if last:
            if configured and last != texts.get("eos"):
                # The text's own end token differs from the named one, which then ends a turn.
                texts["eot"] = texts.get("eos", "")
                roles.append("eot")
            texts["eos"] = last
            flags["eos"] = True
        _read_pair(_get(step, "pair"), first, last, texts, flags)


def _read_pair(
    pair: Any, first: str | None, last: str | None, texts: dict[str, str], flags: dict[str, bool]
) -> None:
    """Whether a separator stands between two texts."""
    if not isinstance(pair, list) or not pair:
        return
    start = 1 if first and _special(pair[0]) == first else 0
    stop = len(pair) - 1 if last and _special(pair[-1]) == last else len(pair)
    inner = pair[start:stop]
    if not inner or (_sequence(inner[0]), _sequence(inner[-1])) != ("A", "B") or len(inner) < 3:
        return
    separators = (texts.get("sep"), texts.get("eos"))
    between = [_special(item) for item in inner[1:-1]]
    flags["sep"] = (between[0] in separators and not last) or (
        len(between) == 2 and between[1] in separators
    )


def _special(item: Any) -> str | None:
    text = _get(_get(item, "SpecialToken"), "id")
    return text if isinstance(text, str) else None


def _sequence(item: Any) -> Any:
    return _get(_get(item, "Sequence"), "id")


def _get(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


def chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; "default" is the one to use. Raises FormatError.

    chat_template.jinja counts before tokenizer_config.json, and that before chat_template.json.
    """
    if (folder / "chat_template.jinja").is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        paths = {"default": folder / "chat_template.jinja", **{path.stem: path for path in more}}
        return {_safe(name): _text(path) for name, path in paths.items()}
    found = tokenizer_config.get("chat_template")
    if found is None and (folder / "chat_template.json").is_file():
        found = read_json(folder / "chat_template.json", 8 * _MAX_TEMPLATE).get("chat_template")
    if isinstance(found, list):
        named = {_get(item, "name"): _get(item, "template") for item in found}
        templates = {_safe(name): text for name, text in named.items() if isinstance(name, str)}
    else:
        templates = {"default": found}
    kept = {name: text for name, text in templates.items() if name and isinstance(text, str)}
    for name, text in kept.items():
        if len(text) > _MAX_TEMPLATE:
            raise FormatError(
                f"{folder}: chat template {name}: more than {_MAX_TEMPLATE} characters"
            )
    return kept


def _safe(name: str) -> str:
    """Name of a template as part of a metadata key."""
    return re.sub("[^A-Za-z0-9]", "_", name)


def _text(path: Path) -> str:
    try:
        return read_small(path, _MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8") from error
