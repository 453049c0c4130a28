"""What tests/arm/prepare.py leaves in the cache folder."""

import os
from pathlib import Path

from arm import prepare


def test_unused_trees_are_removed(tmp_path: Path) -> None:
    for name in ("new", "used", "old", "making-old"):
        (tmp_path / name / "debian").mkdir(parents=True)
    for name in ("old", "making-old"):
        os.utime(tmp_path / name, (0, 0))
    prepare.forget(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
