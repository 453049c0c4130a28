"""Text files that a user names."""

from pathlib import Path

from edgeq.errors import FormatError

__all__ = ["read_text"]


def read_text(path: str) -> str:
    """Content of a text file. Raises FormatError when it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start}: expected a UTF-8 text") from error
