"""Text from tokens, one at a time: a character comes out when all its bytes are there."""

import codecs
from collections.abc import Callable

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Turns ids into text as they are generated.

    piece: bytes of an id, b"" for one that is not shown. drop_space: the vocabulary puts a space
    before the text, which is no part of it.

    >>> decoder = StreamDecoder({0: b" caf", 1: b"\\xc3", 2: b"\\xa9"}.__getitem__, drop_space=True)
    >>> [decoder.push(i) for i in (0, 1, 2)], decoder.flush()
    (['caf', '', 'é'], '')
    """

    def __init__(self, piece: Callable[[int], bytes], *, drop_space: bool = False) -> None:
        self._piece = piece
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Characters that this id completes, often none."""
        data = self._piece(token)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
