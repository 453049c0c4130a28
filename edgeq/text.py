"""Text that comes from a file, made safe to show on a terminal, in a log or in an error."""

__all__ = ["printable"]


def printable(text: object, limit: int = 80) -> str:
    """`text` cut to `limit` characters; control, bidirectional and undecodable ones escaped.

    >>> printable("name" + chr(27) + "[2J")
    'name\\\\x1b[2J'
    >>> printable("x" * 100, limit=5)
    'xxxxx...'
    """
    whole = str(text)
    cut = whole[:limit] + ("..." if len(whole) > limit else "")
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
