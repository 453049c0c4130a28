"""Models named as on the Hugging Face Hub: `user/repo[:quant]` becomes a file or folder on disk.

Downloads land in the cache that other tools share (HF_HOME); HF_HUB_OFFLINE and HF_TOKEN work as
everywhere. A path that exists is always a path.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from edgeq.errors import FormatError, RequestError, ResourceError
from edgeq.gguf.header import read_header

__all__ = ["checkpoint", "choose", "headers", "model"]

T = TypeVar("T")

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quant>\w+))?")
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
# Other forms of the same model; `*` stands for `/` too.
_OTHER_FILES = ["*/*", "consolidated*"]
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_STEP, _MOST = 1 << 20, 1 << 26  # bytes of a header: fetched at first, and at most
_SIDECARS = ("mmproj", "mtp-", "imatrix")


def model(name: str) -> Path:
    """GGUF file for a path or `user/repo[:quant]`; Q4_K_M, else the first file, without a quant.

    Raises: RequestError when it is neither, ResourceError when it cannot be fetched.
    """
    if Path(name).exists():
        return Path(name)
    repo, quant = _split(name)
    file = choose(_files(repo), quant, repo)
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
    Removed in the end.

    Raises: as `model`.
    """
    if Path(name).exists():
        yield Path(name)
        return
    repo, quant = _split(name)
    files = _files(repo)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as place:
        folder = Path(place) / repo.rpartition("/")[2]
        folder.mkdir()
        if quant or "config.json" not in files:
            file = choose(files, quant, repo)
            yield _hollow(repo, file, folder / Path(file).name, _gguf_header)
            return
        for file in files:
            if file.endswith(".safetensors") and "/" not in file:
                _hollow(repo, file, folder / file, _safetensors_header)
            elif file in _SMALL:
                _hollow(repo, file, folder / file, _all)
        yield folder


_SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json")


def _hollow(repo: str, file: str, path: Path, enough: Callable[[bytes, int, str], int]) -> Path:
    """A file of a repository's size with its first bytes; enough(bytes, size, name): how many."""
    data, size = b"", 1
    need = _STEP
    while len(data) < min(need, size):
        start = len(data)
        more, size = _fetch(repo, lambda: _range(repo, file, start, need))  # noqa: B023
        data += more
        need = enough(data, size, f"{repo}/{file}")
        if need > _MOST or not more:
            raise FormatError(f"{repo}/{file}: no header in its first {len(data)} bytes")
    with path.open("wb") as out:
        out.write(data)
        out.truncate(size)
    return path


def _range(repo: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes start..stop of a file, or as many as it has, and its size."""
    from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status

    asked, token = {"Range": f"bytes={start}-{stop - 1}"}, get_token()
    if token:
        asked["authorization"] = f"Bearer {token}"
    answer = get_session().get(hf_hub_url(repo, file), headers=asked, timeout=30)
    hf_raise_for_status(answer)
    content = bytes(answer.content)
    given = re.fullmatch(rf"bytes {start}-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if given:
        return content, int(given[1])
    return content[start:], len(content)  # the whole file


def _all(data: bytes, size: int, source: str) -> int:
    return size


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
    """Names in a repository; when the hub cannot be asked, of what is cached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Not list_repo_files: that one retries for half a minute when there is no network.
        return [file.rfilename for file in HfApi().model_info(repo, timeout=10).siblings or []]
    except Exception as error:
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise _unreachable(repo, error) from error
        return [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]


def _fetch(repo: str, action: Callable[[], T]) -> T:
    # A download can fail with errors of several libraries; to the user they are one thing.
    try:
        return action()
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> ResourceError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ResourceError(
        f"{repo}: no such file here, and not fetched from the hub: {reason}; "
        "check the name, the network and, for a gated model, HF_TOKEN"
    )
