"""Where things lie in the memory that Python and the kernels share: argument blocks, sync words,
caches.

Plain numbers, so that the engine's process reads them without importing a compiler.
"""

LINE = 16  # int64 words per cache line, and its neighbour that is fetched along
ARRIVED, GENERATION, TASK, BLOCK, SPIN, IDLE_SPIN, YIELD, WALK, STOP, CANCEL, HALT = (
    LINE * i for i in range(11)
)
SYNC_WORDS = 11 * LINE
WORDS_PER_OP = 3  # kernel address, argument block, 1 if a barrier follows
BLOCK_WORDS = 4  # program block: address of the ops, their count, sync block, threads

TILE_KEYS = 32  # keys side by side in the K cache
KEYS = 256  # keys per step of softmax; such ranges of one sequence are shared among threads
KV_BITS = {"f16": 16, "bf16": 16, "f32": 32, "q8_0": 8, "q4_0": 4}  # of one cached value
COLUMNS = 4  # columns of activations that share one reading of a row of weights
DOT_CHAINS = 12  # independent sums of the dot-product probe: more than its latency

# Argument blocks, by kernel. Everywhere: state = [tokens, first position]; eps, scale: f32 bits;
# strides in f32 words.

# ids i32[tokens]; out f32[tokens][cols]
EMBED = ("state", "ids", "w", "row_bytes", "cols", "out")

# out_state = [rows to copy]: the last rows of x go to out
GATHER = ("state", "out_state", "x", "out", "cols")

# mode 0: h is there; 1: h = rms norm of x by weight; 2: h = silu(x) * weight. Then, if q != 0, h is
# quantized. h f32[tokens][cols]; q, d, sums16, sums32 as rows.quantize_row leaves them; x_stride
# also for weight in mode 2
PREPARE = (
    "state",
    "mode",
    "x",
    "x_stride",
    "weight",
    "eps",
    "cols",
    "h",
    "q",
    "d",
    "sums16",
    "sums32",
)

# x, xd, xs: activations as rows.quantize_row leaves them (float formats: x f32[token][cols]);
# bias: 0 or address of f32[rows]; add: 1 to add to out; group: panels unpacked at a time
MATMUL = (
    "state", "w", "rows", "cols", "row_bytes", "x", "xd", "xs", "out", "stride", "bias", "add",
    "scratch", "scratch_bytes", "group",
)  # fmt: skip

# q, k, v f32[tokens][heads][head_dim]; cos, sin f32[tokens][pairs]; a pair is (i·step, i·step +
# gap); q_norm, k_norm: 0 or f32[head_dim]; scale multiplies q. k_turn (also for q) and v_turn: size
# of the blocks of a head that a Hadamard matrix turns, 1 = none. Caches of one layer: see `kv_wide`
ROPE = (
    "state", "q", "k", "v", "heads", "kv_heads", "head_dim", "pairs", "step", "gap", "cos", "sin",
    "q_norm", "k_norm", "eps", "scale", "k_turn", "v_turn", "k_cache", "v_cache", "k_scales",
    "v_scales", "context",
)  # fmt: skip

# q f32[tokens][heads][head_dim] (rotated, scaled); out the same shape. A work item is `span` ranges
# of KEYS keys; where a tile of queries has several items, they leave parts (see `attend_part`) and
# count in `done` i64[kv_head][tile], zero between calls
ATTEND = (
    "state", "q", "heads", "kv_heads", "head_dim", "v_turn", "k_cache", "v_cache", "k_scales",
    "v_scales", "context", "out", "scratch", "scratch_bytes", "span", "parts", "done",
)  # fmt: skip


def kv_blocks(kind: str) -> bool:
    """Whether a type of the KV cache has codes, with an f16 scale per 32 values of a head."""
    return kind.startswith("q")


def kv_wide(kind: str, head_dim: int) -> int:
    """Values that a cached head takes: whole blocks, and whole vectors of every instruction set.

    K is [kv_head][context/TILE_KEYS][values][TILE_KEYS] (q8_0: words of four values, q4_0: words
    whose low bits are four values and whose high bits are the next four), V [kv_head][context]
    [values]; scales of both are [kv_head][context/TILE_KEYS][values/32][TILE_KEYS].
    """
    unit = 32 if kv_blocks(kind) else 16
    return (head_dim + unit - 1) // unit * unit


def kv_bytes(kind: str, head_dim: int) -> tuple[int, int]:
    """Bytes of one head at one position: values or codes, scales."""
    wide = kv_wide(kind, head_dim)
    return wide * KV_BITS[kind] // 8, 2 * wide // 32 if kv_blocks(kind) else 0


def attend_scratch(head_dim: int, queries: int) -> int:
    """Bytes per thread of a tile of attention: queries, scores, scores times scales, sums, softmax
    statistics.
    """
    return 4 * queries * (2 * KEYS) + attend_part(head_dim, queries) + 4 * queries * _even(head_dim)


def attend_part(head_dim: int, queries: int) -> int:
    """Bytes of what one item says about a tile of queries: sums, then four words of statistics."""
    return 4 * queries * (_even(head_dim) + 4)


def _even(head_dim: int) -> int:
    return (head_dim + 31) // 32 * 32


def panel_bytes(cols: int, group: int, lanes: int, plain: bool) -> int:
    """Bytes of an unpacked panel: words of four codes (floats: one f32 each) and two scales per
    group, for `lanes` rows.
    """
    return 4 * lanes * (cols if plain else cols // 4 + 2 * (cols // group))


def matmul_scratch(panels: int, lanes: int, columns: int) -> int:
    """Bytes per thread of a panel product: `panels` bytes of panels, a row buffer, a tile of
    results.
    """
    return panels + 256 * lanes + 4 * lanes * columns
