"""Where things lie in the memory that Python and the kernels share: argument blocks, sync words,
caches.

Plain numbers, so that the engine's process reads them without importing a compiler.
"""

LINE = 16  # int64 words per cache line, and its neighbour that is fetched along
ARRIVED, GENERATION, TASK, BLOCK, YIELD, CPU, WALK, STOP, CANCEL, HALT, WHERE = (
    LINE * i for i in range(11)
)
SYNC_WORDS = WHERE  # and from there on, one line per thread: the CPU it was last seen on
WORDS_PER_OP = 3  # kernel address, argument block, 1 if a barrier follows
BLOCK_WORDS = 5  # program block: address of the ops, their count, sync block, task, barrier spins
COUNTER = 8 * LINE  # bytes from one counter of work to the next
TASK_SHIFT = 9  # a task number: a count, and below it how many threads (1..256) the task is for

TILE_KEYS = 32  # keys side by side in the K cache
KEYS = 256  # keys per step of softmax; such ranges of one sequence are shared among threads
KV_BITS = {"f16": 16, "bf16": 16, "f32": 32, "q8_0": 8, "q4_0": 4}  # of one cached value
# Bytes that a row is asked for in advance, unless a machine does better with others.
PREFETCH = 8192
COLUMNS = 4  # columns of activations that share one reading of a row of weights
ROWS_AT_ONCE = 16  # rows whose products with them are kept before they are written
MATVEC_SCRATCH = 4 * COLUMNS * ROWS_AT_ONCE  # bytes per thread of these products
DOT_CHAINS = 12  # independent sums of the dot-product probe: more than its latency

# Argument blocks, by kernel. Everywhere: state = [tokens, first position]; eps, scale: f32 bits;
# strides in f32 words.

# ids i32[tokens]; out f32[tokens][cols]
EMBED = ("state", "ids", "w", "row_bytes", "cols", "out")

# out_state = [rows to copy]: the last rows of x go to out
GATHER = ("state", "out_state", "x", "out", "cols")

# mode 0: h is x; 1: h = rms norm of x by weight; 2: h = silu(x) * weight. Then, if q != 0, h is
# quantized. h f32[tokens][cols]; q, d, sums, ints as rows.quantize_row leaves them; x_stride also
# for weight in mode 2; private: each thread does all of it, its h, q, d, sums so many bytes behind
# those of the one before; 0: they share the work
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
    "ints16",
    "ints32",
    "private",
)

# x, xd, xs: activations as rows.quantize_row leaves them (float formats: x f32[token][cols]), and
# which of their sums: for rows those of dot.sums_of, for panels those that panel.Lanes names;
# bias: 0 or address of f32[rows]; add: 1 to add to out. Threads take work in turns, from a counter
# at `taken` that is 0 before: `chunk` rows at a time, or `group` panels. ahead: bytes of a row that
# are asked for in advance; private: bytes from one thread's x, xd, xs to the next one's, 0: shared
MATMUL = (
    "state", "w", "rows", "cols", "row_bytes", "x", "xd", "xs", "out", "stride", "bias", "add",
    "scratch", "scratch_bytes", "group", "ahead", "chunk", "taken", "private",
)  # fmt: skip

# Addresses of argument blocks: MATMUL of the gate and of the matrix beside it, whose `chunk` is a
# multiple of 32, and PREPARE of what they give, with mode 2
GATED = ("gate", "up", "prepare")

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
