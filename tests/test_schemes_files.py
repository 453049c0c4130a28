"""Where a checkpoint says how it was quantized: in config.json, or as older tools did beside it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from tiny_checkpoint import CONFIG

from edgeq.checkpoint import open_checkpoint
from edgeq.errors import ModelError

GPTQ = {"bits": 3, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("file", "settings", "pack"),
    [
        ("quantize_config.json", GPTQ, partial(packers.gptq, bits=3, symmetric=False, index=False)),
        ("quant_config.json", AWQ, packers.awq),
    ],
)
def test_settings_may_stand_in_a_file_of_their_own(
    tmp_path: Path, rng: np.random.Generator, file: str, settings: Any, pack: Any
) -> None:
    weights = packers.write_quantized(tmp_path, CONFIG, {}, partial(pack, rng))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / file).write_text(json.dumps(settings))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == weights.keys()
        for tensor, w in weights.items():
            np.testing.assert_allclose(checkpoint.read(tensor), w, rtol=2e-6, atol=1e-7)
    (tmp_path / file).write_text(json.dumps({**settings, "bits": 5, "w_bit": 5}))
    with pytest.raises(ModelError, match="bits = 5"):
        open_checkpoint(tmp_path)
