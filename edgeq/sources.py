"""What a conversion reads: a checkpoint folder or a GGUF file, as float32 under GGUF names."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks, models
from edgeq.blocks import BlockFormat
from edgeq.checkpoint import PICKLES, Checkpoint, open_checkpoint
from edgeq.checkpoint.card import card_metadata, sampling_metadata, source_name
from edgeq.checkpoint.names import gguf_names
from edgeq.checkpoint.safetensors import first_nonfinite, to_float32
from edgeq.errors import ModelError, RequestError, ResourceError
from edgeq.gguf import Gguf, open_gguf
from edgeq.grid import Grid
from edgeq.models.from_hf import integer
from edgeq.models.hparams import Hparams
from edgeq.recipe import Model

__all__ = ["CheckpointSource", "GgufSource", "Source", "open_source"]

Shape = tuple[int, ...]


class Source(Protocol):
    """An open source of weights."""

    path: Path
    name: str  # of the model, for the default file name
    files: list[Path]  # that the output must not overwrite
    shapes: dict[str, Shape]  # by GGUF name, in the order to write
    model: Model
    row_step: int  # rows that only make sense together: chunks are multiples of it
    warnings: list[str]
    # Tensors that are no floats, and their format (None if foreign): quantizing again adds errors.
    quantized: Mapping[str, BlockFormat | None]

    def metadata(self) -> dict[str, Any]:
        """Metadata of the file to write, except format and file type. Raises EdgeqError."""

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as GGUF stores them, float32 [stop - start, cols], all finite.

        Tensors of more than two dimensions count as one long matrix, vectors as one row. Raises
        ModelError, ResourceError.
        """

    def copy(self, name: str, fmt: BlockFormat, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Rows as bytes of `fmt`, where the source holds just these. Raises as `read`."""

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        """Rows as integers, where the source has them. Raises as `read`."""

    def factors(self, name: str, start: int, stop: int) -> NDArray[np.float32] | None:
        """What rows of the model were multiplied by, [stop - start or 1, cols or 1], or None."""

    def close(self) -> None:
        """Let go of all files."""


def open_source(src: Path | str, *, allow_requantize: bool = False) -> Source:
    """Open a checkpoint folder or a GGUF file.

    Raises RequestError for a GGUF file that is quantized already (unless `allow_requantize`),
    ResourceError when nothing is there, FormatError and ModelError for what cannot be used.
    """
    path = Path(src)
    if not path.exists():
        raise ResourceError(f"{path}: not found: give a checkpoint folder or a GGUF file")
    if path.is_dir() or path.suffix in (".safetensors", *PICKLES):
        return CheckpointSource(path)
    return GgufSource(path, allow_requantize=allow_requantize)


class CheckpointSource:
    """A Hugging Face checkpoint folder; see `Source`."""

    def __init__(self, path: Path) -> None:
        """Read and check everything except weights. Raises EdgeqError."""
        self.path, self.name, self.warnings = path, source_name(path), list[str]()
        self._checkpoint = open_checkpoint(path)
        try:
            self._prepare(self._checkpoint)
        except BaseException:
            self.close()
            raise

    def _prepare(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self._module = models.by_hf(_architectures(config))
        self._keys = self._module.metadata(config)
        self._extra = self._module.extra_tensors(config)
        self.model = _model_of_keys(self._keys)
        self._hf_names = self._names(checkpoint)
        for name in self._hf_names.values():
            checkpoint.check(name)
            if len(checkpoint.tensors[name].shape) > 2:
                raise ModelError(f"{self.path}: {name}: expected a matrix or a vector")
        found = {new: checkpoint.tensors[old].shape for new, old in self._hf_names.items()}
        found |= {name: w.shape for name, w in self._extra.items()}
        self.shapes = _in_layer_order(found)
        _check_complete(self.shapes, self.model.block_count, self.path)
        self.row_step = _head_dim(self._keys)
        _check_shapes(self.shapes, _expected_shapes(self._keys, config), self.path)
        self.files = checkpoint.files
        packed = (new for new, old in self._hf_names.items() if checkpoint.is_quantized(old))
        self.quantized: Mapping[str, BlockFormat | None] = dict.fromkeys(packed)

    def _names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """GGUF name -> HF name of the tensors to store."""
        useful: Iterable[str] = checkpoint.tensors
        if checkpoint.config.get("tie_word_embeddings"):
            # Some checkpoints save the tied matrix twice.
            useful = [name for name in useful if not name.endswith("lm_head.weight")]
        architecture = self._keys["general.architecture"]
        found = gguf_names(architecture, self.model.block_count, useful)
        names = {new: old for old, new in found.items()}
        if checkpoint.config.get("tie_word_embeddings") is False and "output.weight" not in names:
            raise ModelError(
                f"{self.path}: tensor lm_head.weight is missing, and tie_word_embeddings is false"
            )
        return names

    def metadata(self) -> dict[str, Any]:
        """See `Source.metadata`."""
        config, generation = self._checkpoint.config, self._checkpoint.generation_config
        parameters = sum(math.prod(shape) for shape in self.shapes.values())
        return {
            "general.architecture": self._keys["general.architecture"],
            "general.type": "model",
            **sampling_metadata(generation),
            **card_metadata(self.path, config, parameters),
            **self._keys,
            **self._vocabulary(config, generation),
        }

    def _vocabulary(self, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
        from edgeq.checkpoint.vocabulary import vocabulary_metadata

        keys = vocabulary_metadata(self.path, config, generation)
        if keys["tokenizer.ggml.model"] != "none":
            return keys
        self.warnings.append(f"{self.path}: no tokenizer found: the file will take token ids only")
        architecture = self._keys["general.architecture"]
        return {f"{architecture}.vocab_size": self.shapes["token_embd.weight"][0], **keys}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `Source.read`."""
        if name in self._extra:
            return self._extra[name].reshape(1, -1)
        w = self._checkpoint.read_rows(self._hf_names[name], start, stop)
        shape = self.shapes[name]
        if len(shape) == 1:  # heads lie along a vector as along the rows of a matrix
            return self._module.transform(name, w[0], self._checkpoint.config).reshape(1, -1)
        return self._module.transform(name, w, self._checkpoint.config)

    def copy(self, name: str, fmt: BlockFormat, start: int, stop: int) -> None:
        """See `Source.copy`."""
        return None

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        """See `Source.grid`."""
        if name not in self.quantized:
            return None
        grid = self._checkpoint.grid(self._hf_names[name], start, stop)
        if grid is None:
            return None
        rows = np.arange(stop - start, dtype=np.float32).reshape(-1, 1)
        moved = self._module.transform(name, rows, self._checkpoint.config)
        order = moved.astype(np.intp)[:, 0]
        return Grid(grid.q[order], grid.scale[order], grid.zero[order], grid.group)

    def factors(self, name: str, start: int, stop: int) -> None:
        """See `Source.factors`."""
        return None

    def close(self) -> None:
        """See `Source.close`."""
        self._checkpoint.close()


class GgufSource:
    """A GGUF file of floats, or any when quantizing again is allowed; see `Source`."""

    def __init__(self, path: Path, *, allow_requantize: bool = False) -> None:
        """Open and check `path`. Raises EdgeqError."""
        self.path, self.files, self.name = path, [path], path.stem
        self.row_step = 1
        self._gguf = open_gguf(path)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if not allow_requantize:
                _refuse_quantized(self._gguf)
            self.model = _model_of_gguf(self._gguf)
            stack.pop_all()
        tensors = self._gguf.tensors
        self.shapes = {name: info.shape for name, info in tensors.items()}
        self.formats = {name: info.format for name, info in tensors.items()}
        self.quantized: Mapping[str, BlockFormat | None] = {
            name: fmt for name, fmt in self.formats.items() if fmt.value != "x"
        }
        self.warnings = list(self._gguf.warnings)

    def metadata(self) -> dict[str, Any]:
        """See `Source.metadata`."""
        entries = self._gguf.typed_metadata()
        return {key: value for key, value in entries.items() if not key.startswith("split.")}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `Source.read`."""
        fmt = self._gguf.tensors[name].format
        raw = self._gguf.tensor(name)
        rows = raw.reshape(-1, raw.shape[-1])[start:stop]
        if fmt.value == "x":
            w = to_float32(rows.reshape(-1), fmt.name).reshape(stop - start, -1)
            w = np.array(w) if fmt.name == "F32" else w  # no view of what is forgotten
        else:
            w = blocks.decode(rows, fmt)
        self._gguf.forget(rows)
        bad = first_nonfinite(w)
        if bad is not None:
            row, column = divmod(bad, w.shape[1])
            raise ModelError(
                f"{self.path}: {name}: row {start + row}, column {column} = {w[row, column]}: "
                "expected a finite number: the file is damaged"
            )
        return w

    def copy(self, name: str, fmt: BlockFormat, start: int, stop: int) -> NDArray[np.uint8] | None:
        """See `Source.copy`."""
        if self._gguf.tensors[name].format.name != fmt.name or fmt.value == "x":
            return None
        raw = self._gguf.tensor(name)
        rows = raw.reshape(-1, raw.shape[-1])[start:stop]
        bad = blocks.find_nonfinite(rows, fmt)
        if bad is not None:
            row, block = divmod(bad, rows.shape[1] // fmt.bytes)
            raise ModelError(
                f"{self.path}: {name}: row {start + row}, block {block}: expected finite numbers: "
                "the file is damaged"
            )
        copied = np.array(rows)
        self._gguf.forget(rows)
        return copied

    def grid(self, name: str, start: int, stop: int) -> None:
        """See `Source.grid`."""
        return None

    def factors(self, name: str, start: int, stop: int) -> None:
        """See `Source.factors`."""
        return None

    def close(self) -> None:
        """See `Source.close`."""
        self._gguf.close()


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ModelError(f"config.json: architectures = {names!r}: expected a list of class names")
    return names


def _model_of_keys(keys: dict[str, Any]) -> Model:
    prefix = keys["general.architecture"]
    return Model(
        block_count=keys[f"{prefix}.block_count"],
        head_count=keys[f"{prefix}.attention.head_count"],
        head_count_kv=keys[f"{prefix}.attention.head_count_kv"],
        expert_count=keys.get(f"{prefix}.expert_count", 0),
    )


def _head_dim(keys: dict[str, Any]) -> int:
    prefix = keys["general.architecture"]
    even = keys[f"{prefix}.embedding_length"] // keys[f"{prefix}.attention.head_count"]
    return int(keys.get(f"{prefix}.attention.key_length", even))


def _expected_shapes(keys: dict[str, Any], config: dict[str, Any]) -> dict[str, Shape]:
    """Shape of each kind of tensor that hyper-parameters fix; a model need not have them all."""
    prefix = keys["general.architecture"]
    width, ffn = keys[f"{prefix}.embedding_length"], keys[f"{prefix}.feed_forward_length"]
    q = keys[f"{prefix}.attention.head_count"] * _head_dim(keys)
    kv = keys[f"{prefix}.attention.head_count_kv"] * _head_dim(keys)
    table = (integer(config, "vocab_size"), width)
    return {
        **dict.fromkeys(("token_embd.weight", "output.weight"), table),
        **dict.fromkeys(("output_norm.weight", "attn_norm.weight", "ffn_norm.weight"), (width,)),
        "attn_q.weight": (q, width),
        "attn_q.bias": (q,),
        **dict.fromkeys(("attn_k.weight", "attn_v.weight"), (kv, width)),
        **dict.fromkeys(("attn_k.bias", "attn_v.bias"), (kv,)),
        "attn_output.weight": (width, q),
        **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (ffn, width)),
        "ffn_down.weight": (width, ffn),
    }


def _model_of_gguf(gguf: Gguf) -> Model:
    keys = Hparams(gguf)
    heads = keys.integer("attention.head_count", 1, 1 << 20)
    return Model(
        block_count=keys.integer("block_count", 1, 1024),
        head_count=heads,
        head_count_kv=keys.integer("attention.head_count_kv", 1, heads, default=heads),
        expert_count=keys.integer("expert_count", 0, 1 << 16, default=0),
    )


def _refuse_quantized(gguf: Gguf) -> None:
    for name, info in gguf.tensors.items():
        if info.format.value != "x":
            raise RequestError(
                f"{gguf.path}: {name} is {info.format.name} already: quantizing twice adds errors: "
                "start from the original, or use `edgeq convert --allow-requantize`"
            )


def _in_layer_order(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Tables first, then layer by layer: the order in which inference reads them."""

    def order(name: str) -> tuple[int, str]:
        parts = name.split(".")
        return (int(parts[1]) if parts[0] == "blk" else -1, name)

    return {name: shapes[name] for name in sorted(shapes, key=order)}


def _check_complete(shapes: dict[str, Shape], block_count: int, path: Path) -> None:
    """Every layer has the tensors of layer 0, in the same shapes; the tables are there."""
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in shapes:
            raise ModelError(f"{path}: the tensor for {name} is missing")
    first = {name[6:]: shape for name, shape in shapes.items() if name.startswith("blk.0.")}
    if not first:
        raise ModelError(f"{path}: layer 0 has no tensors")
    for i in range(block_count):
        layer = {kind: shapes.get(f"blk.{i}.{kind}") for kind in first}
        wrong = next((kind for kind in first if layer[kind] != first[kind]), None)
        if wrong is not None:
            raise ModelError(
                f"{path}: layer {i}: {wrong} has shape {layer[wrong]}: expected {first[wrong]}, as "
                "in layer 0"
            )


def _check_shapes(shapes: dict[str, Shape], expected: dict[str, Shape], path: Path) -> None:
    for name, shape in shapes.items():
        kind = name.split(".", 2)[2] if name.startswith("blk.") else name
        if shape != expected.get(kind, shape):
            raise ModelError(
                f"{path}: the tensor for {name} has shape {shape}: expected {expected[kind]}, as "
                "config.json says"
            )
