"""What feeds what in a decoder layer, by GGUF tensor names: for methods that look beyond a matrix.

The only place that knows it. Kinds are names without layer and ending: "attn_q".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgeq.gguf.names import split
from edgeq.recipe import Model

__all__ = ["HEADS", "RESIDUAL", "TABLES", "Fold", "folds", "kind_of", "sharing"]

RESIDUAL = ("attn_output", "ffn_down")  # kinds whose output is added to the residual stream
HEADS = ("attn_q", "attn_k")  # kinds whose rows have another order within heads in some sources
TABLES = ("token_embd", "output")  # kinds that stand outside the layers
_NORMS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
_MATRICES = {"ffn_up": "ffn_down", "attn_v": "attn_output"}


@dataclass(frozen=True, slots=True)
class Fold:
    """Columns of `readers` may be multiplied by factors above 0 if `writers` are divided by them:
    the entries of a norm or a bias, or the rows of a matrix.

    share: neighbouring heads of `head` columns whose factors are the same, being read from one.
    """

    readers: tuple[str, ...]
    writers: tuple[str, ...]
    head: int = 1
    share: int = 1


def kind_of(name: str) -> str:
    """What a tensor is, whatever its layer.

    >>> kind_of("blk.3.attn_q.weight"), kind_of("output.weight")
    ('attn_q', 'output')
    """
    return split(name)[1].removesuffix(".weight").removesuffix(".bias")


def sharing(kind: str, model: Model) -> int:
    """How many query heads see an error in one row of a matrix of this kind."""
    return model.head_count // model.head_count_kv if kind in ("attn_k", "attn_v") else 1


def folds(shapes: Mapping[str, tuple[int, ...]], model: Model) -> Iterator[Fold]:
    """All folds of a model that leave its function as it is, layer by layer.

    Where a matrix or norm is missing, or has other columns than its reader's, there is no fold.

    >>> shapes = {"blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96)}
    >>> [fold.writers for fold in folds(shapes, Model(1, 4, 2))]
    [('blk.0.ffn_up.weight',)]
    """
    for i in range(model.block_count):
        at = f"blk.{i}."
        for norm, kinds in _NORMS.items():
            readers = tuple(f"{at}{kind}.weight" for kind in kinds)
            writer = f"{at}{norm}.weight"
            if writer in shapes and all(name in shapes for name in readers):
                yield Fold(readers, _with_bias(shapes, writer))
        for source, reader in _MATRICES.items():
            writer, target = f"{at}{source}.weight", f"{at}{reader}.weight"
            if writer in shapes and target in shapes and len(shapes[target]) == 2:
                fold = _matrix_fold(shapes, writer, target, model)
                if fold is not None:
                    yield fold


def _with_bias(shapes: Mapping[str, tuple[int, ...]], weight: str) -> tuple[str, ...]:
    bias = weight.removesuffix("weight") + "bias"
    return (weight, bias) if bias in shapes else (weight,)


def _matrix_fold(
    shapes: Mapping[str, tuple[int, ...]], writer: str, reader: str, model: Model
) -> Fold | None:
    """Rows of `writer` are columns of `reader`, or each head of them several heads of columns."""
    rows, cols = shapes[writer][0], shapes[reader][1]
    share = sharing(kind_of(writer), model)
    if rows * share != cols or rows % model.head_count_kv:
        return None
    head = rows // model.head_count_kv if share > 1 else 1
    return Fold((reader,), _with_bias(shapes, writer), head, share)
