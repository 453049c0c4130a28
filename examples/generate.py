"""Continue a text, token by token.

usage: python generate.py MODEL.gguf "Once upon a time"
"""

import sys

import edgeq


def main(path: str, prompt: str) -> None:
    with edgeq.load(path) as model:
        print(prompt, end="")
        for piece in model.generate(prompt, max_tokens=100, temperature=0.7, seed=1):
            print(piece, end="", flush=True)
        stats = model.stats
    # The first token comes with the prompt, the others take one pass each.
    passes = max(stats.generated_tokens - 1, 0)
    speed = f"{passes / stats.generation_seconds:.1f}" if passes else "-"
    print(f"\n\n{stats.generated_tokens} tokens, {speed} per second")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
    except KeyboardInterrupt:
        sys.exit(130)
