"""What is open, and is closed by a `with` statement."""

from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing:
    """Base of what has a `close`.

    >>> class Door(Closing):
    ...     def close(self):
    ...         print("shut")
    >>> with Door() as door:
    ...     pass
    shut
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        raise NotImplementedError
