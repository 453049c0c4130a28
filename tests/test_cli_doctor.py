"""`edgeq doctor`: its lines, its JSON, its exit code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from shell import edgeq

from edgeq.doctor import GROUPS, Finding


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the doctor say this."""

    def make(*findings: Finding) -> None:
        monkeypatch.setattr("edgeq.doctor.examine", lambda system: iter(findings))

    return make


OK = Finding("RAM", "ok", "enough", values={"total": 5}, group="Memory")
WARN = Finding("clock", "warn", "slow \x1b[2J", "make it fast", group="Processor")
FAIL = Finding("64 bits", "fail", "32", "install", group="System")


def test_lines_and_exit_code(said: Callable[..., None]) -> None:
    said(OK, WARN)
    result = edgeq("doctor")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok    RAM            enough",
        r"warn  clock          slow \x1b[2J -> make it fast",
    ]
    said(OK, FAIL)
    assert edgeq("doctor").exit_code == 1
    assert edgeq("doctor", "no-such-folder").exit_code == 2


def test_json(said: Callable[..., None]) -> None:
    said(OK, FAIL)
    result = edgeq("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["counts"] == {"ok": 1, "info": 0, "warn": 0, "fail": 1}
    assert found["findings"][0] == {
        "topic": "RAM",
        "state": "ok",
        "text": "enough",
        "remedy": "",
        "values": {"total": 5},
        "group": "Memory",
    }


def test_a_terminal_of_80_columns(
    said: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.cli.doctor.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    long = "/".join(["a-folder-with-a-name"] * 8)
    said(WARN, Finding("cache", "fail", long, f"rm {long}", group="Kernels"))
    lines = edgeq("doctor").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert long in "".join(line[15:].rstrip() for line in lines)
    assert lines[-1].strip() == "1 to repair, 1 to improve"


def test_this_machine(tmp_path: Path) -> None:
    result = edgeq("doctor", "--json", str(tmp_path))
    found = json.loads(result.stdout)["findings"]
    assert [f["text"] for f in found if "could not be looked at" in f["text"]] == []
    titles = list(dict.fromkeys(f["group"] for f in found))
    assert len(titles) == len(GROUPS)
    assert {"64 bits", "packages", "SIMD", "threads", "room", "cache"} <= {
        f["topic"] for f in found
    }
