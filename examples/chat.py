"""The smallest chat: the whole conversation goes to the model each time, what it knows is reused.

usage: python chat.py MODEL.gguf
"""

import sys

import edgeq


def main(path: str) -> None:
    model = edgeq.load(path)
    messages: list[dict[str, str]] = []
    for line in iter(lambda: input("> "), ""):  # an empty line ends the chat
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in model.chat(messages):
            answer += piece
            print(piece, end="", flush=True)
        messages.append({"role": "assistant", "content": answer})
        stats = model.stats
        print(f"\n[{stats.cached_tokens} tokens reused, {stats.prompt_tokens} read]")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
