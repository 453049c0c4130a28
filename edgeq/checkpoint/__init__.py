"""Hugging Face checkpoint folders: safetensors weights and JSON files; no torch, no pickle.

Weights come out as float32 one tensor (or some of its rows) at a time, so that memory does not grow
with the model.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import schemes
from edgeq.checkpoint.files import member, read_json
from edgeq.checkpoint.float8 import Scale, block_shape, scale_names
from edgeq.checkpoint.parts import Parts
from edgeq.checkpoint.safetensors import READABLE, HfTensor, SafetensorsFile, first_nonfinite
from edgeq.closing import Closing
from edgeq.errors import FormatError, ModelError, ResourceError
from edgeq.grid import Grid

__all__ = ["PICKLES", "Checkpoint", "HfTensor", "open_checkpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(folder: Path | str) -> "Checkpoint":
    """Open a checkpoint folder: headers are read and checked, weights are not.

    Raises ResourceError when it cannot be read, FormatError when a file is malformed, ModelError
    when a file is missing or its kind is not supported (pickle files are never opened).

    >>> open_checkpoint("pytorch_model.bin")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    edgeq.errors.ModelError: pytorch_model.bin: pickle files can run code and are never opened: ...
    """
    folder = Path(folder)
    _check_folder(folder)
    config = _config(folder)
    generation = folder / "generation_config.json"
    return Checkpoint(folder, config, read_json(generation) if generation.is_file() else {})


def _check_folder(folder: Path) -> None:
    if folder.suffix in PICKLES:
        raise ModelError(f"{folder}: pickle files can run code and are never opened: {_ADVICE}")
    if not folder.exists():
        raise ResourceError(f"{folder}: not found: give a checkpoint folder")
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder: give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json is missing: give a Hugging Face checkpoint folder")


def _config(folder: Path) -> dict[str, Any]:
    """config.json, with what older tools wrote about quantization into a file of their own."""
    config = read_json(folder / "config.json")
    for name, method in schemes.OWN_FILES.items():
        if not schemes.settings(config) and (folder / name).is_file():
            table = {"quant_method": method, **read_json(folder / name)}
            return {**config, "quantization_config": table}
    return config


_ADVICE = "save the model as safetensors (save_pretrained in transformers does)"


class Checkpoint(Closing):
    """An open checkpoint folder.

    path: the folder. config, generation_config: content of the JSON files ({} when absent).
    tensors: every tensor by its name in the files, except scales, which `read` applies. A weight
    quantized by one of the `schemes` is one tensor here, of type "packed".
    """

    def __init__(
        self, path: Path, config: dict[str, Any], generation_config: dict[str, Any]
    ) -> None:
        """See `open_checkpoint`."""
        self.path, self.config, self.generation_config = path, config, generation_config
        self._files: dict[Path, SafetensorsFile] = {}
        try:
            self._all = self._open_files()
            self._packed = schemes.find(Parts(path, self._all, self._raw), config)
            self._scales = scale_names(self._all)
            used = {part for packed in self._packed.values() for part in packed.parts}
            self._block = block_shape(config) if self._scales else (128, 128)
            used |= set(self._scales.values())
            self.tensors = {name: t for name, t in self._all.items() if name not in used}
            self.tensors |= {name: self._entry(packed) for name, packed in self._packed.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all files; safe to call twice."""
        for file in self._files.values():
            file.close()

    def read(self, name: str) -> NDArray[np.float32]:
        """Tensor as float32 in its own shape, FP8 scales applied.

        Raises ModelError for a type that cannot be read and for NaN or infinity, ResourceError when
        the disk fails.
        """
        tensor = self.tensors[name]
        return self.read_rows(name, 0, tensor.rows).reshape(tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of a tensor as float32 [stop - start, cols]; a vector is one row.

        Raises as `read`.
        """
        tensor = self.tensors[name]
        if name in self._packed:
            w = self._packed[name].read(start, stop)
        else:
            self.check(name)
            w = self._files[tensor.file].rows(tensor, start, stop)
        if name in self._scales:
            self._scale(name).apply(w, start)
        self._check_finite(name, w, start * tensor.cols)
        return w

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({tensor.file for tensor in self._all.values()})

    def is_quantized(self, name: str) -> bool:
        """Whether one of the `schemes` packed the tensor; FP8 counts as floats."""
        return name in self._packed

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        """Rows start..stop of a tensor as the integers that the checkpoint holds, if it does.

        Raises as `read`.
        """
        packed = self._packed.get(name)
        grid = None if packed is None else packed.grid(start, stop)
        if grid is not None and first_nonfinite(grid.scale) is not None:
            raise ModelError(
                f"{self.path}: {name}: a scale of rows {start} to {stop - 1} is not finite: the "
                "checkpoint is damaged"
            )
        return grid

    def _raw(self, tensor: HfTensor, start: int, stop: int) -> NDArray[np.uint8]:
        return self._files[tensor.file].raw(tensor, start, stop)

    def _entry(self, packed: schemes.Packed) -> HfTensor:
        parts = [self._all[part] for part in packed.parts if part in self._all]
        nbytes = sum(part.nbytes for part in parts)
        return HfTensor(packed.shape, "packed", parts[0].file, parts[0].offset, nbytes)

    def check(self, name: str) -> None:
        """Refuse tensors that cannot become weights, before any is read. Raises ModelError."""
        tensor = self.tensors[name]
        if name in self._packed:
            return self._packed[name].check()
        if tensor.dtype not in READABLE:
            known = ", ".join(READABLE)
            raise ModelError(f"{self.path}: {name}: type {tensor.dtype}: expected one of {known}")
        if math.prod(tensor.shape) == 0:
            raise ModelError(
                f"{self.path}: {name}: shape {tensor.shape}: a weight without elements"
            )
        if name in self._scales:
            self._scale(name)

    def _scale(self, name: str) -> Scale:
        source = self._all[self._scales[name]]
        values = self._files[source.file].rows(source, 0, source.rows).reshape(source.shape)
        where = f"{self.path}: {self._scales[name]}"
        return Scale(values, self.tensors[name].shape, self._block, where)

    def _check_finite(self, name: str, w: NDArray[np.float32], first: int) -> None:
        bad = first_nonfinite(w)
        if bad is not None:
            index = np.unravel_index(first + bad, self.tensors[name].shape)
            at = ", ".join(str(int(i)) for i in index)
            raise ModelError(
                f"{self.path}: {name}[{at}] = {w.reshape(-1)[bad]}: expected a finite number: the "
                "checkpoint is damaged"
            )

    def _open_files(self) -> dict[str, HfTensor]:
        if (self.path / _SINGLE).is_file():
            return self._open(_SINGLE)
        if (self.path / _INDEX).is_file():
            return self._open_shards(_weight_map(self.path / _INDEX))
        found = sorted(item.name for item in self.path.iterdir() if item.suffix in PICKLES)
        if found:
            raise ModelError(
                f"{self.path}: only pickle files ({found[0]}): they can run code and are never "
                f"opened: {_ADVICE}"
            )
        raise ModelError(f"{self.path}: neither {_SINGLE} nor {_INDEX} found")

    def _open(self, name: str) -> dict[str, HfTensor]:
        path = member(self.path, name)
        self._files[path] = SafetensorsFile(path)
        return self._files[path].tensors

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, HfTensor]:
        """All tensors, when index and shards agree on what lies where."""
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not member(self.path, name).is_file()]
        if missing:
            raise ModelError(
                f"{self.path}: {len(missing)} of {len(names)} shards missing, first {missing[0]}: "
                "download them"
            )
        tensors: dict[str, HfTensor] = {}
        for name in names:
            shard = self._open(name)
            expected = {tensor for tensor, home in weight_map.items() if home == name}
            _check_shard(self.path / name, shard, expected)
            tensors.update(shard)
        return tensors


def _check_shard(path: Path, shard: Iterable[str], expected: set[str]) -> None:
    """A shard holds exactly the tensors that the index puts there (so none lies in two)."""
    wrong = sorted(expected.symmetric_difference(shard))
    if wrong:
        fact = "is missing" if wrong[0] in expected else "is here, but the index says elsewhere"
        raise FormatError(f"{path}: tensor {wrong[0]!r} {fact}: download the checkpoint again")


def _weight_map(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{path}: weight_map: expected a table tensor -> file")
    if not all(isinstance(value, str) for value in table.values()):
        raise FormatError(f"{path}: weight_map: expected file names")
    return table
