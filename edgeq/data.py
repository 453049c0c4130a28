"""Find the data folders (formats/, devices/) and read their TOML files strictly.

A table becomes a frozen dataclass: a missing key, an unknown key or a value of another type is an
error that names the file and the key, so a mistyped key never passes silently. Such files are
written here too, all or nothing.
"""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edgeq.checks import replaceable
from edgeq.errors import FormatError, RequestError, ResourceError
from edgeq.text import write_text

__all__ = ["find", "from_table", "load_toml", "refuse_target", "save_toml", "toml"]

T = TypeVar("T")


def find(kind: Literal["formats", "devices"]) -> Path:
    """Folder of data files: inside the package when installed, beside it in a checkout.

    Raises ResourceError when the installation lacks it.

    >>> (find("formats") / "q4_k.toml").is_file()
    True
    """
    package = Path(__file__).resolve().parent
    for folder in (package / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise ResourceError(f"{package / kind}: folder not found: install edgeq again")


def load_toml(path: Path | str) -> dict[str, Any]:
    """Content of a TOML file as plain dicts, lists and scalars.

    Raises ResourceError when it cannot be read, FormatError when it is not TOML.

    >>> load_toml(find("formats") / "q4_k.toml")["bytes"]
    144
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{path}: not valid TOML: nested too deeply") from error


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Dataclass `cls` from a TOML table; `where` (file, then key) opens every error message.

    Fields may be int, float (an integer is accepted), bool, str, Literal, another dataclass,
    `tuple[X, ...]`, `dict[str, X]` or `X | None`. A field without a default is a required key.

    Raises FormatError on an unknown key, a missing key or a value of the wrong type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Cpu:
    ...     cores: int
    ...     isa: str = ""
    >>> from_table(Cpu, {"cores": 4}, "rpi5.toml")
    Cpu(cores=4, isa='')
    >>> from_table(Cpu, {"cores": 4, "core": 1}, "rpi5.toml")
    Traceback (most recent call last):
        ...
    edgeq.errors.FormatError: rpi5.toml: unknown key core: expected one of cores, isa
    """
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    _check_keys(fields, table, where)
    hints = get_type_hints(cls)
    return cls(
        **{key: _convert(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    )


def _check_keys(fields: Mapping[str, Any], table: Mapping[str, Any], where: str) -> None:
    for key in table:
        if key not in fields:
            raise FormatError(f"{where}: unknown key {key}: expected one of {', '.join(fields)}")
    for key, field in fields.items():
        if key not in table and _required(field):
            raise FormatError(f"{where}: key {key} is missing: add it")


def _required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` demands, nested tables and lists included."""
    if dataclasses.is_dataclass(hint):
        return from_table(cast(type[Any], hint), _expect(dict, value, where), where)
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        items = enumerate(_expect(list, value, where))
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in items)
    if origin in (dict, Mapping):
        items = _expect(dict, value, where).items()
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in items}
    if origin in (Union, types.UnionType):
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        return _one_of(args, value, where)
    return _expect(hint, value, where)


def _one_of(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise FormatError(f"{where} = {value!r}: expected one of {', '.join(map(repr, choices))}")
    return value


def _expect(cls: type, value: Any, where: str) -> Any:
    if cls is float and type(value) is int:
        return float(value)
    if type(value) is not cls:  # exact: TOML's true must not pass as the integer 1
        raise FormatError(f"{where} = {value!r}: expected {_TOML_NAMES.get(cls, cls.__name__)}")
    return value


_TOML_NAMES = {
    dict: "a table",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def toml(value: Any) -> str:
    """A scalar, a tuple of such or a table, on one line. It is JSON, where TOML has no other: no
    pairs of surrogates, and no DEL as it is.

    >>> toml({"gbs": 9.26, "names": ("a", "b")})
    '{ gbs = 9.26, names = ["a", "b"] }'
    """
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):  # of a file name that is no UTF-8 there may be halves of pairs
        value = value.encode(errors="backslashreplace").decode()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def refuse_target(path: Path | str, *, force: bool = False) -> None:
    """Say before the work that `save_toml` could not write there. Raises RequestError,
    ResourceError.
    """
    path = Path(path)
    if path.suffix != ".toml":
        raise RequestError(f"{path}: expected a name that ends with .toml")
    if not path.absolute().parent.is_dir():
        raise ResourceError(f"{path}: its folder does not exist: create it first")
    replaceable(path, force=force)


def save_toml(text: str, path: Path | str, *, force: bool = False) -> None:
    """Write a file; under its name there is all of it, or what was there before.

    Raises RequestError, ResourceError.
    """
    refuse_target(path, force=force)
    write_text(path, text)
