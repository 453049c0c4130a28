"""The general.* metadata of a checkpoint: name and authorship, and sampling defaults.

Names, values and their heuristics are those of llama.cpp's converter, taken from the `gguf`
package.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["card_metadata", "sampling_metadata", "source_name"]

_MAX_CARD = 4 << 20  # bytes of README.md worth parsing

# generation_config.json -> general.sampling.*, and whether it counts something
_SAMPLING = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temperature": ("temp", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
}


def source_name(folder: Path) -> str:
    """Name of the model that a folder holds: its own, or the repository's in the hub cache.

    >>> source_name(Path("/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de"))
    'Qwen3-0.6B'
    >>> source_name(Path("/models/tiny-home"))
    'tiny-home'
    """
    real = folder.resolve()
    repository = real.parent.parent.name
    if real.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return real.name


def sampling_metadata(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """general.sampling.* of generation_config.json; anything but finite numbers is left out.

    >>> sampling_metadata({"temperature": 0.6, "top_k": 20, "top_p": "high"})
    {'general.sampling.top_k': 20, 'general.sampling.temp': 0.6}
    """
    metadata: dict[str, Any] = {}
    for key, (name, kind) in _SAMPLING.items():
        value = generation_config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and _fits(value, kind):
            metadata[f"general.sampling.{name}"] = kind(value)
    return metadata


def _fits(value: float, kind: type) -> bool:
    return math.isfinite(value) and (kind is float or -(2**31) <= value < 2**31)


def card_metadata(folder: Path, config: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """general.name, size_label and what the front matter of README.md says about the model.

    parameters: how many weights the model has. A model card that cannot be parsed is ignored: it
    only decorates the file.
    """
    import gguf

    try:
        found = _entries(folder, config, parameters)
    except Exception:  # whatever a YAML parser and heuristics throw at values of any type
        found = {}
    return {
        "general.name": source_name(folder),
        "general.size_label": gguf.size_label(parameters, 0, 0, 0),
        **found,
    }


def _entries(folder: Path, config: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Keys that the heuristics of the `gguf` package find."""
    import gguf

    readme = folder / "README.md"
    small = readme.is_file() and readme.stat().st_size <= _MAX_CARD
    card = gguf.Metadata.load_model_card(folder) if small else {}
    name = Path(source_name(folder))
    info = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, dict(config), name, parameters
    )
    sink = gguf.GGUFWriter(path=None, arch="")
    info.set_gguf_meta_model(sink)
    entries = {key: _plain(key, value.value) for key, value in sink.kv_data[0].items()}
    return {key: value for key, value in entries.items() if key != "general.architecture"}


def _plain(key: str, value: Any) -> Any:
    """Value of the type that GGUF defines: YAML also yields numbers, dates and nested tables."""
    if key.endswith(".count"):
        return value
    return [str(item) for item in value] if isinstance(value, list) else str(value)
