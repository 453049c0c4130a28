"""Data folders and strict TOML tables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from edgeq.data import find, from_table, load_toml
from edgeq.errors import FormatError, ResourceError


@dataclass(frozen=True)
class Cpu:
    cores: int
    isa: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Device:
    name: str
    ghz: float
    cpus: tuple[Cpu, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    note: str | None = None
    fast: bool = False


def test_find_gives_both_folders() -> None:
    assert {path.suffix for path in find("formats").glob("q*")} == {".toml"}
    assert find("devices").name == "devices"


def test_find_prefers_the_installed_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "edgeq"
    (package / "formats").mkdir(parents=True)
    (tmp_path / "site" / "formats").mkdir()
    monkeypatch.setattr("edgeq.data.__file__", str(package / "data.py"))
    assert find("formats") == package / "formats"
    with pytest.raises(ResourceError, match="devices"):
        find("devices")


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = " + b"[" * 20_000])
def test_load_toml_refuses_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.toml: not valid TOML"):
        load_toml(path)


def test_load_toml_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"none\.toml: cannot be read"):
        load_toml(tmp_path / "none.toml")


def test_table_with_everything() -> None:
    table = {
        "name": "x",
        "ghz": 2,
        "cpus": [{"cores": 1}, {"cores": 2, "isa": "b"}],
        "limits": {"ram": 3},
        "note": "n",
        "fast": True,
    }
    expected = Device("x", 2.0, (Cpu(1), Cpu(2, "b")), {"ram": 3}, "n", True)
    assert from_table(Device, table, "f") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "f: unknown key nam"),
        ({"ghz": "fast"}, "f: ghz = 'fast': expected a number"),
        ({"ghz": True}, "f: ghz = True: expected a number"),
        ({"fast": 1}, "f: fast = 1: expected true or false"),
        ({"cpus": {}}, "f: cpus = {}: expected an array"),
        ({"cpus": [1]}, "f: cpus[0] = 1: expected a table"),
        ({"cpus": [{"cores": True}]}, "f: cpus[0]: cores = True: expected an integer"),
        ({"cpus": [{"cores": 1, "isa": "c"}]}, "f: cpus[0]: isa = 'c': expected one of 'a', 'b'"),
        ({"cpus": [{}]}, "f: cpus[0]: key cores is missing"),
        ({"limits": {"ram": 1.5}}, "f: limits.ram = 1.5: expected an integer"),
        ({"note": 1}, "f: note = 1: expected a string"),
    ],
)
def test_wrong_tables_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        from_table(Device, {"name": "x", "ghz": 1.0} | change, "f")
    assert message in str(caught.value)
