"""Models named as on the Hugging Face Hub: `user/repo[:quant]` becomes a file or folder on disk.

Downloads land in the cache that other tools share (HF_HOME); HF_HUB_OFFLINE and HF_TOKEN work as
everywhere. A path that exists is always a path.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq.errors import RequestError, ResourceError

__all__ = ["checkpoint", "choose", "model"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quant>\w+))?")
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
# Other forms of the same model; `*` stands for `/` too.
_OTHER_FILES = ["*/*", "consolidated*"]
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
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

    return _fetch(repo, lambda: hf_hub_download(repo, file))


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

    return _fetch(repo, fetch)


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


def _fetch(repo: str, action: Callable[[], str]) -> Path:
    # A download can fail with errors of several libraries; to the user they are one thing.
    try:
        return Path(action())
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> ResourceError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ResourceError(
        f"{repo}: no such file here, and not fetched from the hub: {reason}; "
        "check the name, the network and, for a gated model, HF_TOKEN"
    )
