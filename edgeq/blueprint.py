"""A model before it is converted or loaded: what each recipe would make of it, to the byte, and the
memory that it would take. Headers are read, weights are not.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from edgeq import blocks, cache, models
from edgeq.blocks import BlockFormat
from edgeq.errors import FormatError, ModelError
from edgeq.gguf import TensorSpec, outline
from edgeq.gguf.layout import DEFAULT_ALIGNMENT, aligned
from edgeq.kernels.layout import TILE_KEYS
from edgeq.loss import expected, of_type
from edgeq.models.arch import Arch
from edgeq.models.transformer import Transformer
from edgeq.models.weights import Matrix, sketch
from edgeq.passes import BATCH, OUTPUTS
from edgeq.pipeline import file_keys, specs_of
from edgeq.recipe import Model, Recipe, assign, recipes
from edgeq.sources import GgufSource, open_source
from edgeq.stream import nbytes

__all__ = ["Blueprint", "File", "of_arch", "read"]

AS_IS = "as it is"  # in place of a recipe's name
# Bytes of a process without a model: Python, NumPy, LLVM's run-time part, kernels.
PROCESS = 50 << 20
ENTRY = 40  # bytes of metadata per token of a vocabulary that is not at hand: text, type, merge


@dataclass(frozen=True)
class File:
    """A GGUF file as it would be."""

    recipe: str  # its name, or AS_IS
    nbytes: int
    data: int  # bytes of tensors
    weights: int
    formats: Mapping[str, BlockFormat]  # of every tensor
    arch: Arch | None  # None: the engine cannot run it
    divergence: float | None = None  # expected, see edgeq.loss

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data / self.weights

    @property
    def matrices(self) -> list[Matrix]:
        """What a token is multiplied with, without data; the last one only for logits."""
        return [] if self.arch is None else sketch(self.arch, self.formats).matrices

    def ram(
        self, context: int, kv: tuple[str, str], threads: tuple[int, int], isa: ModuleType
    ) -> int:
        """Bytes that a process needs that runs it: the whole file mapped, the KV cache, the
        buffers of the engine, the process itself.
        """
        if self.arch is None:
            return self.nbytes + PROCESS
        room = cache.rounded(context)
        store = cache.bytes_per_position(self.arch, kv) * room
        return self.nbytes + store + PROCESS + self._buffers(room, kv, threads, isa)

    def _buffers(
        self, room: int, kv: tuple[str, str], threads: tuple[int, int], isa: ModuleType
    ) -> int:
        assert self.arch is not None
        nothing = np.empty((0, 0), np.uint8)
        store = cache.KvCache(room, kv, (1, 1), (nothing, nothing), (0, 0))
        batch = min(BATCH, room)
        # Memory that is never written takes none: so the engine's own arithmetic is used.
        return Transformer(
            self.arch,
            sketch(self.arch, self.formats),
            store,
            isa,
            threads=max(threads),
            decoders=threads[0],
            batch=batch,
            outputs=min(OUTPUTS, batch),
        ).nbytes

    def largest_context(
        self, ram: int, kv: tuple[str, str], threads: tuple[int, int], isa: ModuleType
    ) -> int:
        """Positions, up to those of training, with which it needs at most `ram` bytes; 0: none."""
        if self.arch is None:
            return 0
        low, high = 0, self.arch.context_length
        if self.ram(high, kv, threads, isa) <= ram:
            return high
        while high - low > TILE_KEYS:
            middle = (low + high) // 2
            fits = self.ram(middle, kv, threads, isa) <= ram
            low, high = (middle, high) if fits else (low, middle)
        return low // TILE_KEYS * TILE_KEYS


@dataclass(frozen=True)
class Blueprint:
    """A model by its headers; files: by recipe, and as it is if that is a quantized GGUF file."""

    name: str
    files: Sequence[File]
    arch: Arch | None
    problem: str = ""  # why the engine cannot run it
    exact: bool = True  # whether sizes are; else a vocabulary was not at hand, and its size guessed


def read(path: Path | str) -> Blueprint:
    """Blueprint of a checkpoint folder or a GGUF file.

    Raises as `edgeq.sources.open_source`, and FormatError for a file without tensors.

    >>> plan = read("examples/tiny-home")
    >>> [(file.recipe, file.nbytes) for file in plan.files if file.recipe == "Q4_K_M"]
    [('Q4_K_M', 4748128)]
    """
    with contextlib.closing(open_source(path, allow_requantize=True)) as source:
        if not source.shapes:
            raise FormatError(f"{path}: no tensors: expected those of a model")
        metadata, model = source.metadata(), source.model
        made = {recipe: specs_of(source, recipe) for recipe in map(Recipe.load, recipes())}
        if isinstance(source, GgufSource) and source.quantized:
            made = _beside(source, metadata.get("general.file_type"), made)
    metadata = {**metadata, **file_keys(0)}
    gguf = outline(path, metadata, next(iter(made.values())))
    try:
        arch, problem = models.arch_of(gguf), ""
    except (ModelError, FormatError) as error:
        arch, problem = None, str(error)
    known = len(metadata.get("tokenizer.ggml.tokens", ())) > 0
    head = gguf.size + (0 if known or arch is None else ENTRY * arch.vocab_size)
    files = [
        _file(recipe, specs, head, arch, gguf.alignment, model) for recipe, specs in made.items()
    ]
    files.sort(key=lambda file: file.nbytes)
    return Blueprint(Path(path).name, files, arch, problem, exact=known or arch is None)


def _beside(
    source: GgufSource, file_type: object, made: dict[Recipe, list[TensorSpec]]
) -> dict[Recipe, list[TensorSpec]]:
    """A quantized file as it is, and what other recipes would make of the same model."""
    own = [TensorSpec(name, shape, source.formats[name]) for name, shape in source.shapes.items()]
    recipe = dataclasses.replace(of_type(file_type) or Recipe("", 0, "F32", ""), name=AS_IS)
    return {recipe: own} | {other: specs for other, specs in made.items() if specs != own}


def of_arch(name: str, arch: Arch, *, tied: bool, mixtures: Sequence[str]) -> Blueprint:
    """Blueprint of a model that only its properties are known of, in some recipes; tied: whether
    the embedding is the output matrix too.
    """
    shapes = dict(_shapes(arch, tied))
    model = Model(arch.block_count, arch.head_count, arch.head_count_kv)
    files = []
    for recipe in map(Recipe.load, mixtures):
        formats = assign(recipe, shapes.items(), model)
        specs = [TensorSpec(n, shape, blocks.get(formats[n])) for n, shape in shapes.items()]
        head = ENTRY * arch.vocab_size
        files.append(_file(recipe, specs, head, arch, DEFAULT_ALIGNMENT, model))
    return Blueprint(name, files, arch, exact=False)


def _file(
    recipe: Recipe,
    specs: Sequence[TensorSpec],
    head: int,
    arch: Arch | None,
    alignment: int,
    model: Model,
) -> File:
    data = sum(aligned(nbytes(spec), alignment) for spec in specs)
    weights = sum(math.prod(spec.shape) for spec in specs)
    formats = {spec.name: spec.format for spec in specs}
    names = {name: fmt.name for name, fmt in formats.items()}
    loss = expected(recipe, {spec.name: spec.shape for spec in specs}, names, model)
    return File(recipe.name, head + data, data, weights, formats, arch, loss)


def _shapes(arch: Arch, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ff = arch.embedding_length, arch.feed_forward_length
    q, kv = arch.head_count * arch.head_dim, arch.head_count_kv * arch.head_dim
    yield "token_embd.weight", (arch.vocab_size, width)
    yield "output_norm.weight", (width,)
    if not tied:
        yield "output.weight", (arch.vocab_size, width)
    for i in range(arch.block_count):
        for kind, shape in (
            ("attn_norm", (width,)),
            ("attn_q", (q, width)),
            ("attn_k", (kv, width)),
            ("attn_v", (kv, width)),
            ("attn_output", (width, q)),
            ("ffn_norm", (width,)),
            ("ffn_gate", (ff, width)),
            ("ffn_up", (ff, width)),
            ("ffn_down", (width, ff)),
        ):
            yield f"blk.{i}.{kind}.weight", shape
