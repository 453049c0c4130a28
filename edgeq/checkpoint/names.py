"""Hugging Face tensor names to GGUF names, through the maps of the `gguf` package."""

from collections.abc import Iterable

from edgeq.errors import ModelError

__all__ = ["gguf_names"]

# Buffers that old checkpoints saved, and activation or cache scales: no weight depends on them.
_USELESS = (
    ".rotary_emb.inv_freq",
    ".attention.masked_bias",
    ".input_scale",
    "activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".output_scale",
    ".input_zero_point",
    ".output_zero_point",
)


def gguf_names(architecture: str, block_count: int, names: Iterable[str]) -> dict[str, str]:
    """HF name -> GGUF name of every tensor that GGUF stores.

    architecture: as in general.architecture. Raises ModelError for tensors without a GGUF name: a
    file without them would load and answer wrongly.

    >>> gguf_names("llama", 1, ["model.layers.0.self_attn.q_proj.weight"])
    {'model.layers.0.self_attn.q_proj.weight': 'blk.0.attn_q.weight'}
    """
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[architecture], block_count)
    useful = [name for name in names if not name.endswith(_USELESS)]
    mapped = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in useful}
    unknown = [name for name, new in mapped.items() if new is None]
    if unknown:
        raise ModelError(
            f"{len(unknown)} tensors have no place in architecture {architecture} with "
            f"{block_count} layers: {', '.join(unknown[:5])}: this kind of model is not supported"
        )
    _check_unique(mapped)
    return mapped


def _check_unique(mapped: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, new in mapped.items():
        other = seen.setdefault(new, name)
        if other != name:
            raise ModelError(f"tensors {other} and {name} are both {new}: expected one of them")
