"""A conversation in the terminal: a turn, its statistics, the loop with its /commands."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq import memory
from edgeq.cli._terminal import harmless, human, is_terminal, note
from edgeq.errors import EdgeqError, RequestError
from edgeq.sampler import Sampler

if TYPE_CHECKING:
    from edgeq.chat import ChatTemplate
    from edgeq.engine import Model

__all__ = ["Chat", "loop", "reader", "report", "statistics"]

Read = Callable[[str], str]  # prompt -> one line; EOFError: no more, KeyboardInterrupt: dropped

_QUOTES = '"""'


@dataclass
class Chat:
    """A model, how to sample from it, and what was said. Without a template: plain continuation."""

    model: "Model"
    template: "ChatTemplate | None"
    system: str | None = None
    max_tokens: int = -1
    sampling: dict[str, Any] = field(default_factory=dict)  # settings that were given
    draft_ngram: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Stream the answer to stdout and remember it. Raises: EdgeqError, KeyboardInterrupt.

        What was answered before an interruption is remembered; a question without answer is not.
        """
        said: list[str] = []
        self.messages.append({"role": "user", "content": text})
        pieces = self._answer()
        try:
            for piece in pieces:
                _write(piece)
                said.append(piece)
        finally:
            close = getattr(pieces, "close", None)
            if close:
                close()
            answer = "".join(said)
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
                if not answer.endswith("\n"):
                    _write("\n")
            else:
                self.messages.pop()

    def _answer(self) -> Iterator[str]:
        from edgeq.chat import encode_chat

        options: dict[str, Any] = {"max_tokens": self.max_tokens, **self.sampling}
        if self.draft_ngram:
            options["draft_ngram"] = True
        if self.template is None:
            return self.model.generate(self.messages[-1]["content"], **options)
        first = [{"role": "system", "content": self.system}] if self.system else []
        ids = encode_chat(self.model.tokenizer, self.template, first + self.messages)
        return self.model.generate(ids, **options)

    def clear(self) -> None:
        self.messages.clear()


def _write(text: str) -> None:
    sys.stdout.write(harmless(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def statistics(model: "Model") -> str:
    """One line: counts and speeds of the last answer, memory, threads, instruction set."""
    s = model.stats
    cached = f" + {s.cached_tokens} cached" if s.cached_tokens else ""
    return " | ".join(
        [
            f"prompt {s.prompt_tokens}{cached} tok, {_rate(s.prompt_tokens, s.prompt_seconds)}",
            # The first token comes from the prompt's logits.
            f"answer {s.generated_tokens} tok, "
            f"{_rate(s.generated_tokens - 1, s.generation_seconds)}",
            f"peak RAM {human(memory.peak())}",
            _kv_cache(model),
            f"{model.threads} thread{'s' if model.threads > 1 else ''}",
            model.isa,
        ]
    )


def _kv_cache(model: "Model") -> str:
    """Size and type of the KV cache; of keys and of values, where they differ."""
    return f"KV cache {human(model.kv_bytes)} {'/'.join(dict.fromkeys(model.kv_types))}"


def report(model: "Model", *, chatting: bool) -> None:
    """Tell how the last answer went, and whether it was cut."""
    if model.stats.finish == "context":
        larger = ["-c N for a larger one"] * (model.ctx < model.arch.context_length)
        advice = ", ".join([*larger, *["/clear to start over"] * chatting])
        note(f"cut: the context of {model.ctx} tokens is full{': ' * bool(advice)}{advice}")
    note(statistics(model))


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f} tok/s" if count > 0 and seconds > 0 else "- tok/s"


def loop(chat: Chat, read: Read) -> None:
    """Read, answer, repeat, until /bye or the end of input."""
    note(f"context {chat.model.ctx} tokens, {_kv_cache(chat.model)}")
    note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            text, quoted = _message(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-D or /bye leaves")
            continue
        if text.startswith("/") and not quoted:
            if _obey(chat, text):
                return
        elif text.strip():
            _turn(chat, text)


def _message(read: Read) -> tuple[str, bool]:
    """One line, or the lines between two triple quotes; and whether it was quoted."""
    line = read(">>> ")
    if not line.lstrip().startswith(_QUOTES):
        return line.strip(), False
    line = line.lstrip().removeprefix(_QUOTES)
    lines = [line]
    while not line.rstrip().endswith(_QUOTES):
        line = read("... ")
        lines.append(line)
    lines[-1] = line.rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n"), True


def _turn(chat: Chat, text: str) -> None:
    try:
        chat.ask(text)
    except KeyboardInterrupt:
        note("stopped")
    except EdgeqError as error:
        note(f"edgeq: {error}")
    else:
        report(chat.model, chatting=True)


def _obey(chat: Chat, text: str) -> bool:
    """Carry out a /command; True means leave."""
    name, _, argument = text[1:].partition(" ")
    action = _COMMANDS.get(name.lower())
    if action is None:
        note(f"/{name}: no such command: /help lists them")
        return False
    try:
        return bool(action(chat, argument.strip()))
    except EdgeqError as error:
        note(f"edgeq: {error}")
        return False


def _help(chat: Chat, argument: str) -> None:
    note(_HELP)


def _clear(chat: Chat, argument: str) -> None:
    chat.clear()
    note("conversation forgotten")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        note(f"system message: {chat.system or '(none)'}")
        return
    if chat.template is None:
        raise RequestError("/system: this model has no chat template, so no system message either")
    chat.system = argument
    chat.clear()
    note("system message set, conversation forgotten")


def _set(chat: Chat, argument: str) -> None:
    """/set NAME VALUE changes a sampling setting; /set alone shows them all."""
    words = argument.split()
    names = {f.name for f in fields(Sampler)}
    if len(words) == 2 and words[0] in names:
        changed = {**chat.sampling, words[0]: _number(words[1])}
        Sampler.from_metadata(chat.model.gguf.metadata, **changed)  # refuses values out of range
        chat.sampling = changed
    elif words:
        raise RequestError(f"/set: expected NAME VALUE, NAME one of {', '.join(sorted(names))}")
    settings = Sampler.from_metadata(chat.model.gguf.metadata, **chat.sampling)
    shown = ((f.name, getattr(settings, f.name)) for f in fields(Sampler))
    note(", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown))


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _stats(chat: Chat, argument: str) -> None:
    note(statistics(chat.model))
    note(f"context {chat.model.ctx} tokens, {_kv_cache(chat.model)}")


def _bye(chat: Chat, argument: str) -> bool:
    return True


_COMMANDS: dict[str, Callable[[Chat, str], bool | None]] = {
    "help": _help,
    "?": _help,
    "clear": _clear,
    "system": _system,
    "set": _set,
    "stats": _stats,
    "bye": _bye,
    "exit": _bye,
}

_HELP = """\
/help, /?          this text
/clear             forget the conversation
/system [TEXT]     show or set the system message; setting it forgets the conversation
/set [NAME VALUE]  show or change sampling, for example /set temperature 0.2
/stats             speed of the last answer, memory, context
/bye, /exit        leave (or Ctrl-D)
\"\"\"                start and end of a message of several lines
Ctrl-C             stop the answer"""


def reader() -> Read:
    """Line editing with a history that outlives the session, on stderr: stdout is for answers."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.output import create_output

    history: History = InMemoryHistory()
    path = _history_file()
    if path:
        history = FileHistory(path)
    session: PromptSession[str] = PromptSession(
        history=history, output=create_output(stdout=sys.stderr)
    )
    return session.prompt


def _history_file() -> Path | None:
    """Private file in the user's state folder; None when it cannot be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "edgeq"
    path = folder / "history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return None
    return path
