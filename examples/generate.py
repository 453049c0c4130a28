"""Continue a text, token by token.

usage: python generate.py MODEL.gguf "Once upon a time"
"""

import sys

import edgeq


def main(path: str, prompt: str) -> None:
    model = edgeq.load(path)
    print(prompt, end="")
    for piece in model.generate(prompt, max_tokens=100, temperature=0.7, seed=1):
        print(piece, end="", flush=True)
    stats = model.stats
    speed = stats.generated_tokens / max(stats.generation_seconds, 1e-9)
    print(f"\n\n{stats.generated_tokens} tokens, {speed:.1f} per second")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
