"""Questions that a model must answer: read from a file, asked, counted.

The file is JSON Lines: one object per line, empty lines are skipped.

- `{"question": "What is the capital of Japan?", "answer": "Tokyo"}`: the model's most likely answer
  must be this text, apart from space around it; a list of texts accepts any of them.
- `{"question": "The sky is", "choices": ["blue", "loud"], "answer": 0}`: the choice at index
  `answer` must be the most likely one.
- `"task": "geography"` on either kind groups the results.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgeq import cache
from edgeq.chat import ChatTemplate, encode_chat, from_gguf
from edgeq.divergence import likelihood
from edgeq.errors import FormatError, RequestError
from edgeq.estimate import wilson
from edgeq.text import printable, read_text

if TYPE_CHECKING:
    from edgeq.engine import Model

__all__ = ["Answer", "Count", "Question", "ask", "by_task", "read", "summary", "total"]

Progress = Callable[[int, int, int], None]  # questions asked, in all, right so far
_KEYS = ("question", "answer", "choices", "task")
_LENGTH = 32  # tokens that an answer may have, or twice those of the expected one


@dataclass(frozen=True, slots=True)
class Question:
    """One line of the file."""

    question: str
    answers: tuple[str, ...]  # each of them is right; with choices, the one right choice
    choices: tuple[str, ...] = ()
    task: str = "questions"
    where: str = ""  # file:line


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of a question.

    right: the text, or the choice with the highest log-probability per token. right_raw: the
    choice with the highest log-probability; the same as `right` for a question without choices.
    """

    text: str
    right: bool
    right_raw: bool
    scores: tuple[float, ...] = field(default=())  # per choice: ln p of the whole choice


@dataclass(frozen=True, slots=True)
class Count:
    """Right answers among some questions."""

    count: int
    right: int
    right_raw: int

    @property
    def share(self) -> float:
        """Accuracy, 0..1."""
        return self.right / self.count

    @property
    def share_raw(self) -> float:
        """Accuracy by raw log-probability."""
        return self.right_raw / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson)."""
        return wilson(self.right, self.count)


def read(path: str | Path) -> list[Question]:
    """Questions of a JSON Lines file.

    Raises ResourceError when it cannot be read, FormatError naming file and line for a line that
    is no question.
    """
    lines = read_text(path).split("\n")
    found = [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise FormatError(f"{path}: no questions: expected one JSON object per line")
    return found


def _parse(line: str, where: str) -> Question:
    record = _json(line, where)
    if not isinstance(record, dict):
        _refuse(where, "line", record, 'an object: {"question": ..., "answer": ...}')
    for key in record:
        if key not in _KEYS:
            raise FormatError(
                f"{where}: unknown key {printable(key)}: expected one of {', '.join(_KEYS)}"
            )
    for key in ("question", "task"):
        if not _is_text(record.get(key, "" if key == "question" else "questions")):
            _refuse(where, key, record.get(key), "a text that is not empty")
    choices = record.get("choices", [])
    if not isinstance(choices, list) or len(choices) == 1 or not all(map(_is_text, choices)):
        _refuse(where, "choices", choices, "a list of at least two texts")
    answers = _answers(record.get("answer"), choices, where)
    task = record.get("task", "questions")
    return Question(record["question"], answers, tuple(choices), task, where)


def _json(line: str, where: str) -> Any:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: not JSON: {error.msg}") from error
    except UnicodeEncodeError as error:
        half = printable(error.object[error.start])
        raise FormatError(f"{where}: {half} is half of a pair: expected characters") from error
    except RecursionError as error:
        raise FormatError(f"{where}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: a number of thousands of digits") from error
    return record


def _answers(answer: Any, choices: Sequence[str], where: str) -> tuple[str, ...]:
    if choices:
        if type(answer) is not int or not 0 <= answer < len(choices):
            _refuse(where, "answer", answer, f"the index of a choice, 0 to {len(choices) - 1}")
        return (choices[answer],)
    texts = answer if isinstance(answer, list) else [answer]
    if not texts or not all(map(_is_text, texts)):
        _refuse(where, "answer", answer, "a text, or a list of texts, none of them empty")
    return tuple(text.strip() for text in texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _refuse(where: str, key: str, value: Any, expected: str) -> NoReturn:
    shown = "missing" if value is None else f"= {printable(repr(value), 40)}"
    raise FormatError(f"{where}: {key} {shown}: expected {expected}")


def ask(
    model: "Model",
    questions: Iterable[Question],
    *,
    raw: bool = False,
    progress: Progress | None = None,
) -> list[Answer]:
    """The model's answers, always its most likely tokens.

    A question goes through the file's chat template where it has one; without one, or with `raw`,
    it is continued as plain text, of which the first line counts.

    Raises RequestError, naming file and line, for a question that does not fit the context;
    ModelError, TemplateError.
    """
    template = None if raw else from_gguf(model.gguf, model.tokenizer)
    listed, found = list(questions), list[Answer]()
    for question in listed:
        try:
            found.append((_choose if question.choices else _tell)(model, template, question))
        except RequestError as error:
            raise RequestError(f"{question.where}: {error}") from error
        if progress:
            progress(len(found), len(listed), sum(answer.right for answer in found))
    return found


def by_task(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Count]:
    """Task -> right answers, tasks in order of appearance.

    >>> asked = [Question("1 + 1 = ?", ("2",), task="sums"), Question("2 + 2 = ?", ("4",))]
    >>> by_task(asked, [Answer("2", True, True), Answer("5", False, False)])["sums"]
    Count(count=1, right=1, right_raw=1)
    """
    grouped: dict[str, list[Answer]] = {}
    for question, answer in zip(questions, answers, strict=True):
        grouped.setdefault(question.task, []).append(answer)
    return {task: total(group) for task, group in grouped.items()}


def total(answers: Sequence[Answer]) -> Count:
    """All answers counted."""
    right, raw = sum(a.right for a in answers), sum(a.right_raw for a in answers)
    return Count(len(answers), right, raw)


def summary(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy over all and per task, and every answer, as plain tables (for JSON)."""

    def table(count: Count) -> dict[str, Any]:
        low, high = count.interval
        shares = {"accuracy": count.share, "accuracy_raw": count.share_raw}
        return {**asdict(count), **shares, "low": low, "high": high}

    return {
        "total": table(total(answers)),
        "tasks": {task: table(count) for task, count in by_task(questions, answers).items()},
        "answers": [
            {"question": q.question, "expected": list(q.answers), "task": q.task, **asdict(a)}
            for q, a in zip(questions, answers, strict=True)
        ],
    }


def _prompt(model: "Model", template: ChatTemplate | None, question: Question) -> list[int]:
    if template is None:
        return model.tokenizer.encode(question.question, bos=True)
    message = {"role": "user", "content": question.question}
    return encode_chat(model.tokenizer, template, [message])


def _tell(model: "Model", template: ChatTemplate | None, question: Question) -> Answer:
    """Let the model write, and compare."""
    longest = max(len(model.tokenize(answer)) for answer in question.answers)
    prompt = _prompt(model, template, question)
    room = max(_LENGTH, 2 * longest)
    text = "".join(model.generate(prompt, temperature=0, max_tokens=room)).strip()
    if template is None:
        text = text.partition("\n")[0].strip()
    right = text in question.answers
    return Answer(text, right, right)


def _choose(model: "Model", template: ChatTemplate | None, question: Question) -> Answer:
    """Compare the log-probabilities of the choices as answers."""
    prompt = _prompt(model, template, question)
    options = [_option(model, template, prompt, question, text) for text in question.choices]
    sums, means = [], []
    for start, ids in options:
        scored = _log_probability(model, ids, start)
        sums.append(scored)
        means.append(scored / (len(ids) - start))
    best, raw = (scores.index(max(scores)) for scores in (means, sums))
    right = question.answers[0]
    chosen = question.choices
    return Answer(chosen[best], chosen[best] == right, chosen[raw] == right, tuple(sums))


def _option(
    model: "Model", template: ChatTemplate | None, prompt: list[int], question: Question, text: str
) -> tuple[int, list[int]]:
    """Where a choice begins, and the ids of prompt and choice; plain text goes on after a space."""
    if template is not None:
        return len(prompt), prompt + model.tokenize(text)
    ids = model.tokenizer.encode(f"{question.question} {text}", bos=True)
    return max(cache.common(prompt, ids[:-1]), 1), ids


def _log_probability(model: "Model", ids: list[int], start: int) -> float:
    """ln p of ids[start:] after the ids before them, of which the cache may hold some."""
    if len(ids) > model.ctx:
        raise RequestError(f"{len(ids)} tokens with a choice, context of {model.ctx}: raise -c")
    kept = cache.common(model.seen, ids[: start - 1])
    model.rewind(kept)
    found = 0.0
    for logits in model.parts(ids[kept:-1], start - 1 - kept):
        targets = ids[start : start + len(logits)]
        start += len(logits)
        found += float(likelihood(logits, targets).sum())
    return found
