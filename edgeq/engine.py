"""Load a model, read a prompt, generate: the one stateful object that users meet.

From the folder of a checkout:

>>> import edgeq
>>> path = edgeq.convert("examples/tiny-home", "tiny.gguf", "Q8_0")
>>> with edgeq.load(path) as model:
...     question = {"role": "user", "content": "What is the capital of Japan?"}
...     answer = "".join(model.chat([question], temperature=0))
...     ids = model.tokenize("Hello world")
...     shape = model.logits(ids).shape
...     perplexity = edgeq.perplexity(model, "The device is on. " * 20, ctx=32)
>>> answer, model.stats.finish, shape == (len(ids), 4096), 1 < perplexity < 100
('Tokyo', 'stop', True, True)
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeq import cache, cpus, memory, models, rates
from edgeq.answer import Options, Penalties, Stats, answer, until
from edgeq.checks import stop_texts, token_ids, whole
from edgeq.closing import Closing
from edgeq.errors import ModelError, RequestError
from edgeq.gguf import Gguf, open_gguf
from edgeq.kernels import isa as isas
from edgeq.models import weights
from edgeq.models.transformer import FEW
from edgeq.passes import Passes, Progress
from edgeq.sampler import Sampler
from edgeq.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from edgeq.models.arch import Arch

__all__ = ["Model", "Stats", "load"]

DEFAULT_CONTEXT = 4096  # positions, where the model allows so many and the user asks for none


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    threads_batch: int | None = None,
    ctx: int | None = None,
    kv: str | tuple[str, str] = "f16",
    on_compile: Progress | None = None,
) -> "Model":
    """Open a GGUF file for inference.

    threads: default one per physical performance core that this process may use, fewer where memory
    gives most to fewer and the model's formats need no more. threads_batch: the same for prompts;
    default as many as threads, if these are given. ctx: positions of the KV cache; default what the
    model was trained on, at most 4096. kv: type of the KV cache, f16, bf16, f32, q8_0 or q4_0, or a
    pair: of keys, of values. on_compile(kernel, done, total) is called while kernels are compiled,
    once per machine and edgeq version.

    Raises FormatError, ModelError for the file; RequestError for ctx, thread counts or kv;
    ResourceError when memory does not suffice.
    """
    gguf = open_gguf(path)
    try:
        return Model(
            gguf,
            threads=threads,
            threads_batch=threads_batch,
            ctx=ctx,
            kv=kv,
            on_compile=on_compile,
        )
    except BaseException:
        gguf.close()
        raise


class Model(Closing):
    """A loaded model: made by `edgeq.load`, used by one thread at a time. Close it, or use it in a
    `with` statement.
    """

    def __init__(
        self,
        gguf: Gguf,
        *,
        threads: int | None,
        threads_batch: int | None,
        ctx: int | None,
        kv: str | tuple[str, str],
        on_compile: Progress | None,
    ) -> None:
        self.gguf = gguf
        if not gguf.tensors:
            raise ModelError(f"{gguf.path}: no tensors: this file holds no model")
        self.arch: Arch = models.arch_of(gguf)
        self.tokenizer = load_tokenizer(gguf)
        machine = cpus.find()
        bound = weights.bind(gguf, self.arch)
        few, many = (threads, threads) if threads else rates.threads(bound.matrices, machine)
        self.threads = _count("threads", threads, few)
        self.threads_batch = _count("threads_batch", threads_batch, many)
        self.warnings = [f"tensor {name} is not used" for name in bound.unused]
        self.kv_types = cache.kv_types(kv)  # of keys, of values
        self.ctx = self._context(ctx)
        isa = isas.choose()
        self.isa: str = isa.NAME
        store = cache.allocate(self.arch, self.ctx, self.kv_types, available=memory.available())
        self.kv_bytes = store.nbytes
        self._passes = Passes(
            self.arch,
            bound,
            store,
            isa,
            ctx=self.ctx,
            threads=(self.threads, self.threads_batch),
            machine=machine,
            on_compile=on_compile,
        )
        store.touch()  # only now: compiling kernels has taken memory meanwhile
        products = bound.matrices
        self.bytes_per_token = sum(m.data.nbytes for m in products)  # weights that decoding reads
        # A prompt needs the logits of its last token only.
        self.macs_per_token = sum(m.rows * m.cols for m in products if m is not bound.output)
        self.stats = Stats()
        self._owner: object = None  # the answer that goes on after what is cached

    def _context(self, ctx: int | None) -> int:
        """Positions of the KV cache: as asked for, else what was trained, within reason and RAM."""
        trained = self.arch.context_length
        if ctx is not None:
            return whole("ctx", ctx, 1, trained)
        wanted = min(trained, DEFAULT_CONTEXT)
        room = max(memory.available() - self.gguf.size, memory.available() // 16)
        fits = room // 2 // cache.bytes_per_position(self.arch, self.kv_types)
        if fits < wanted:
            self.warnings.append(f"context of {fits} instead of {wanted}: memory is short")
        return int(max(min(wanted, fits), 1))

    # -- life --------------------------------------------------------------------------------------
    def close(self) -> None:
        """Stop the worker threads and unmap the file."""
        self._passes.close()
        self.gguf.close()

    # -- tokens ------------------------------------------------------------------------------------
    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without BOS. special: control tokens written in it become their ids."""
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""
        return self.tokenizer.decode(ids)

    # -- evaluation --------------------------------------------------------------------------------
    @property
    def seen(self) -> list[int]:
        """Tokens whose keys and values are in the cache."""
        return self._passes.seen

    def reset(self) -> None:
        """Forget what is in the KV cache."""
        self.rewind(0)
        self._owner = None

    def inputs(
        self, ids: Sequence[int], wanted: Collection[str] | None = None
    ) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
        """Read ids from position 0 and watch: names of the weights that share an input, and this
        input, float32 [n, n_in], in the order of the model, batch by batch.

        wanted: only of these weights, running the model no further than they need. An array is
        valid until the next one; the KV cache is empty afterwards. Raises RequestError as `logits`.
        """
        ids = token_ids(ids, self.arch.vocab_size)
        self.reset()
        self._passes.check_room(len(ids))
        yield from self._passes.inputs(ids, wanted)
        self.reset()

    def feed(self, ids: Sequence[int], *, logits: bool = False) -> NDArray[np.float32]:
        """Append ids to the KV cache, batch by batch; float32 [vocab] after the last if asked for.

        The result is overwritten by the next call. Raises RequestError when an id is out of range
        or the context is full.
        """
        ids = token_ids(ids, self.arch.vocab_size) if len(ids) else []
        self._passes.check_room(len(ids))
        self._owner = None
        out = self._passes.net.logits[:0]
        for first in range(0, len(ids), self._passes.batch):
            part = ids[first : first + self._passes.batch]
            out = self._passes.evaluate(part, int(logits and first + len(part) == len(ids)))
        return out[0] if logits else out

    def prompt(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [vocab] after `ids`, reusing the cache for the part it already holds.

        Raises RequestError when they exceed the context.
        """
        self.gguf.check_unchanged()
        if len(ids) > self.ctx:
            raise RequestError(
                f"prompt of {len(ids)} tokens, context of {self.ctx} (context_length_exceeded): "
                "shorten it or raise -c"
            )
        started, same = perf_counter(), cache.common(self.seen, ids[:-1])
        self.rewind(same)
        self.stats = Stats(prompt_tokens=len(ids) - same, cached_tokens=same)
        logits = self.feed(ids[same:], logits=True)
        self.stats.prompt_seconds = perf_counter() - started
        return logits

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, vocab]: the logits after each of the n ids, read from position 0.

        Raises RequestError when there are no ids, an id is out of range, or they exceed the
        context.
        """
        ids = token_ids(ids, self.arch.vocab_size)
        self.gguf.check_unchanged()
        if len(ids) > self.ctx:
            raise RequestError(
                f"{len(ids)} tokens, context of {self.ctx}: shorten them or raise ctx"
            )
        self.reset()
        out, done = np.empty((len(ids), self.arch.vocab_size), np.float32), 0
        for part in self.parts(ids):
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def parts(self, ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """Append ids to the KV cache; the logits [n, vocab] after ids[first:], some at a time.

        Each part is overwritten by the next. Raises RequestError as `feed`.
        """
        ids = token_ids(ids, self.arch.vocab_size)
        self._passes.check_room(len(ids))
        self._owner = None
        for start in range(0, len(ids), self._passes.batch):
            batch = ids[start : start + self._passes.batch]
            wanted = range(max(first - start, 0), len(batch), self._passes.outputs)
            if len(wanted) == 1:
                yield self._passes.evaluate(batch, len(batch) - wanted.start)
                continue
            self._passes.evaluate(batch, 0)
            for i in wanted:
                yield self._passes.head(i, min(i + self._passes.outputs, len(batch)))

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append up to FEW tokens; logits [n, vocab], overwritten by the next call.

        Raises RequestError when there are more, an id is out of range or the context is full.
        """
        ids = token_ids(ids, self.arch.vocab_size)
        whole("tokens of a step", len(ids), 1, FEW)
        return self._passes.evaluate(ids, len(ids))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of the cache."""
        self._passes.seen = self.seen[:length]

    def claim(self) -> object:
        """Make the caller the owner of the cache; see `owned_by`."""
        self._owner = object()
        return self._owner

    def owned_by(self, owner: object) -> bool:
        """Whether nothing else has used the cache since `claim` gave `owner`."""
        return self._owner is owner

    # -- generation --------------------------------------------------------------------------------
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = -1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        draft_ngram: bool = False,
        **penalties: Unpack[Penalties],
    ) -> Iterator[str]:
        """Stream the continuation of `prompt` as pieces of text, whole characters only.

        prompt: text (BOS is added where the model wants it, control tokens are parsed) or ids.
        max_tokens: -1 = until the model ends or the context is full. stop: texts that end the
        answer and are not part of it. Sampling settings that are not given (None) come from the
        file's general.sampling.* or llama.cpp's defaults. draft_ngram: look up what followed the
        last words before and let the model check several tokens at once: the same answer, sooner
        where text repeats. One answer at a time: a new request on
        the same model ends the one before.

        Raises RequestError (values, prompt length), ModelError (no vocabulary, logits that are no
        numbers).
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampler = Sampler.from_metadata(
            self.gguf.metadata, **_given({**given, "seed": seed, **penalties})
        )
        sampler.validate()
        stops, max_tokens = stop_texts(stop), whole("max_tokens", max_tokens, -1, 1 << 62)
        if not self.tokenizer.n_vocab:
            raise ModelError(f"{self.gguf.path}: no vocabulary: this model gives logits, not text")
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt, special=True, bos=True)
        else:
            prompt_ids = list(prompt)
        ids = token_ids(prompt_ids, self.arch.vocab_size)
        # A text is continued, and its continuation may begin with a space; an answer may not.
        decoder = self.tokenizer.decoder(continues=isinstance(prompt, str))
        pieces = answer(self, ids, max_tokens, sampler, decoder, draft_ngram=draft_ngram)
        return until(pieces, stops)

    def chat(self, messages: list[dict[str, Any]], **options: Unpack[Options]) -> Iterator[str]:
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


def _count(name: str, given: int | None, usual: int) -> int:
    return usual if given is None else whole(name, given, 1, 256)


def _given(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}
