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
TASK_SHIFT = 9  # a task number: a count, and below it how many threads (1..256) the task is for

TILE_KEYS = 16  # keys side by side in the K cache
KEYS = 128  # keys per step of online softmax
PREFETCH = (
    4096  # bytes that a row is asked for in advance, unless a machine does better with others
)
COLUMNS = 4  # columns of activations that share one reading of a row of weights
ROWS_AT_ONCE = 16  # rows whose products with them are kept before they are written
SPARE = 4 * COLUMNS * ROWS_AT_ONCE  # bytes of these products; the scratch memory of rows follows
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
# which of their sums: f32 ones per group for rows, for panels those that panel.Lanes names;
# bias: 0 or address of f32[rows]; add: 1 to add to out. Threads take work in turns, from a counter
# at `taken` that is 0 before: `chunk` rows at a time, or `group` panels. ahead: bytes of a row that
# are asked for in advance; private: bytes from one thread's x, xd, xs to the next one's, 0: shared
MATMUL = (
    "state", "w", "rows", "cols", "row_bytes", "x", "xd", "xs", "out", "stride", "bias", "add",
    "scratch", "scratch_bytes", "group", "ahead", "chunk", "taken", "private",
)  # fmt: skip

# q, k, v f32[tokens][heads][head_dim]; cos, sin f32[tokens][pairs]; a pair is (i·step, i·step +
# gap); q_norm, k_norm: 0 or f32[head_dim]; scale multiplies q. Caches of one layer, f16: K
# [kv_head][context/16][head_dim][16], V [kv_head][context][padded head_dim]
ROPE = (
    "state", "q", "k", "v", "heads", "kv_heads", "head_dim", "pairs", "step", "gap", "cos", "sin",
    "q_norm", "k_norm", "eps", "scale", "k_cache", "v_cache", "context",
)  # fmt: skip

# q f32[tokens][heads][head_dim] (rotated, scaled); out the same shape
ATTEND = (
    "state", "q", "heads", "kv_heads", "head_dim", "k_cache", "v_cache", "context", "out",
    "scratch", "scratch_bytes",
)  # fmt: skip


def padded(head_dim: int) -> int:
    """Head dimension of V in the cache: whole vectors of every instruction set."""
    return (head_dim + 15) // 16 * 16


def attend_scratch(head_dim: int, queries: int) -> int:
    """Bytes per thread of an attention tile: queries, scores, sums and softmax statistics."""
    return 4 * queries * (head_dim + KEYS + padded(head_dim) + 4)


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


def matvec_scratch(cols: int) -> int:
    """Bytes per thread of a row product: sums, and for each column a factor per 16 weights."""
    return SPARE + COLUMNS * 4 * (-(-cols // 256) * 16)
