"""Ask a model one question, or chat with it in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import _chat
from edgeq.cli._options import kv_options
from edgeq.cli._terminal import Status, is_terminal, note
from edgeq.errors import RequestError

if TYPE_CHECKING:
    from edgeq.chat import ChatTemplate
    from edgeq.engine import Model

_FILE = click.Path(exists=True, dir_okay=False)
_THREADS = click.IntRange(1, 256)

# The flags of llama.cpp. None means: what the model's file says, else llama.cpp's default.
_SAMPLING: list[tuple[list[str], type, str]] = [
    (["--temp", "temperature"], float, "Temperature; 0 = always the most likely token. [0.8]"),
    (["--top-k"], int, "Keep the K most likely tokens; 0 = all. [40]"),
    (["--top-p"], float, "Keep the most likely tokens up to this total probability. [0.95]"),
    (["--min-p"], float, "Keep tokens this likely in relation to the best. [0.05]"),
    (["--repeat-penalty"], float, "Penalty on repeated tokens; 1 = off. [1]"),
    (["--repeat-last-n"], int, "Tokens that penalties look back; 0 = off, -1 = all. [64]"),
    (["--presence-penalty"], float, "Taken off the logit of every token seen. [0]"),
    (["--frequency-penalty"], float, "Taken off for each time it was seen. [0]"),
    (["-s", "--seed"], int, "Same seed, same answer; -1 = random. [-1]"),
]


def _sampling_options(function: Any) -> Any:
    for flags, kind, text in reversed(_SAMPLING):
        function = click.option(*flags, type=kind, help=text)(function)
    return function


@click.command()
@click.argument("model", required=False, metavar="MODEL")
@click.argument("prompt", required=False)
@click.option("-m", "--model", "model_flag", metavar="MODEL", help="Same as MODEL.")
@click.option("-p", "--prompt", "prompt_flag", metavar="TEXT", help="Same as PROMPT.")
@click.option("-f", "--file", type=_FILE, help="Read the prompt from a file.")
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System message.")
@click.option(
    "-n",
    "--predict",
    type=click.IntRange(-1),
    default=-1,
    help="Most tokens to answer; -1 = no limit.",
)
@click.option(
    "-c",
    "--ctx-size",
    "ctx",
    type=click.IntRange(0),
    default=0,
    help="Context; 0 = the model's, up to 4096.",
)
@click.option("-t", "--threads", type=_THREADS, help="Threads. [what suits the machine]")
@click.option("-tb", "--threads-batch", type=_THREADS, help="Threads for prompts. [as -t]")
@_sampling_options
@click.option("--chat-template-file", type=_FILE, help="Jinja chat template to use instead.")
@click.option("--draft-ngram", is_flag=True, help="Guess from repeated text: same answer, sooner.")
@click.option("--raw", is_flag=True, help="Continue the text as it is: no chat template.")
@kv_options
def command(
    model: str | None,
    prompt: str | None,
    model_flag: str | None,
    prompt_flag: str | None,
    file: str | None,
    system: str | None,
    predict: int,
    ctx: int,
    threads: int | None,
    threads_batch: int | None,
    chat_template_file: str | None,
    draft_ngram: bool,
    raw: bool,
    cache_type_k: str,
    cache_type_v: str,
    seed: int | None,
    **sampling: float | int | None,
) -> None:
    """Ask MODEL one question, or chat with it in the terminal.

    MODEL is a GGUF file, or user/repo[:quant] on the Hugging Face Hub. With PROMPT, or text piped
    in, there is one answer; else a chat. Answers go to stdout, everything else to stderr.
    """
    if raw and (system or chat_template_file):
        raise click.UsageError("--raw uses no template: leave out -sys and --chat-template-file")
    name, prompt = _names(model, prompt, model_flag)
    text = _prompt(prompt, prompt_flag, file)
    given = {name: value for name, value in sampling.items() if value is not None}
    if seed is not None and seed != -1:
        given["seed"] = seed
    kv = (cache_type_k, cache_type_v)
    loaded = _load(name, threads=threads, threads_batch=threads_batch, ctx=ctx or None, kv=kv)
    template = None if raw else _template(loaded, chat_template_file)
    if system and template is None:
        raise RequestError(f"{name}: no chat template: a system message needs one")
    chat = _chat.Chat(loaded, template, system, predict, given, draft_ngram)
    if text is None:
        _chat.loop(chat, _chat.reader())
    else:
        _one_shot(chat, text)


def _names(model: str | None, prompt: str | None, flag: str | None) -> tuple[str, str | None]:
    """Model and prompt: with -m, the first argument is the prompt."""
    if flag is not None:
        if prompt is not None:
            raise click.UsageError("more than one model: use one of MODEL and -m")
        return flag, model
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    return model, prompt


def _prompt(*sources: str | None) -> str | None:
    """Text to answer, from PROMPT, -p, -f or a pipe; None = chat."""
    given = [source for source in sources if source is not None]
    if len(given) > 1:
        raise click.UsageError("more than one prompt: use one of PROMPT, -p and -f")
    if sources[-1] is not None:
        text = Path(sources[-1]).read_text(encoding="utf-8", errors="replace")
    elif given:
        text = given[0]
    elif is_terminal(sys.stdin):
        return None
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise RequestError("prompt: empty: expected some text")
    return text


def _load(name: str, **options: Any) -> "Model":
    from edgeq import hub
    from edgeq.engine import load

    status = Status()
    try:
        model = load(hub.model(name), on_compile=status.compiling(), **options)
    finally:
        status.clear()
    for warning in dict.fromkeys(
        warning for part in (model.gguf, model, model.tokenizer) for warning in part.warnings
    ):
        note(f"warning: {warning}")
    return model


def _template(model: "Model", file: str | None) -> "ChatTemplate | None":
    from edgeq.chat import ChatTemplate, from_gguf

    if file:
        ids = (model.tokenizer.bos_id, model.tokenizer.eos_id)
        texts = (b"" if i is None else model.tokenizer.piece(i) for i in ids)
        bos, eos = (text.decode("utf-8", "replace") for text in texts)
        return ChatTemplate(Path(file).read_text("utf-8", "replace"), bos, eos)
    template = from_gguf(model.gguf, model.tokenizer)
    if template is None:
        note("this model has no chat template: it continues your text instead of answering")
    return template


def _one_shot(chat: _chat.Chat, text: str) -> None:
    try:
        chat.ask(text)
    finally:
        if chat.model.stats.prompt_tokens:
            _chat.report(chat.model, chatting=False)
