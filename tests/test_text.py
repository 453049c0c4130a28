"""Texts that users name: one way to read them all."""

from pathlib import Path

import pytest

from edgeq.errors import FormatError, ResourceError
from edgeq.text import read_text


def test_line_ends_stay_and_marks_go(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\nca\xc3\xa9 \xef\xbb\xbf")
    assert read_text(path) == "one\r\ntwo\rthree\nca\u00e9 \ufeff"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"one\ntwo caf\xe9 x",
            "line 2, byte 11: invalid continuation byte: expected a",
        ),
        (b"\xff\xfeo\0n\0e\0", "line 1, byte 0: invalid start byte"),
        (b"\xef\xbb\xbfab\xff", "line 1, byte 5: "),  # as an editor of bytes counts
    ],
)
def test_what_is_no_text_says_where(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"text\.txt: {told}"):
        read_text(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
