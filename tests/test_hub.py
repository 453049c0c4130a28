"""Models by name: which file is meant, and what is said when it cannot be had."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeq import hub
from edgeq.errors import RequestError, ResourceError

FILES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-q8_0.gguf",
    "mmproj-m-F16.gguf",
    "BF16/m-BF16-00001-of-00002.gguf",
]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub with one repository; the list collects what is downloaded."""
    fetched: list[Any] = []
    siblings = [SimpleNamespace(rfilename=name) for name in FILES]
    found = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: found)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repo, file: fetched.append((repo, file)) or f"cache/{file}",
    )
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **patterns: fetched.append((repo, patterns)) or "cache/folder",
    )
    return fetched


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    for name in ("HfApi.model_info", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", fail)


def test_what_exists_is_a_path(tmp_path: Path, offline: None) -> None:
    assert hub.model(str(tmp_path)) == tmp_path
    assert hub.checkpoint(str(tmp_path)) == tmp_path


def test_a_name_is_downloaded(online: list[Any]) -> None:
    assert hub.model("user/m-GGUF") == Path("cache/m-Q4_K_M.gguf")
    assert hub.model("user/m-GGUF:Q8_0") == Path("cache/m-q8_0.gguf")
    assert hub.checkpoint("user/m") == Path("cache/folder")
    assert hub.checkpoint("user/m:q8_0") == Path("cache/m-q8_0.gguf")


def test_a_checkpoint_is_fetched_once_and_without_pickles(online: list[Any]) -> None:
    """Not a second copy of the weights in another form, nor what lies in sub-folders."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
    ]
    other = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
        "a/b/tokenizer.json",
    ]
    hub.checkpoint("user/m")
    [(_, patterns)] = online
    assert sorted(filter_repo_objects(wanted + other, **patterns)) == sorted(wanted)


def test_names_that_mean_no_file(online: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"Q5_K_M: it has .*m-q8_0"):
        hub.model("user/m-GGUF:Q5_K_M")
    with pytest.raises(RequestError, match="split files"):
        hub.model("user/m-GGUF:BF16")
    with pytest.raises(RequestError, match="for F16"):  # the sidecar is no model
        hub.model("user/m-GGUF:F16")
    assert online == []


@pytest.mark.parametrize("name", ["nofile", "./a/b.gguf", "a/b.gguf", "/a/b", "a/b/c", "a/b:c:d"])
def test_paths_are_not_asked_for(offline: None, name: str) -> None:
    with pytest.raises(RequestError, match="no such file"):
        hub.model(name)


def test_offline_is_one_clear_line(offline: None) -> None:
    for fetch in (hub.model, hub.checkpoint):
        with pytest.raises(ResourceError, match="no route to host; check the name") as caught:
            fetch("user/m")
        assert "\n" not in str(caught.value)


def test_offline_finds_what_is_cached(
    offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "m-Q4_K_M.gguf").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(tmp_path / file))
    assert hub.model("user/m") == tmp_path / "m-Q4_K_M.gguf"
