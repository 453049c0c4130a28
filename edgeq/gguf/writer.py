"""Write a GGUF file, tensor by tensor in any order, so that it is complete or not there at all."""

import hashlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import row_bytes
from edgeq.errors import FormatError, ResourceError
from edgeq.gguf.header import read_header
from edgeq.gguf.journal import Checksum, Journal
from edgeq.gguf.layout import (
    MAGIC,
    U32,
    U64,
    TensorInfo,
    TensorSpec,
    aligned,
    alignment_of,
)
from edgeq.gguf.partfile import PartFile
from edgeq.gguf.reader import Gguf
from edgeq.gguf.values import write_value
from edgeq.text import printable

__all__ = ["GgufWriter", "outline"]

_VERSION = 3


class GgufWriter:
    """A GGUF file in the making; use it in a `with` statement.

    The layout is fixed, and checked by the reader's own rules, when the object is made; entering
    claims the disk space; leaving syncs, checks and names the file, or removes every trace after an
    exception, Ctrl-C included. Values in `metadata` may be int (stored as uint32 where it fits),
    float (float32), bool, str, lists of these, and NumPy scalars and arrays, which keep their type.

    With an `identity`, all that the bytes of the tensors depend on, work can be resumed: after
    Ctrl-C or a kill NAME.part stays, and a writer with the same identity recalls its tensors.

    Raises FormatError for metadata or tensors that GGUF cannot hold, ResourceError when the file
    exists (unless `force`), the disk lacks the space, or NAME.part has another identity (unless
    `force`).

    >>> import tempfile
    >>> from edgeq.blocks import get
    >>> from edgeq.gguf import open_gguf
    >>> path = Path(tempfile.mkdtemp()) / "tiny.gguf"
    >>> specs = [TensorSpec("output_norm.weight", (4,), get("F32"))]
    >>> with GgufWriter(path, {"general.name": "tiny"}, specs) as writer:
    ...     writer.write("output_norm.weight", np.ones(4, np.float32))
    >>> with open_gguf(path) as gguf:
    ...     gguf.metadata["general.name"], gguf.tensors["output_norm.weight"].shape
    ('tiny', (4,))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        tensors: Sequence[TensorSpec],
        *,
        force: bool = False,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.force = force
        self._header, self.nbytes = _build(metadata, tensors, alignment_of(metadata))
        checked = read_header(self._header, self.nbytes, str(self.path))
        self._tensors = checked.tensors
        self._missing = {name: info.nbytes for name, info in checked.tensors.items()}  # bytes
        self._sums: dict[str, Checksum] = {}  # of tensors that are partly written
        self._numbers = {name: i for i, name in enumerate(checked.tensors)}
        self._journal: Journal | None = None
        if identity is not None:
            layout = hashlib.sha256(self._header).hexdigest()
            self._journal = Journal({**identity, "header": layout}, len(self._numbers))
        self._file: PartFile | None = None

    def __enter__(self) -> Self:
        self._file = PartFile(
            self.path,
            self.nbytes,
            force=self.force,
            journal=self._journal,
            header=self._header,
        )
        try:
            # The magic comes last: what a power cut leaves behind is no GGUF file.
            self._file.pwrite(len(MAGIC), memoryview(self._header)[len(MAGIC) :])
        except BaseException:
            self._file.give_up()
            raise
        return self

    def recall(self, name: str) -> bytes | None:
        """Memo of a tensor that an earlier run wrote, if its bytes are intact; else None.

        Such a tensor need not be written again. Raises ResourceError when the disk fails.
        """
        if self._file is None:
            return None
        info = self._tensors[name]
        memo = self._file.recall(self._numbers[name], info.offset, info.nbytes)
        if memo is not None:
            self._missing.pop(name, None)
        return memo

    def write(
        self,
        name: str,
        data: NDArray[Any] | bytes | bytearray | memoryview,
        memo: bytes = b"",
    ) -> None:
        """Bytes of one tensor, in any order; may be called from several threads.

        memo: up to 24 bytes that `recall` gives back, filled up with zeros.

        Raises FormatError when the name or the number of bytes is not what was declared.
        """
        raw = _as_bytes(data)
        info, _ = self._declared(name)
        if len(raw) != info.nbytes:
            sizes = f"{len(raw)} bytes: expected {info.nbytes}"
            raise FormatError(f"{self.path}: tensor {name} has {sizes}")
        self.write_part(name, raw, memo)

    def write_part(
        self, name: str, data: NDArray[Any] | bytes | bytearray | memoryview, memo: bytes = b""
    ) -> None:
        """The next bytes of one tensor; memo: see `write`, with the last of them.

        Raises FormatError when the name or the number of bytes is not what was declared.
        """
        raw = _as_bytes(data)
        info, file = self._declared(name)
        left = self._missing.get(name, 0)
        if len(raw) > left:
            raise FormatError(
                f"{self.path}: tensor {name} has {len(raw) - left} bytes more than the declared "
                f"{info.nbytes}"
            )
        file.pwrite(info.offset + info.nbytes - left, raw)
        total = self._sums.setdefault(name, Checksum())
        if self._journal is not None:
            total.add(raw)
        self._missing[name] = left - len(raw)
        if left == len(raw):
            del self._missing[name], self._sums[name]
            if self._journal is not None:
                file.finish(self._numbers[name], total, memo)

    def _declared(self, name: str) -> tuple[TensorInfo, PartFile]:
        info = self._tensors.get(name)
        if info is None or self._file is None:
            raise FormatError(f"{self.path}: tensor {printable(name)} was not declared, or is late")
        return info, self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        stopped = error is not None and not isinstance(error, Exception)  # Ctrl-C and its kin
        try:
            if error is None:
                self._finish(file)
            elif (
                stopped
                and self._journal
                and (file.resumed or len(self._missing) < len(self._tensors))
            ):
                file.suspend()
        finally:
            file.abort()  # does nothing after the others

    def _finish(self, file: PartFile) -> None:
        if self._missing:
            names = ", ".join(sorted(self._missing)[:10])
            raise FormatError(f"{self.path}: {len(self._missing)} tensors not written: {names}")
        file.sync()
        file.pwrite(0, memoryview(MAGIC))
        if file.pread(0, len(self._header)) != self._header:
            raise ResourceError(f"{file.part}: reads back differently: the disk may be failing")
        file.commit()


def outline(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Sequence[TensorSpec]
) -> Gguf:
    """The file that a writer would make, but only its header: that is its size. Raises FormatError
    as GgufWriter.
    """
    head, nbytes = _build(metadata, tensors, alignment_of(metadata))
    header = read_header(head, nbytes, str(path))
    mapped = mmap.mmap(-1, len(head))
    mapped.write(head)
    return Gguf(Path(path), mapped, header)


def _build(
    metadata: Mapping[str, Any], tensors: Sequence[TensorSpec], alignment: int
) -> tuple[bytes, int]:
    """Everything before the tensor data, padded, and the size of the whole file."""
    parts = [MAGIC, U32.pack(_VERSION), U64.pack(len(tensors)), U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), write_value(value, key)]
    offset = 0
    for spec in tensors:
        parts.append(_entry(spec, offset))
        size = math.prod(spec.shape[:-1]) * row_bytes(spec.format, spec.shape[-1])
        offset = aligned(offset + size, alignment)
    head = b"".join(parts)
    head += bytes(aligned(len(head), alignment) - len(head))
    return head, len(head) + offset


def _entry(spec: TensorSpec, offset: int) -> bytes:
    if not spec.shape or min(spec.shape) < 1:
        raise FormatError(f"tensor {printable(spec.name)}: shape {spec.shape}: expected sizes >= 1")
    dims = b"".join(U64.pack(dim) for dim in reversed(spec.shape))
    place = U32.pack(spec.format.ggml_type) + U64.pack(offset)
    return _string(spec.name) + U32.pack(len(spec.shape)) + dims + place


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return U64.pack(len(raw)) + raw


def _as_bytes(data: NDArray[Any] | bytes | bytearray | memoryview) -> memoryview:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")
