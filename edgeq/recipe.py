"""Recipes: which tensor gets which block format, as data in formats/recipes/*.toml.

A recipe has a base format and ordered rules; of the rules that fit a tensor the last one wins. The
shipped recipes choose what llama.cpp's llama-quantize chooses. To make your own, copy one of the
files, edit it and pass its path.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from edgeq.blockformat import get
from edgeq.data import find, from_table, load_toml, save_toml, toml
from edgeq.errors import FormatError, RequestError
from edgeq.gguf.names import split

__all__ = [
    "Model",
    "Recipe",
    "Rule",
    "assign",
    "quantizable",
    "recipes",
    "save",
    "to_toml",
]


@dataclass(frozen=True, slots=True)
class Model:
    """What conditions in recipes can ask about."""

    block_count: int
    head_count: int
    head_count_kv: int
    expert_count: int = 0
    importance: bool = False  # quantized with activation statistics


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe; every condition that is given must hold.

    tensors: shell pattern of GGUF tensor names, with {a,b} alternatives.
    layers: "all", "first N", "first A/B" of the layers, or "more_bits".
    """

    tensors: str
    format: str
    layers: str = "all"
    tied: bool | None = None  # whether the file has no output.weight
    importance: bool | None = None
    min_gqa: int = 1  # query heads per key/value head, at least
    block_count: int | None = None
    expert_count: int | None = None

    def fits(self, name: str, layer: tuple[int, int], model: Model, tied: bool) -> bool:
        """Whether the rule is about the tensor; layer: its index among so many of its kind."""
        conditions = (
            self.tied in (None, tied),
            self.importance in (None, model.importance),
            self.min_gqa <= model.head_count // model.head_count_kv,
            self.block_count in (None, model.block_count),
            self.expert_count in (None, model.expert_count),
        )
        return all(conditions) and self._names(name) and _in_layers(self.layers, *layer)

    def _names(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in _alternatives(self.tensors))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named mixture of formats."""

    name: str  # as in file names and `general.file_type` lists: "Q4_K_M"
    file_type: int  # general.file_type
    base: str  # format of every matrix that no rule names
    about: str  # one line for help texts
    aliases: tuple[str, ...] = ()
    rule: tuple[Rule, ...] = ()
    # KL divergence per token, in nats, that it costs the example model (docs/quantization.md)
    divergence: float | None = None

    @staticmethod
    def load(name: "str | Path | Recipe") -> "Recipe":
        """Recipe by name or alias in any case, or from the TOML file at a path.

        Raises RequestError for an unknown name, FormatError for a malformed file.

        >>> Recipe.load("q4_k").name
        'Q4_K_M'
        """
        if isinstance(name, Recipe):
            return name
        if str(name).endswith(".toml"):
            return _read(Path(name))
        known = _shipped()
        if str(name).upper() not in known:
            raise RequestError(
                f"recipe {str(name)!r} is unknown: expected one of {', '.join(recipes())}, or the "
                "path of a .toml file"
            )
        return known[str(name).upper()]


def to_toml(recipe: Recipe) -> str:
    """Text of a recipe file that `Recipe.load` reads as the same recipe.

    >>> print(to_toml(Recipe("Mine", 15, "Q4_K", "", rule=(Rule("output.weight", "Q6_K"),))))
    name = "Mine"
    file_type = 15
    base = "Q4_K"
    about = ""
    aliases = []
    rule = [
        { tensors = "output.weight", format = "Q6_K" },
    ]
    <BLANKLINE>
    """
    head = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    rules = head.pop("rule")
    lines = [f"{key} = {toml(value)}" for key, value in head.items() if value is not None]
    return "\n".join([*lines, "rule = [", *map(_rule_line, rules), "]", ""])


def _rule_line(rule: Rule) -> str:
    given = {
        field.name: getattr(rule, field.name)
        for field in fields(rule)
        if getattr(rule, field.name) != field.default
    }
    return "    { " + ", ".join(f"{k} = {toml(v)}" for k, v in given.items()) + " },"


def save(recipe: Recipe, path: Path | str, *, force: bool = False) -> None:
    """Write a recipe file; under its name there is all of it, or what was there before.

    Raises RequestError, ResourceError.
    """
    save_toml(to_toml(recipe), path, force=force)


def recipes() -> list[str]:
    """Names of the shipped recipes, smallest file first.

    >>> recipes()[0], recipes()[-1]
    ('Q2_K', 'F32')
    """
    shipped = {recipe.name: recipe for recipe in _shipped().values()}
    return sorted(shipped, key=lambda name: (_base_bits(shipped[name]), len(shipped[name].rule)))


def _base_bits(recipe: Recipe) -> float:
    return get(recipe.base).bits_per_weight


@cache
def _shipped() -> dict[str, Recipe]:
    """Upper-case name or alias -> recipe."""
    found = [_read(path) for path in sorted((find("formats") / "recipes").glob("*.toml"))]
    return {name.upper(): recipe for recipe in found for name in (recipe.name, *recipe.aliases)}


def _read(path: Path) -> Recipe:
    recipe = from_table(Recipe, load_toml(path), str(path))
    for name in (recipe.base, *(rule.format for rule in recipe.rule)):
        try:
            get(name)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
    for rule in recipe.rule:
        if not _LAYERS.fullmatch(rule.layers):
            raise FormatError(
                f"{path}: layers = {rule.layers!r}: expected all, more_bits, first N or first A/B"
            )
    return recipe


# Tables and filters that are small, sensitive or read element by element.
_PLAIN = ("*_norm.weight", "*.ffn_gate_inp.weight", "*ssm_conv1d*", "*position_embd*")


def assign(
    recipe: Recipe, tensors: Iterable[tuple[str, tuple[int, ...]]], model: Model
) -> dict[str, str]:
    """Format name of every tensor. tensors: (GGUF name, shape with the row length last).

    Vectors and norms stay F32. A row that is not a multiple of the chosen format's block gets a
    format with smaller blocks, in the end F16.

    >>> tensors = [("token_embd.weight", (512, 896)), ("blk.0.ffn_down.weight", (896, 4864))]
    >>> assign(Recipe.load("Q4_K_S"), tensors, Model(1, 14, 2))
    {'token_embd.weight': 'Q8_0', 'blk.0.ffn_down.weight': 'Q4_K'}
    """
    shapes = dict(tensors)
    tied = "output.weight" not in shapes
    layers = _layers(shapes)
    return {
        name: _fitting(_choose(recipe, name, layers[name], model, tied), shape[-1])
        if quantizable(name, shape)
        else "F32"
        for name, shape in shapes.items()
    }


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether recipes decide about a tensor: a matrix, and none that must stay exact.

    >>> quantizable("blk.0.attn_q.weight", (64, 64)), quantizable("output_norm.weight", (64,))
    (True, False)
    """
    matrix = len(shape) >= 2 and name.endswith("weight")
    return matrix and not any(fnmatchcase(name, pattern) for pattern in _PLAIN)


def _choose(recipe: Recipe, name: str, layer: tuple[int, int], model: Model, tied: bool) -> str:
    chosen = recipe.base
    for rule in recipe.rule:
        if rule.fits(name, layer, model, tied):
            chosen = rule.format
    return chosen


# Smaller blocks for rows that are no multiple of 256; the choices are llama.cpp's.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


def _fitting(name: str, cols: int) -> str:
    fmt = get(name)
    if cols % fmt.block == 0:
        return fmt.name
    smaller = _FALLBACKS.get(fmt.name, "Q8_0")
    return smaller if cols % get(smaller).block == 0 else "F16"


def _layers(shapes: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Name -> index among the tensors of its kind in layer order, and their number.

    Counting tensors of a kind, not layers: in some models only certain layers have them.
    """
    named = sorted(shapes, key=_layer_number)
    kinds = Counter(split(name)[1] for name in named)
    seen: Counter[str] = Counter()
    layers = {}
    for name in named:
        kind = split(name)[1]
        layers[name] = (seen[kind], kinds[kind])
        seen[kind] += 1
    return layers


def _layer_number(name: str) -> int:
    layer = split(name)[0]
    return -1 if layer is None else layer


_LAYERS = re.compile(r"all|more_bits|first (\d+)(?:/(\d*[1-9]\d*))?")


def _in_layers(pattern: str, i: int, n: int) -> bool:
    """Whether tensor `i` of `n` of its kind is in the layers that `pattern` names.

    more_bits is llama.cpp's choice: the first and last eighth, and every third between.
    """
    if pattern == "more_bits":
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    match = _LAYERS.fullmatch(pattern)
    if match is None or match[1] is None:
        return True
    return i < (int(match[1]) if match[2] is None else n * int(match[1]) // int(match[2]))


@cache
def _alternatives(pattern: str) -> tuple[str, ...]:
    """Shell patterns without braces that together mean the same."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return (pattern,)
    head, tail = pattern[: match.start()], pattern[match.end() :]
    parts = [_alternatives(head + part + tail) for part in match[1].split(",")]
    return tuple(single for part in parts for single in part)
