"""Load a model, read a prompt, generate: the one stateful object that users meet."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq import cache, models
from edgeq.errors import EdgeqError, ModelError, RequestError
from edgeq.gguf import Gguf, open_gguf
from edgeq.kernels import isa as isas
from edgeq.kernels import load as load_kernels
from edgeq.kernels.program import Program, Team
from edgeq.models import rope, weights
from edgeq.models.transformer import FEW, Transformer
from edgeq.sampler import Sampler
from edgeq.tokenizer import StreamDecoder, load_tokenizer

if TYPE_CHECKING:
    from edgeq.models.arch import Arch

__all__ = ["Model", "Stats", "load"]

BATCH = 512  # prompt tokens per pass
OUTPUTS = 64  # positions per pass when all logits are wanted
DEFAULT_CONTEXT = 4096  # positions, where the model allows so many and the user asks for none
Progress = Callable[[str, int, int], None]


@dataclass
class Stats:
    """Counts and seconds of the last answer."""

    prompt_tokens: int = 0  # evaluated now
    prompt_seconds: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    finish: Literal["", "stop", "length", "context"] = ""  # why it ended; "" while it runs


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    ctx: int | None = None,
    kv: str = "f16",
    on_compile: Progress | None = None,
) -> "Model":
    """Open a GGUF file for inference.

    threads: default one per physical core this process may use. ctx: positions of the KV cache;
    default what the model was trained on, at most 4096. on_compile(kernel, done, total) is called
    while kernels are compiled, once per machine and edgeq version.

    Raises FormatError, ModelError for the file; RequestError for ctx or threads; ResourceError when
    memory does not suffice.
    """
    gguf = open_gguf(path)
    try:
        return Model(gguf, threads=threads, ctx=ctx, kv=kv, on_compile=on_compile)
    except BaseException:
        gguf.close()
        raise


def cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min(psutil.cpu_count(logical=False) or 1, allowed or 1), 1)


class Model:
    """A loaded model: made by `edgeq.load`, used by one thread at a time. Close it, or use it in a
    `with` statement.
    """

    def __init__(
        self,
        gguf: Gguf,
        *,
        threads: int | None,
        ctx: int | None,
        kv: str,
        on_compile: Progress | None,
    ) -> None:
        self.gguf = gguf
        if not gguf.tensors:
            raise ModelError(f"{gguf.path}: no tensors: this file holds no model")
        self.arch: Arch = models.find(gguf.get("general.architecture", str)).arch(gguf)
        self.tokenizer = load_tokenizer(gguf)
        self.threads = _checked_threads(threads)
        self.ctx = _checked_context(ctx, self.arch, gguf.path)
        bound = weights.bind(gguf, self.arch)
        self._turn = rope.frequencies(self.arch.rope, bound.rope_freqs)
        self._magnitude = rope.magnitude(self.arch.rope)
        isa = isas.choose()
        self.isa: str = isa.NAME
        store = cache.allocate(self.arch, self.ctx, kv, available=_free_memory())
        self.kv_bytes = store.nbytes
        batch = min(BATCH, store.context)
        outputs = min(OUTPUTS, batch)
        self._net = Transformer(
            self.arch, bound, store, isa, threads=self.threads, batch=batch, outputs=outputs
        )
        self._batch, self._outputs = batch, outputs
        self._start(isa, on_compile)
        self.stats = Stats()
        self._seen: list[int] = []  # tokens whose keys and values are in the cache

    def _start(self, isa: Any, on_compile: Progress | None) -> None:
        """Compile or load kernels, start threads, assemble the programs."""
        net = self._net
        few, many = net.body(many=False), net.body(many=True)
        few_head, many_head = net.head(many=False), net.head(many=True)
        names = [op.kernel for op in (*few, *many, *few_head, *many_head)]
        addresses = load_kernels([*names, "walk", "post", "serve"], isa, on_compile)
        self._team = Team(isa, self.threads, cores())

        def program(ops: list[Any]) -> Program:
            return Program(ops, addresses, self._team, self.threads)

        # (many tokens?, logits of: none, few, many positions)
        self._programs = {
            (False, "few"): program(few + few_head),
            (False, "none"): program(few),
            (True, "none"): program(many),
            (True, "few"): program(many + few_head),
            (True, "many"): program(many + many_head),
        }

    # -- life --------------------------------------------------------------------------------------
    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker threads and unmap the file."""
        self._team.close()
        self.gguf.close()

    # -- tokens ------------------------------------------------------------------------------------
    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without BOS. special: control tokens written in it become their ids."""
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""
        return self.tokenizer.decode(ids)

    # -- evaluation --------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget what is in the KV cache."""
        self._seen = []

    def _evaluate(self, ids: Sequence[int], outputs: int) -> NDArray[np.float32]:
        """Append one batch to the cache; view of the logits of its last `outputs` tokens."""
        net, n, first = self._net, len(ids), len(self._seen)
        net.ids[:n] = ids
        net.cos[:n], net.sin[:n] = rope.tables(self._turn, self._magnitude, first, n)
        net.state[:] = n, first
        net.out_state[0] = outputs
        kind = "none" if not outputs else "few" if outputs <= FEW else "many"
        self._programs[n > FEW, kind].run()
        self._seen.extend(ids)
        return net.logits[:outputs]

    def feed(self, ids: Sequence[int], *, logits: bool = False) -> NDArray[np.float32]:
        """Append ids to the KV cache, batch by batch; float32 [vocab] after the last if asked for.

        The caller keeps ids and positions within range. The result is overwritten by the next call.
        """
        out = self._net.logits[:0]
        for first in range(0, len(ids), self._batch):
            part = ids[first : first + self._batch]
            out = self._evaluate(part, int(logits and first + len(part) == len(ids)))
        return out[0] if logits else out

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise RequestError("prompt: no tokens: expected at least one")
        top = self.arch.vocab_size
        for i in ids:
            if not 0 <= i < top:
                raise RequestError(f"token id {i}: expected 0 to {top - 1}")

    def _prompt(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits after `ids`, reusing the cache for the part it already holds."""
        self._check(ids)
        if len(ids) > self.ctx:
            raise RequestError(
                f"prompt of {len(ids)} tokens, context of {self.ctx} (context_length_exceeded): "
                "shorten it or raise -c"
            )
        started, same = perf_counter(), _common(self._seen, ids[:-1])
        self._seen = self._seen[:same]
        self.stats = Stats(prompt_tokens=len(ids) - same, cached_tokens=same)
        logits = self.feed(ids[same:], logits=True)
        self.stats.prompt_seconds = perf_counter() - started
        return logits

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, vocab]: the logits after each of the n ids, read from position 0.

        Raises RequestError when there are no ids, an id is out of range, or they exceed the
        context.
        """
        ids = [int(i) for i in ids]
        self._check(ids)
        if len(ids) > self.ctx:
            raise RequestError(
                f"{len(ids)} tokens, context of {self.ctx}: shorten them or raise ctx"
            )
        self.reset()
        out = np.empty((len(ids), self.arch.vocab_size), np.float32)
        for first in range(0, len(ids), self._outputs):
            part = ids[first : first + self._outputs]
            out[first : first + len(part)] = self._evaluate(part, len(part))
        return out

    # -- generation --------------------------------------------------------------------------------
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = -1,
        stop: Sequence[str] | str = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Stream the continuation of `prompt` as pieces of text, whole characters only.

        prompt: text (BOS is added where the model wants it, control tokens are parsed) or ids.
        max_tokens: -1 = until the model ends or the context is full. stop: texts that end the
        answer and are not part of it. sampling: temperature, top_k, top_p, min_p, repeat_penalty,
        repeat_last_n, presence_penalty, frequency_penalty, seed; what is not given comes from the
        file's general.sampling.* or llama.cpp's defaults.

        Raises RequestError (values, prompt length), ModelError (logits that are not numbers).
        """
        sampler = Sampler.from_metadata(self.gguf.metadata, **_given(sampling))
        sampler.validate()
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, special=True, bos=True)
        else:
            ids = [int(i) for i in prompt]
        stops = [stop] if isinstance(stop, str) else list(stop)
        if any(not s for s in stops):
            raise RequestError("stop: empty text: expected at least one character")
        # A text is continued, and its continuation may begin with a space; an answer may not.
        decoder = self.tokenizer.decoder(continues=isinstance(prompt, str))
        return _until(self._tokens(ids, max_tokens, sampler, decoder), stops)

    def _tokens(
        self, ids: list[int], max_tokens: int, sampler: Sampler, decoder: StreamDecoder
    ) -> Iterator[str]:
        logits, state, history = self._prompt(ids), sampler.start(), list(ids)
        stats, started = self.stats, perf_counter()
        while stats.generated_tokens != max_tokens:
            token = state.sample(logits, history)
            stats.generated_tokens += 1
            stats.generation_seconds = perf_counter() - started
            if token in self.tokenizer.eog_ids:
                stats.finish = "stop"
                break
            history.append(token)
            yield decoder.push(token)
            if len(self._seen) >= self.ctx:
                stats.finish = "context"
                break
            if stats.generated_tokens == max_tokens:
                break
            logits = self._evaluate([token], 1)[0]
        stats.finish = stats.finish or "length"
        stats.generation_seconds = perf_counter() - started
        yield decoder.flush()

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]:
        """Stream the answer to a conversation, through the file's chat template; options as
        `generate`.

        Raises TemplateError when the template refuses the messages, ModelError when the file has
        none.
        """
        from edgeq.chat import encode_chat, from_gguf

        template = from_gguf(self.gguf, self.tokenizer)
        if template is None:
            raise ModelError(
                f"{self.gguf.path}: no chat template in this file: use generate instead"
            )
        return self.generate(encode_chat(self.tokenizer, template, messages), **options)


def _given(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _until(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """Pass pieces on until one of `stops` appears; what may be its beginning is held back."""
    held = ""
    longest = max((len(s) for s in stops), default=1) - 1
    for piece in pieces:
        held += piece
        found = min((i for s in stops if (i := held.find(s)) >= 0), default=-1)
        if found >= 0:
            if held[:found]:
                yield held[:found]
            return
        ready = len(held) - longest
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _checked_threads(threads: int | None) -> int:
    count = cores() if threads is None else threads
    if not 1 <= count <= 256:
        raise RequestError(f"threads = {count}: expected 1 to 256")
    return count


def _checked_context(ctx: int | None, arch: "Arch", path: Path) -> int:
    if ctx is None:
        return min(arch.context_length, DEFAULT_CONTEXT)
    if not 1 <= ctx <= arch.context_length:
        raise RequestError(
            f"ctx = {ctx}: expected 1 to {arch.context_length}, the context length of {path}"
        )
    return ctx


def _free_memory() -> int | None:
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except (OSError, EdgeqError):
        return None
