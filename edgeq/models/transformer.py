"""A decoder-only transformer as a program of ops: the only place that knows the order of a layer's
parts.

Residual stream x f32 [tokens][embedding]. Per layer: norm, q k v, rope and cache, attention, output
added to x; norm, gate and up, SiLU gate, down added to x. What reads a matrix product's input is
prepared once (int8 with a scale per 32) and shared by its readers.
"""

import math
from collections.abc import Collection, Iterable
from itertools import cycle
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.cache import KvCache
from edgeq.kernels import layout
from edgeq.kernels.dot import sums_of
from edgeq.kernels.panel import lanes_of
from edgeq.kernels.program import Op, aligned, arguments
from edgeq.models.arch import Arch
from edgeq.models.inputs import Inputs
from edgeq.models.weights import Layer, Matrix, Weights
from edgeq.tuning import Tuning

__all__ = ["FEW", "Transformer"]

FEW = 7  # up to so many tokens weights are streamed row by row; above, panels are unpacked
PANEL_BYTES = 192 * 1024  # unpacked panels that a thread keeps in its L2 cache
DECODE_QUERIES = (1, 2, 4, 8)  # widths of the attention tile
PROMPT_QUERIES = 16

# Ops to walk, weights whose input is complete then, a view of it: f32 [tokens, cols].
Watched = tuple[list[Op], tuple[str, ...], NDArray[np.float32]]


class Transformer:
    """Buffers and ops of a model for up to `batch` tokens at once, and logits of up to `outputs` of
    them; for up to `threads` threads, of which `decoders` share the work of few tokens.
    """

    def __init__(
        self,
        arch: Arch,
        weights: Weights,
        kv: KvCache,
        isa: ModuleType,
        *,
        threads: int,
        decoders: int,
        batch: int,
        outputs: int,
        tuning: Tuning | None = None,
    ) -> None:
        self.arch, self.weights, self.kv, self.isa, self.threads = arch, weights, kv, isa, threads
        self.tuning, self._decoders = tuning or Tuning(), decoders
        self.state = np.zeros(2, np.int64)  # tokens in this batch, position of the first
        self.out_state = np.zeros(2, np.int64)  # how many of the last tokens want logits
        self.ids = np.zeros(batch, np.int32)
        pairs = arch.rope.dim // 2
        self.cos, self.sin = (
            np.zeros((batch, pairs), np.float32),
            np.zeros((batch, pairs), np.float32),
        )
        self._allocate(batch, outputs)

    @property
    def _share(self) -> int:
        return self.arch.head_count // self.arch.head_count_kv

    @property
    def _queries(self) -> int:
        """Width of the attention tile for few tokens: one token's heads of a group, up to 8."""
        return next((n for n in DECODE_QUERIES if n >= self._share), max(DECODE_QUERIES))

    # -- buffers -----------------------------------------------------------------------------------
    def _allocate(self, batch: int, outputs: int) -> None:
        a = self.arch
        q, kv = a.head_count * a.head_dim, a.head_count_kv * a.head_dim
        rows = -(-batch // self.isa.TILE_COLS) * self.isa.TILE_COLS
        widest = max(a.embedding_length, q, a.feed_forward_length)
        self._shared = Inputs(rows, widest)
        self._own = Inputs(min(FEW, batch), max(a.embedding_length, q), self.threads)
        self._taken = aligned(2 * layout.COUNTER * len(self.weights.matrices)).view(np.int64)
        self._counters = cycle(range(0, self._taken.nbytes, layout.COUNTER))
        self._bytes: dict[str, np.ndarray] = {}
        floats = {
            "x": batch * a.embedding_length,
            "q": batch * q,
            "k": batch * kv,
            "v": batch * kv,
            "gate": batch * a.feed_forward_length,
            "up": batch * a.feed_forward_length,
            "last": outputs * a.embedding_length,
        }
        for name, count in floats.items():
            self._bytes[name] = aligned(4 * count)
        tiles = a.head_count_kv * -(-FEW * self._share // self._queries)
        ranges = -(-self.kv.context // layout.KEYS)
        part = layout.attend_part(a.head_dim, self._queries)
        self._bytes["parts"] = aligned(tiles * ranges * part)
        self._bytes["done"] = aligned(8 * tiles)
        self.logits = aligned(4 * outputs * a.vocab_size).view(np.float32).reshape(outputs, -1)
        self._scratch_bytes = -(-max(self._scratch_sizes()) // 64) * 64
        self._scratch = aligned(self.threads * self._scratch_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        parts = [self.cos, self.sin, self.logits, self._scratch, *self._bytes.values()]
        own: int = sum(part.nbytes for part in parts)
        return own + self._shared.nbytes + self._own.nbytes

    def _scratch_sizes(self) -> Iterable[int]:
        lanes = self.isa.WIDTH // 4
        yield layout.MATVEC_SCRATCH
        yield layout.attend_scratch(self.arch.head_dim, PROMPT_QUERIES)
        for m in self.weights.matrices:
            panels = self._panels(m) * self._panel_bytes(m)
            yield layout.matmul_scratch(panels, lanes, self.isa.TILE_COLS)

    def _panel_bytes(self, m: Matrix) -> int:
        lanes = self.isa.WIDTH // 4
        return layout.panel_bytes(m.cols, m.format.group, lanes, m.format.value == "x")

    def _panels(self, m: Matrix) -> int:
        return max(PANEL_BYTES // self._panel_bytes(m), 1)

    def _at(self, name: str) -> int:
        return int(self._bytes[name].ctypes.data)

    def start(self) -> None:
        """To be called before a program runs: no work is taken yet."""
        self._taken.fill(0)

    # -- programs ----------------------------------------------------------------------------------
    def body(self, *, many: bool) -> list[Op]:
        """Token ids to the residual stream after the last layer."""
        e = self.weights.token_embd
        where = {"state": _address(self.state), "ids": _address(self.ids), "out": self._at("x")}
        embed = arguments(layout.EMBED, w=e.address, row_bytes=e.row_bytes, cols=e.cols, **where)
        ops = [Op(f"embed/{e.format.name}", embed)]
        for index, layer in enumerate(self.weights.layers):
            ops += [*self._attention(layer, index, many), *self._feed_forward(layer, many)]
        return ops

    def head(self, *, many: bool) -> list[Op]:
        """Residual stream of the last tokens to their logits."""
        state, out_state = _address(self.state), _address(self.out_state)
        where = {"x": self._at("x"), "out": self._at("last"), "cols": self.arch.embedding_length}
        gather = Op("gather", arguments(layout.GATHER, state=state, out_state=out_state, **where))
        output = self.weights.output
        norm = self._norm("last", self.weights.output_norm, [output], many, state=self.out_state)
        target = int(self.logits.ctypes.data)
        product = self._product(output, target, output.rows, many, state=self.out_state)
        return [gather, norm, product]

    def watched(self, wanted: Collection[str] | None = None) -> list[Watched]:
        """The body for many tokens, cut after each op that completes the input of wanted weights,
        by default all; nothing after the last. The output matrix has the input that all tokens
        would give it.
        """
        output = self.weights.output
        cols = {m.name: m.cols for m in self.weights.matrices}
        pieces, ops = list[Watched](), list[Op]()
        last = self._norm("x", self.weights.output_norm, [output], many=True)
        for op in [*self.body(many=True), last]:
            ops.append(op)
            names = tuple(name for name in op.feeds if wanted is None or name in wanted)
            if names:
                pieces.append((ops, names, self._shared.floats(cols[names[0]])))
                ops = []
        return pieces

    def _attention(self, layer: Layer, index: int, many: bool) -> list[Op]:
        a = self.arch
        inputs = [layer.attn_q, layer.attn_k, layer.attn_v]
        products = [
            self._product(m, self._at(name), m.rows, many, barrier=m is inputs[-1])
            for m, name in zip(inputs, ("q", "k", "v"), strict=True)
        ]
        m, mixed = layer.attn_output, self._shared.at("h")
        plain = m.format.value == "x"  # reads what attention leaves, as it is
        ready = [] if plain else [self._prepare(mixed, [m], m.cols, many)]
        out = self._product(m, self._at("x"), a.embedding_length, many, add=True, shared=plain)
        norm = self._norm("x", layer.attn_norm, inputs, many)
        attend = self._attend(index, many, (m.name,) if plain else ())
        return [norm, *products, self._rope(layer, index), attend, *ready, out]

    def _feed_forward(self, layer: Layer, many: bool) -> list[Op]:
        inputs, width = [layer.ffn_gate, layer.ffn_up], self.arch.feed_forward_length
        turn = self.tuning.turn(width, self._decoders, step=32, matrices=2)
        gate, up = (
            self._product(m, self._at(name), width, many, barrier=name == "up", turn=turn)
            for m, name in zip(inputs, ("gate", "up"), strict=True)
        )
        ready = self._prepare(
            self._at("gate"), [layer.ffn_down], width, many, mode=2, weight=self._at("up")
        )
        parts = [gate, up, ready]
        norm = self._norm("x", layer.ffn_norm, inputs, many)
        x, stride = self._at("x"), self.arch.embedding_length
        down = self._product(layer.ffn_down, x, stride, many, add=True, shared=True)
        return [norm, *(parts if many else [self._gated(layer, parts)]), down]

    def _gated(self, layer: Layer, parts: list[Op]) -> Op:
        """Gate, up and what their product is prepared for, as one op."""
        blocks = dict(zip(layout.GATED, (_address(op.args) for op in parts), strict=True))
        formats = f"{layer.ffn_gate.format.name}.{layer.ffn_up.format.name}"
        return Op(f"gated/{formats}", arguments(layout.GATED, **blocks), within=tuple(parts))

    # -- ops ---------------------------------------------------------------------------------------
    def _norm(
        self,
        source: str,
        weight: np.ndarray,
        readers: list[Matrix],
        many: bool,
        state: np.ndarray | None = None,
    ) -> Op:
        width = self.arch.embedding_length
        return self._prepare(
            self._at(source), readers, width, many, mode=1, weight=_address(weight), state=state
        )

    def _prepare(
        self,
        source: int,
        readers: list[Matrix],
        width: int,
        many: bool,
        *,
        mode: int = 0,
        weight: int = 0,
        state: np.ndarray | None = None,
    ) -> Op:
        """Norm (mode 1) or gate (2) of `source`, quantized if a reader wants codes.

        Of few tokens every thread makes its own copy, without waiting for others; but not of the
        gate, which is long.
        """
        quantized = any(m.format.value != "x" for m in readers)
        to = self._shared if many or mode == 2 else self._own
        parts = ("h", "d", "sums16", "sums32", "ints16", "ints32")
        args = arguments(
            layout.PREPARE,
            state=_address(self.state if state is None else state),
            mode=mode,
            x=source,
            x_stride=width,
            weight=weight,
            eps=float(self.arch.rms_epsilon),
            cols=width,
            q=to.at("codes") if quantized else 0,
            **{name: to.at(name) for name in parts},
            private=to.private,
        )
        barrier = to is self._shared
        feeds = tuple(m.name for m in readers)
        return Op(f"prepare/{self.isa.TILE_COLS if many else 1}", args, barrier, feeds=feeds)

    def _product(
        self,
        m: Matrix,
        out: int,
        stride: int,
        many: bool,
        *,
        add: bool = False,
        barrier: bool = True,
        shared: bool = False,
        state: np.ndarray | None = None,
        turn: int | None = None,
    ) -> Op:
        """out (+)= m · what `_prepare` left, in the threads' copies or, with `shared`, for all; a
        thread takes `turn` rows at a time.
        """
        plain = m.format.value == "x"
        given = self._shared if many or shared else self._own
        args = arguments(
            layout.MATMUL,
            state=_address(self.state if state is None else state),
            w=m.address,
            rows=m.rows,
            cols=m.cols,
            row_bytes=m.row_bytes,
            x=given.at("h" if plain else "codes"),
            xd=given.at("d"),
            xs=given.at(self._sums(m, many)),
            out=out,
            stride=stride,
            bias=0 if m.bias is None else _address(m.bias),
            add=int(add),
            scratch=_address(self._scratch),
            scratch_bytes=self._scratch_bytes,
            group=self._panels(m),
            ahead=self.tuning.distance(m.format),
            chunk=turn or self.tuning.turn(m.rows, self._decoders),
            taken=_address(self._taken) + next(self._counters),
            private=given.private,
        )
        return Op(f"{'matmul' if many else 'matvec'}/{m.format.name}", args, barrier)

    def _sums(self, m: Matrix, many: bool) -> str:
        """Which sums of activations a product with `m` reads."""
        if many and m.format.value != "x":
            return lanes_of(m.format, self.isa).sums
        return sums_of(m.format, self.isa)

    def _heads(self, index: int) -> dict[str, int]:
        """What rope and attention share: counts and one layer's caches."""
        a = self.arch
        return {
            "state": _address(self.state),
            "heads": a.head_count,
            "kv_heads": a.head_count_kv,
            "head_dim": a.head_dim,
            "v_turn": self.kv.turns[1],
            "context": self.kv.context,
            **self.kv.addresses(index),
        }

    def _rope(self, layer: Layer, index: int) -> Op:
        a, halves = self.arch, self.arch.rope.style == "neox"
        args = arguments(
            layout.ROPE,
            **self._heads(index),
            **{name: self._at(name) for name in ("q", "k", "v")},
            pairs=a.rope.dim // 2,
            step=1 if halves else 2,
            gap=a.rope.dim // 2 if halves else 1,
            cos=_address(self.cos),
            sin=_address(self.sin),
            q_norm=0 if layer.attn_q_norm is None else _address(layer.attn_q_norm),
            k_norm=0 if layer.attn_k_norm is None else _address(layer.attn_k_norm),
            eps=float(a.rms_epsilon),
            scale=1 / math.sqrt(a.head_dim),
            k_turn=self.kv.turns[0],
        )
        return Op(f"rope/{'.'.join(self.kv.types)}", args)

    def _attend(self, index: int, many: bool, feeds: tuple[str, ...]) -> Op:
        """A prompt's work items see all keys, those of few tokens one range of them each."""
        scratch = {"scratch": _address(self._scratch), "scratch_bytes": self._scratch_bytes}
        args = arguments(
            layout.ATTEND,
            **self._heads(index),
            **scratch,
            q=self._at("q"),
            out=self._shared.at("h"),
            span=-(-self.kv.context // layout.KEYS) if many else 1,
            parts=self._at("parts"),
            done=self._at("done"),
        )
        queries = PROMPT_QUERIES if many else self._queries
        return Op(f"attend/{queries}.{'.'.join(self.kv.types)}", args, feeds=feeds)


def _address(array: Any) -> int:
    return int(array.ctypes.data)
