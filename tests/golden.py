"""Reference outputs: safetensors files of ids and logits, read without edgeq."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64}


def read(path: Path) -> tuple[list[int], NDArray[np.float32]]:
    """(input_ids, logits [n, vocab])."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def tensor(name: str) -> NDArray[Any]:
        entry = header[name]
        first, end = entry["data_offsets"]
        return np.frombuffer(data[start + first : start + end], _DTYPES[entry["dtype"]])

    ids = tensor("input_ids").tolist()
    return ids, tensor("logits").reshape(len(ids), -1)


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Norm of the difference relative to the norm of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
