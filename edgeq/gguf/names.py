"""Names of tensors: which layer, and what kind of tensor there."""

import re

__all__ = ["split"]

_IN_LAYER = re.compile(r"blk\.([0-9]+)\.(.+)", re.DOTALL)


def split(name: str) -> tuple[int | None, str]:
    """Layer of a tensor, None outside of the layers, and its name there.

    >>> split("blk.12.attn_q.weight"), split("output.weight")
    ((12, 'attn_q.weight'), (None, 'output.weight'))
    """
    match = _IN_LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)
