"""The smallest chat: the whole conversation goes to the model each time, what it knows is reused.

usage: python chat.py MODEL.gguf
"""

import sys

import edgeq


def main(path: str) -> None:
    messages: list[dict[str, str]] = []
    with edgeq.load(path) as model:
        for line in iter(lambda: input("> "), ""):  # an empty line ends the chat, as does Ctrl-D
            messages.append({"role": "user", "content": line})
            answer = ""
            for piece in model.chat(messages):
                answer += piece
                print(piece, end="", flush=True)
            messages.append({"role": "assistant", "content": answer})
            stats = model.stats
            print(f"\n[{stats.cached_tokens} tokens reused, {stats.prompt_tokens} read]")


if __name__ == "__main__":
    try:
        main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
    except (EOFError, KeyboardInterrupt):
        print()
