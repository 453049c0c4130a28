"""Peak memory of converting a large sharded checkpoint: `python tests/bench/memory.py FOLDER
[--layers 32] [--recipe Q4_K_M]`.

Writes a checkpoint of Llama-2-7B's shape, one shard for every four layers, whose weights are holes:
13 GB that take no space on the disk. Then converts it in a process of its own. Zeros cost as much
memory as other weights do. FOLDER is removed afterwards.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

WIDTH, FF, HEADS, VOCAB, LAYERS_PER_SHARD = 4096, 11008, 32, 32000, 4

CONVERT = "import sys, edgeq; edgeq.convert(*sys.argv[1:])"


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer by name."""
    at = f"model.layers.{i}."
    square = dict.fromkeys((f"self_attn.{n}_proj" for n in "qkvo"), (WIDTH, WIDTH))
    wide = {"mlp.gate_proj": (FF, WIDTH), "mlp.up_proj": (FF, WIDTH), "mlp.down_proj": (WIDTH, FF)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDTH,))
    return {f"{at}{name}.weight": shape for name, shape in (square | wide | norms).items()}


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 zeros that are not stored."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_checkpoint(folder: Path, layers: int) -> int:
    """The whole checkpoint; returns its size in bytes."""
    table = (VOCAB, WIDTH)
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    shards = [ends | {"model.norm.weight": (WIDTH,)}]
    for first in range(0, layers, LAYERS_PER_SHARD):
        some = range(first, min(first + LAYERS_PER_SHARD, layers))
        shards.append({name: shape for i in some for name, shape in layer(i).items()})
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for name, shapes in zip(names, shards):
        write_shard(folder / name, shapes)
    where = {tensor: name for name, shapes in zip(names, shards) for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum((folder / name).stat().st_size for name in names)


def main() -> None:
    """Write, convert, report, remove."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="a new folder, for the files of this run")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", default="Q4_K_M")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        size, out = write_checkpoint(args.folder, args.layers), args.folder / "out.gguf"
        command = [sys.executable, "-c", CONVERT, str(args.folder), str(out), args.recipe]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit("the conversion failed")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        print(f"{args.layers} layers, {size / 1e9:.1f} GB -> {out.stat().st_size / 1e9:.1f} GB")
        print(f"peak resident memory: {peak:.0f} MB")
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
