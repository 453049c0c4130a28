"""Conversations to prompts, with the chat template that the model's file carries."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeq.errors import FormatError, RequestError, TemplateError
from edgeq.tokenizer import Tokenizer
from edgeq.tokenizer.loading import Metadata

__all__ = ["ChatTemplate", "encode_chat", "from_gguf"]

_MAX_SOURCE = 1 << 20  # characters
_PRIVATE_USE = range(0xE000, 0xF900)  # code points without a meaning of their own

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A Jinja chat template; it is compiled when first used, so that a bad one harms only chat.

    source: its text. bos, eos: texts of these tokens, which templates may print.

    >>> template = ChatTemplate("{{ bos_token }}{{ messages[0].content | trim }}", "<s>", "</s>")
    >>> template.render([{"role": "user", "content": " Hi. "}])
    '<s>Hi.'
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self.source, self.bos, self.eos = source, bos, eos
        self._compiled: Any = None

    def render(self, messages: Messages, add_generation_prompt: bool = True, **kw: Any) -> str:
        """Text of a conversation.

        messages: tables with at least `role`; most templates want `content`. add_generation_prompt:
        end with what comes before an answer. kw: further variables, such as tools, enable_thinking.

        Raises TemplateError when the template is refused, fails or calls raise_exception, and
        RequestError when messages are not a conversation.
        """
        from edgeq.sandbox import limits

        _check(messages)
        variables: dict[str, Any] = {"tools": None, "documents": None, **kw}
        try:
            with limits():
                if self._compiled is None:
                    self._compiled = self._compile()
                text: str = self._compiled.render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self.bos,
                    eos_token=self.eos,
                    **variables,
                )
                return text
        except TemplateError:
            raise
        except RecursionError as error:
            raise TemplateError("chat template: nested too deeply") from error
        except Exception as error:  # template code fails in as many ways as Python does
            raise TemplateError(f"chat template: {_one_line(error)}") from error

    def _compile(self) -> Any:
        from edgeq.sandbox import Environment

        if len(self.source) > _MAX_SOURCE:
            raise TemplateError(
                f"chat template: {len(self.source)} characters: expected at most {_MAX_SOURCE}"
            )
        return Environment().from_string(self.source)


def _one_line(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return f"line {line}: {text}" if line else text


def _check(messages: Messages) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages: expected at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{i}]: expected a table with a role and a content")


def from_gguf(gguf: Metadata, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Chat template of an open GGUF file; None when it has none (a base model).

    Raises FormatError when it is not a text.
    """
    source = gguf.metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise FormatError(f"{gguf.path}: tokenizer.chat_template: expected a string")
    bos, eos = (
        "" if token is None else tokenizer.piece(token).decode("utf-8", "replace")
        for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    return ChatTemplate(source, bos, eos)


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, **kw: Any
) -> list[int]:
    """Prompt ids of a conversation, with BOS once if the vocabulary asks for it.

    Control tokens that the template writes become ids. The same text inside a message, or in any
    other value, stays plain text: a user cannot end a turn or speak as the system.

    kw: as for `ChatTemplate.render`, which also says what is raised.
    """
    disguise = _Disguise(tokenizer.special_texts, template.source, [messages, kw])
    text = template.render(disguise.put_on(messages), **disguise.put_on(kw))
    parts: list[str | int] = []
    for part in tokenizer.partition(text, special=True):
        plain = part if isinstance(part, int) else disguise.take_off(part)
        # User-defined tokens are text: those that the disguise hid are looked for again.
        parts += [part] if plain == part else tokenizer.partition(str(plain))
    ids = tokenizer.encode_parts(parts)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


class _Disguise:
    """Keeps control tokens from beginning inside untrusted text, while a template handles it.

    Each character that a control token can begin with is swapped for a private one, wherever it
    stands, so that nothing can be put together from pieces. Tags that the template itself looks
    for, such as </think>, are left alone.
    """

    def __init__(self, special_texts: Sequence[str], source: str, values: Any) -> None:
        starts = {text[0] for text in special_texts}
        blob = "\n".join([source, *_texts(values)])
        free = (c for c in map(chr, _PRIVATE_USE) if c not in blob and _escaped(c) not in blob)
        self._put_on = dict(zip(sorted(starts), free))
        self._take_off = {twin: c for c, twin in self._put_on.items()}
        # A template may print JSON with everything beyond ASCII escaped.
        self._take_off |= {_escaped(twin): _escaped(c) for c, twin in self._put_on.items()}
        first = "".join(map(re.escape, starts))
        tags = set(re.findall(rf"[{first}][^\s<>\[\]'\"{{}}()]+[>\]]", source)) if starts else set()
        safe = sorted(tag for tag in tags if not tag.startswith(tuple(special_texts)))
        self._pattern = re.compile("|".join([*map(re.escape, safe), f"([{first}])"]))
        self._twins = re.compile("|".join(map(re.escape, self._take_off)))

    def put_on(self, value: Any) -> Any:
        """The value with all texts in it disguised."""
        if not self._put_on:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda m: self._put_on[m[1]] if m[1] else m[0], value)
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put_on(item) for item in value]
        return value

    def take_off(self, text: str) -> str:
        """Rendered text with the characters as they were."""
        return self._twins.sub(lambda m: self._take_off[m[0]], text) if self._put_on else text


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
