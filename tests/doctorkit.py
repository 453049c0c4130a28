"""What the doctor says of a machine of which only files are here."""

from pathlib import Path
from typing import Any

import pytest
from machines import tool

from edgeq.doctor import Finding, System, examine
from edgeq.kernels import isa as isas
from edgeq.sensors.tool import Tool

SILENT = tool()


def look(root: Path, said: Tool = SILENT, **more: Any) -> dict[str, Finding]:
    """Findings by topic; of several with one topic the gravest."""
    more = {"machine": "aarch64", "name": "Linux", "env": {}, "place": root} | more
    order = ["ok", "info", "warn", "fail"]
    found = sorted(examine(System(root, tool=said, **more)), key=lambda f: order.index(f.state))
    return {finding.topic: finding for finding in found}


def runs(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [isas.modules()[name] for name in names]
    monkeypatch.setattr("edgeq.kernels.isa.available", lambda: found)
