"""Speculation without a second model: what followed the last words before may follow them again.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): the last few
tokens are looked up in all tokens so far, and what stood behind them is proposed. The model checks
several proposed tokens for little more than the price of one, since both read all weights once.
"""

from collections.abc import Sequence

__all__ = ["Draft"]

LONGEST = 3  # tokens of the pattern that is looked for first
SHORTEST = 2


class Draft:
    """Tokens so far, indexed by the patterns that end at each place.

    >>> draft = Draft([1, 2, 3, 4, 1, 2])
    >>> draft.propose(3)
    [3, 4, 1]
    >>> draft.extend([9])
    >>> draft.propose(3)
    []
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # pattern -> position behind its last place
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. A pattern is indexed once something stands behind it."""
        for token in tokens:
            end = len(self._tokens)
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest known pattern of last tokens."""
        for n in range(min(LONGEST, len(self._tokens)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(self._tokens[-n:]))
            if end is not None:
                return self._tokens[end : end + most]
        return []
