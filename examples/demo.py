"""Ask a model three questions, as a home assistant on a small board would be asked.

usage: python demo.py MODEL.gguf
"""

import resource
import sys

import edgeq

QUESTIONS = [
    "Turn off the heater in the garage.",
    "What is the capital of Japan?",
    "What day comes 2 days after Friday?",
]


def main(path: str) -> None:
    tokens, passes, seconds = 0, 0, 0.0
    with edgeq.load(path, on_compile=show_compilation) as model:
        for question in QUESTIONS:
            print(f"\n> {question}")
            for piece in model.chat([{"role": "user", "content": question}], temperature=0):
                print(piece, end="", flush=True)
            print()
            tokens += model.stats.generated_tokens
            passes += model.stats.generated_tokens - 1  # the first comes with the prompt
            seconds += model.stats.generation_seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    rate = f"{passes / seconds:.0f}" if passes else "-"
    print(
        f"\n{tokens} tokens at {rate} tok/s, peak RAM {peak:.0f} MiB, "
        f"{model.threads} threads, {model.isa}"
    )


def show_compilation(kernel: str, done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[Kcompiling kernels for this CPU, once: {done}/{total} {kernel}", end="")
        print("\r\x1b[K" * (done == total), end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
