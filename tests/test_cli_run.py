"""`edgeq run`: what goes to stdout and stderr, exit codes, the chat loop."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shell import Screen, edgeq

from edgeq.cli import _chat
from edgeq.cli._chat import Chat
from edgeq.errors import ModelError, ResourceError


class FakeModel:
    """Answers with fixed pieces, and remembers what it was asked and how."""

    def __init__(self) -> None:
        self.pieces: list[Any] = ["Hel", "lo ", "\x1b[31m", "é"]
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.stats = SimpleNamespace(
            prompt_tokens=12,
            prompt_seconds=0.5,
            cached_tokens=0,
            generated_tokens=4,
            generation_seconds=2.0,
            finish="stop",
        )
        self.gguf = SimpleNamespace(metadata={"general.sampling.temp": 0.25}, warnings=[])
        self.tokenizer = SimpleNamespace(
            bos_id=1, eos_id=None, piece=lambda token: f"<{token}>".encode(), warnings=[]
        )
        self.warnings: list[str] = []
        self.arch = SimpleNamespace(context_length=512)
        self.threads, self.isa, self.ctx, self.kv_bytes = 2, "fake", 256, 2**20
        self.kv_types = "f16", "f16"

    def generate(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.asked.append((prompt, options))
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeModel:
    """A fake model behind `edgeq run model.gguf`, whose prompts are its messages themselves."""
    fake = FakeModel()
    fake.loaded = []

    def load(path: Path, **options: Any) -> FakeModel:
        fake.loaded.append((path, options))
        return fake

    monkeypatch.setattr("edgeq.engine.load", load)
    monkeypatch.setattr("edgeq.chat.from_gguf", lambda gguf, tokenizer: "the template")
    monkeypatch.setattr(
        "edgeq.chat.encode_chat",
        lambda tokenizer, template, messages: [template, *messages],
    )
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return fake


# --- run: one answer


def test_one_shot_answer_is_all_that_stdout_gets(model: FakeModel) -> None:
    result = edgeq("run", "model.gguf", "Hi?")
    assert result.exit_code == 0
    assert result.stdout == "Hello \x1b[31mé\n"  # a pipe gets the text as it is
    [(prompt, options)] = model.asked
    assert prompt == ["the template", {"role": "user", "content": "Hi?"}]
    assert options == {"max_tokens": -1}
    [line] = result.stderr.splitlines()
    assert line.startswith("prompt 12 tok, 24.0 tok/s | answer 4 tok, 1.5 tok/s | peak RAM ")
    assert line.endswith(" | 2 threads | fake")


def test_a_terminal_never_gets_control_characters(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    Chat(model, None).ask("Hi?")
    assert screen.getvalue() == "Hello \\x1b[31mé\n"


def test_prompt_sources(model: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("from a file")
    edgeq("run", "model.gguf", "-p", "from -p")
    edgeq("run", "model.gguf", "-f", "prompt.txt")
    edgeq("run", "model.gguf", stdin="from a pipe")
    said = [prompt[-1]["content"] for prompt, _ in model.asked]
    assert said == ["from -p", "from a file", "from a pipe"]


def test_prompt_must_be_one_and_not_empty(model: FakeModel) -> None:
    assert edgeq("run", "model.gguf", "one", "-p", "two").exit_code == 2
    result = edgeq("run", "model.gguf", stdin=" \n")
    assert (result.exit_code, result.stderr) == (2, "edgeq: prompt: empty: expected some text\n")
    assert model.asked == []


def test_flags_reach_the_model_and_only_those_given(model: FakeModel) -> None:
    edgeq("run", "model.gguf", "Hi?", "--temp", "0", "--top-k", "7", "--seed", "-1", "-n", "9")
    edgeq(
        "run",
        "model.gguf",
        "Hi?",
        "-s",
        "5",
        "--repeat-last-n",
        "-1",
        "-c",
        "64",
        "-t",
        "3",
        "-tb",
        "4",
    )
    assert model.asked[0][1] == {"max_tokens": 9, "temperature": 0.0, "top_k": 7}
    assert model.asked[1][1] == {"max_tokens": -1, "seed": 5, "repeat_last_n": -1}
    assert [o["ctx"] for _, o in model.loaded] == [None, 64]
    assert [o["threads"] for _, o in model.loaded] == [None, 3]
    assert [o["threads_batch"] for _, o in model.loaded] == [None, 4]


def test_system_message_comes_first(model: FakeModel) -> None:
    edgeq("run", "model.gguf", "Hi?", "-sys", "Be brief.")
    assert model.asked[0][0][1] == {"role": "system", "content": "Be brief."}


def test_raw_and_models_without_template_continue_the_text(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "template" not in edgeq("run", "model.gguf", "Once", "--raw").stderr
    monkeypatch.setattr("edgeq.chat.from_gguf", lambda gguf, tokenizer: None)
    assert "no chat template" in edgeq("run", "model.gguf", "upon").stderr
    assert [prompt for prompt, _ in model.asked] == ["Once", "upon"]
    refused = edgeq("run", "model.gguf", "a time", "-sys", "Be brief.")
    assert refused.exit_code == 2
    assert "no chat template: a system message needs one" in refused.stderr


def test_template_file_replaces_the_template(model: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    edgeq("run", "model.gguf", "Hi?", "--chat-template-file", "t.jinja")
    template = model.asked[0][0][0]
    assert (template.source, template.bos, template.eos) == ("{{ messages }}", "<1>", "")


def test_cut_answer_is_announced(
    chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat can be cleared, a single answer cannot; a larger context only where there is one."""
    model.stats.finish = "context"

    def cut(model_allows: int) -> list[str]:
        model.arch.context_length = model_allows
        _chat.loop(chat, script("Hi?"))
        shown = [edgeq("run", "model.gguf", "Hi?").stderr, capsys.readouterr().err]
        return [line for text in shown for line in text.splitlines() if line.startswith("cut: ")]

    full = "cut: the context of 256 tokens is full"
    larger = "-c N for a larger one"
    assert cut(512) == [f"{full}: {larger}", f"{full}: {larger}, /clear to start over"]
    assert cut(256) == [full, f"{full}: /clear to start over"]


def test_an_answer_of_no_tokens_ends_with_statistics_too(model: FakeModel) -> None:
    model.pieces, model.stats.generated_tokens = [], 0
    result = edgeq("run", "model.gguf", "Hi?", "-n", "0")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "| answer 0 tok, - tok/s | peak RAM " in result.stderr


def test_one_token_has_no_rate(model: FakeModel) -> None:
    """It comes from the prompt's logits: nothing was generated in that time."""
    model.stats.generated_tokens = 1
    assert "answer 1 tok, - tok/s" in edgeq("run", "model.gguf", "Hi?").stderr


def test_the_model_as_a_flag(model: FakeModel) -> None:
    assert edgeq("run", "-m", "model.gguf", "Hi?").exit_code == 0
    assert edgeq("run", "--model", "model.gguf", "-p", "Hi?").exit_code == 0
    assert [str(path) for path, _ in model.loaded] == ["model.gguf"] * 2
    assert [prompt[-1]["content"] for prompt, _ in model.asked] == ["Hi?"] * 2
    for args in (["model.gguf", "-m", "model.gguf", "Hi?", "-p", "x"], ["-p", "Hi?"]):
        assert edgeq("run", *args).exit_code == 2
    twice = edgeq("run", "model.gguf", "Hi?", "-m", "model.gguf")
    assert "more than one model: use one of MODEL and -m" in twice.stderr
    assert "Missing argument 'MODEL'" in edgeq("run").stderr


def test_warnings_of_all_parts_are_told_once(model: FakeModel) -> None:
    model.gguf.warnings, model.warnings = ["odd file"], ["unused tensor", "odd file"]
    model.tokenizer.warnings = ["odd\x1b[0m token"]
    lines = edgeq("run", "model.gguf", "Hi?").stderr.splitlines()
    warnings = [f"warning: {text}" for text in ("odd file", "unused tensor", "odd\\x1b[0m token")]
    assert lines[:-1] == warnings


def test_compilation_is_announced_once_in_a_log(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, on_compile: Callable[[str, int, int], None], **_: Any) -> FakeModel:
        on_compile("dot_q4_k", 1, 12)
        on_compile("attend", 2, 12)
        return model

    monkeypatch.setattr("edgeq.engine.load", load)
    lines = edgeq("run", "model.gguf", "Hi?").stderr.splitlines()
    assert lines[0] == "compiling kernels for this CPU, once: 1/12 dot_q4_k"
    assert lines[1].startswith("prompt 12 tok")


# --- errors


def test_our_errors_are_one_line_without_traceback(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("model.gguf: block_count:\n -1:\x1b[31m expected more")

    monkeypatch.setattr("edgeq.engine.load", fail)
    result = edgeq("run", "model.gguf", "Hi?")
    assert result.exit_code == 2
    assert result.stderr == "edgeq: model.gguf: block_count: -1:\\x1b[31m expected more\n"
    for args in (["--debug", "run"], ["run", "--debug"]):
        assert isinstance(edgeq(*args, "model.gguf", "Hi?").exception, ModelError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "x.gguf"), "x.gguf: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory: close other programs or use a smaller model"),
    ],
)
def test_errors_of_the_system_are_one_line_too(
    model: FakeModel, error: Exception, line: str
) -> None:
    model.pieces = [error]
    result = edgeq("run", "model.gguf", "Hi?")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"edgeq: {line}")


def test_ctrl_c_ends_one_shot_with_130(model: FakeModel) -> None:
    model.pieces = ["Hel", KeyboardInterrupt()]
    result = edgeq("run", "model.gguf", "Hi?")
    assert (result.exit_code, result.stdout) == (130, "Hel\n")
    assert result.stderr.splitlines()[-1] == "edgeq: interrupted"


def test_missing_model_is_not_taken_for_a_hub_name() -> None:
    result = edgeq("run", "./nowhere.gguf", "Hi?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("edgeq: ./nowhere.gguf: no such file")


# --- run: the chat loop


def script(*lines: Any) -> _chat.Read:
    """Keyboard input: texts, or exceptions to raise; then the end of input."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


@pytest.fixture
def chat(model: FakeModel) -> Chat:
    model.pieces = ["Fine."]
    return Chat(model, "the template")  # type: ignore[arg-type]


def test_chat_remembers_until_clear(chat: Chat, model: FakeModel) -> None:
    _chat.loop(chat, script("How are you?", "  ", "Good.", "/clear", "Who?", "/bye", "never"))
    contents = [[message["content"] for message in prompt[1:]] for prompt, _ in model.asked]
    assert contents == [["How are you?"], ["How are you?", "Fine.", "Good."], ["Who?"]]


def test_triple_quotes_hold_several_lines(chat: Chat, model: FakeModel) -> None:
    _chat.loop(chat, script('"""/first', "", 'last"""', '"""one line"""', '"""', "alone", '"""'))
    said = [prompt[-1]["content"] for prompt, _ in model.asked]
    assert said == ["/first\n\nlast", "one line", "alone"]


def test_unknown_command_is_not_sent(
    chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    _chat.loop(chat, script("/frobnicate now"))
    assert model.asked == []
    assert "/frobnicate: no such command" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["/bye", "/exit", "/BYE"])
def test_leaving(chat: Chat, model: FakeModel, command: str) -> None:
    _chat.loop(chat, script(command, "never"))
    assert model.asked == []


@pytest.mark.parametrize("command", ["/help", "/?"])
def test_help_names_every_command(
    chat: Chat, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    _chat.loop(chat, script(command))
    shown = capsys.readouterr().err
    assert all(f"/{name}" in shown for name in _chat._COMMANDS)


def test_system_command(chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    _chat.loop(chat, script("Hi?", "/system Be  brief.", "Who?", "/system"))
    assert model.asked[1][0][1:] == [
        {"role": "system", "content": "Be  brief."},
        {"role": "user", "content": "Who?"},
    ]
    assert capsys.readouterr().err.splitlines()[-1] == "system message: Be  brief."


def test_set_command(chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    _chat.loop(chat, script("/set top_k 5", "/set temperature hot", "/set heat 1", "Hi?", "/set"))
    assert model.asked[0][1] == {"max_tokens": -1, "top_k": 5}
    lines = capsys.readouterr().err.splitlines()
    assert any("temperature 'hot': expected a number from 0 to 100" in line for line in lines)
    assert any("/set: expected NAME VALUE" in line for line in lines)
    assert lines[-1].startswith("temperature 0.25, top_k 5, top_p 0.95,")


def test_stats_command(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    _chat.loop(chat, script("/stats"))
    shown = capsys.readouterr().err
    assert "answer 4 tok, 1.5 tok/s" in shown
    assert "context 256 tokens, KV cache 1.0 MiB" in shown


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model.pieces = ["Fi", KeyboardInterrupt()]
    _chat.loop(chat, script("How?", KeyboardInterrupt(), "Again?"))
    assert model.asked[1][0][1:] == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "Fi"},
        {"role": "user", "content": "Again?"},
    ]
    shown = capsys.readouterr()
    assert shown.out == "Fi\nFi\n"
    assert "stopped" in shown.err
    assert "Ctrl-D or /bye leaves" in shown.err


def test_failed_question_is_forgotten_and_the_chat_goes_on(
    chat: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model.pieces = [ResourceError("too long")]
    _chat.loop(chat, script("First", "Second"))
    assert [message["content"] for message in model.asked[1][0][1:]] == ["Second"]
    assert "edgeq: too long" in capsys.readouterr().err


def test_history_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = _chat._history_file()
    assert path
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(path))  # a file: no folder can be made in it
    assert _chat._history_file() is None
