"""Models named as on the Hugging Face Hub: `user/repo[:quant]` becomes a file or folder on disk.

Downloads land in the cache that other tools share (HF_HOME); HF_HUB_OFFLINE and HF_TOKEN work as
everywhere. A path that exists is always a path.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgeq.checkpoint.schemes import OWN_FILES
from edgeq.errors import EdgeqError, FormatError, RequestError, ResourceError
from edgeq.gguf.header import read_header

__all__ = ["checkpoint", "choose", "headers", "model"]

T = TypeVar("T")

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quant>\w+))?")
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
# Other forms of the same model; `*` stands for `/` too.
_OTHER_FILES = ["*/*", "consolidated*"]
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
# Of what else of a checkpoint tells its properties.
_SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json", *OWN_FILES)
_STEP, _MOST = 1 << 20, 1 << 26  # bytes of a header: fetched at first, and at most
_LARGEST = 1 << 44  # bytes of a file that anybody shares
_SIDECARS = ("mmproj", "mtp-", "imatrix")


def model(name: str) -> Path:
    """GGUF file for a path or `user/repo[:quant]`; Q4_K_M, else the first file, without a quant.

    Raises: RequestError when it is neither, ResourceError when it cannot be fetched.
    """
    if Path(name).exists():
        return Path(name)
    repo, quant = _split(name)
    files = _listed(repo)
    if isinstance(files, Path):
        return _gguf(files, quant, repo)
    file = choose(files, quant, repo)
    from huggingface_hub import hf_hub_download

    return Path(_fetch(repo, lambda: hf_hub_download(repo, file)))


def checkpoint(name: str) -> Path:
    """Checkpoint folder or GGUF file for a path or `user/repo`. Raises: as `model`."""
    if Path(name).exists():
        return Path(name)
    repo, quant = _split(name)
    if quant:
        return model(name)
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(
            repo, allow_patterns=_CHECKPOINT_FILES, ignore_patterns=_OTHER_FILES
        )

    return Path(_fetch(repo, fetch))


@contextlib.contextmanager
def headers(name: str) -> Iterator[Path]:
    """As `checkpoint`, but of files of weights only headers are fetched: the rest of them is holes.
    Removed in the end; errors meanwhile name the repository. Where the hub cannot be asked, what is
    in the cache.

    Raises: as `model`; FormatError for files that cannot be such.
    """
    if Path(name).exists():
        yield Path(name)
        return
    repo, quant = _split(name)
    files = _listed(repo)
    if isinstance(files, Path):
        whole = quant is None and (files / "config.json").is_file()
        yield files if whole else _gguf(files, quant, repo)
        return
    with tempfile.TemporaryDirectory(prefix="edgeq-") as place:
        folder = Path(place) / repo.rpartition("/")[2]
        folder.mkdir()
        found, told = folder, repo
        if quant or "config.json" not in files:
            file = choose(files, quant, repo)
            found, told = folder / Path(file).name, f"{repo}/{file}"
            _hollow(repo, file, found, _gguf_header)
        else:
            _hollow_checkpoint(repo, files, folder)
        try:
            yield found
        except EdgeqError as error:
            raise type(error)(str(error).replace(str(found), told)) from error


def _hollow_checkpoint(repo: str, files: Sequence[str], folder: Path) -> None:
    for file in files:
        if file.endswith(".safetensors") and "/" not in file:
            _hollow(repo, file, folder / file, _safetensors_header)
        elif file in _SMALL:
            (folder / file).write_bytes(_whole(repo, file))


def _hollow(repo: str, file: str, path: Path, enough: Callable[[bytes, int, str], int]) -> None:
    """A file of a repository's size with its first bytes; enough(bytes, size, name): how many."""
    source, data, need = f"{repo}/{file}", b"", _STEP
    more, size = _range(repo, file, 0, need)
    while True:
        data += more
        if len(data) < min(need, size):
            raise FormatError(f"{source}: ends at byte {len(data)} of {size}: try again")
        need = enough(data, size, source)
        if need > _MOST:
            raise FormatError(f"{source}: no header in its first {_MOST >> 20} MiB")
        if len(data) >= min(need, size):
            break
        more, size = _range(repo, file, len(data), need)
    try:
        with path.open("wb") as out:
            out.write(data)
            out.truncate(size)
    except OSError as error:
        raise ResourceError(
            f"{path.parent}: cannot hold the headers of {source}: {error.strerror}: set TMPDIR to "
            "a folder on another disk"
        ) from error


def _whole(repo: str, file: str) -> bytes:
    data, size = _range(repo, file, 0, _MOST)
    if size > _MOST:
        raise FormatError(f"{repo}/{file}: {size} bytes: expected at most {_MOST}")
    if len(data) != size:
        raise FormatError(f"{repo}/{file}: ends at byte {len(data)} of {size}: try again")
    return data


def _range(repo: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes start..stop of a file, or as many as it has, and its size."""
    content, size = _fetch(repo, lambda: _received(repo, file, start, stop))
    if size > _LARGEST:
        raise FormatError(f"{repo}/{file}: {size} bytes: expected at most {_LARGEST}")
    return content, size


def _received(repo: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
    """As `_range`; no more bytes are received, whatever a server sends."""
    from huggingface_hub import get_token, hf_hub_url, hf_raise_for_status

    # Compressed, the size would be that of other bytes.
    asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    token = get_token()
    if token:
        asked["authorization"] = f"Bearer {token}"
    with _stream(hf_hub_url(repo, file), asked) as answer:
        content = _first(answer, stop - start + 1) if answer.status_code < 300 else b""
    hf_raise_for_status(answer)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise FormatError(f"{repo}/{file}: the server compresses it: download the model first")
    place = answer.headers.get("Content-Range", "")
    given = re.fullmatch(rf"bytes {start}-[0-9]+/([0-9]{{1,99}})", place)
    if answer.status_code == 206 and given:
        return content[: stop - start], int(given[1])
    if start or len(content) > stop:
        raise FormatError(
            f"{repo}/{file}: the server sends it only as a whole: download the model first"
        )
    return content, len(content)


def _stream(url: str, headers: dict[str, str]) -> Any:
    """An answer whose body is not read yet, as a context."""
    from huggingface_hub import get_session

    session: Any = get_session()
    if callable(session.stream):  # an httpx client; before huggingface_hub 1.0 one of requests
        return session.stream("GET", url, headers=headers, timeout=30)
    return session.get(url, headers=headers, timeout=30, stream=True)


def _first(answer: Any, most: int) -> bytes:
    """The body of an answer, of a longer one `most` bytes."""
    raw = hasattr(answer, "iter_raw")
    content = bytearray()
    for piece in answer.iter_raw() if raw else answer.iter_content(1 << 16):
        content += piece
        if len(content) >= most:
            break
    return bytes(content[:most])


def _safetensors_header(data: bytes, size: int, source: str) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _gguf_header(data: bytes, size: int, source: str) -> int:
    try:
        read_header(data, size, source)
    except FormatError:
        if len(data) >= min(size, _MOST):
            raise
        return 2 * len(data)
    return len(data)


def choose(files: Sequence[str], quant: str | None, repo: str) -> str:
    """The GGUF file of a repository that a quant name means, whatever its case.

    Raises: RequestError listing what there is.

    >>> choose(["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf"], None, "user/m-GGUF")
    'm-Q4_K_M.gguf'
    >>> choose(["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "q8_0", "user/m-GGUF")
    'm-Q8_0.gguf'
    """
    found = sorted(f for f in files if _is_model(f))
    wanted = (quant or "Q4_K_M").lower()
    ends = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-./]|$)")
    fits = [file for file in found if ends.search(file.lower())]
    if not fits and not quant:
        fits = found
    if not fits:
        listed = ", ".join(found) or "none; `edgeq convert` makes one from a checkpoint"
        raise RequestError(f"{repo}: no GGUF file for {quant or 'any type'}: it has {listed}")
    if _SHARD.search(fits[0]):
        raise RequestError(f"{repo}: {fits[0]}: split files are not supported: choose another")
    return fits[0]


def _is_model(file: str) -> bool:
    name = file.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not name.startswith(_SIDECARS)


def _split(name: str) -> tuple[str, str | None]:
    match = _ID.fullmatch(name)
    if not match or name.endswith((".gguf", ".safetensors")):
        raise RequestError(f"{name}: no such file: expected a path, or user/repo[:quant]")
    return match["repo"], match["quant"]


def _files(repo: str) -> list[str]:
    """Names in a repository. Raises ResourceError when the hub cannot be asked."""
    from huggingface_hub import HfApi

    def ask() -> list[str]:
        # Not list_repo_files: that one retries for half a minute when there is no network.
        return [file.rfilename for file in HfApi().model_info(repo, timeout=10).siblings or []]

    return _fetch(repo, ask)


def _listed(repo: str) -> list[str] | Path:
    """Names in a repository; when the hub cannot be asked, the folder of what is cached of it."""
    from huggingface_hub import snapshot_download

    try:
        return _files(repo)
    except ResourceError as error:
        try:
            return Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise error from None


def _gguf(folder: Path, quant: str | None, repo: str) -> Path:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
    return folder / choose(names, quant, repo)


def _fetch(repo: str, action: Callable[[], T]) -> T:
    # A download can fail with errors of several libraries; to the user they are one thing.
    try:
        return action()
    except EdgeqError:
        raise
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> ResourceError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ResourceError(
        f"{repo}: no such file here, and not fetched from the hub: {reason}; "
        "check the name, the network and, for a gated model, HF_TOKEN"
    )
