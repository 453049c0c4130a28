"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "edgeq"
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if "\n    >>> " in path.read_text("utf-8") or "\n>>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    (tmp_path / "examples").symlink_to(PACKAGE.parent / "examples")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)
    assert not result.failed
