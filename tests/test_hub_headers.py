"""Of a model on the hub only headers are fetched, whatever the server does."""

import contextlib
import gzip
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeq
from edgeq import hub
from edgeq.blueprint import read
from edgeq.errors import FormatError, ResourceError

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"


class Server(http.server.BaseHTTPRequestHandler):
    """Files of a folder as the hub gives them, parts of files too; what was sent is counted."""

    folder: Path
    sent: dict[str, int]
    habits: dict[str, Any]  # what a server may do otherwise

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            names = [{"rfilename": path.name} for path in self.folder.iterdir()]
            self._send(200, json.dumps({"id": "user/m", "siblings": names}).encode(), {})
            return
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self._send(404, b"", {})
            return
        content = path.read_bytes()
        if "whole" in self.habits:
            self._whole(content)
            return
        start, stop = (
            int(word) for word in self.headers["Range"].removeprefix("bytes=").split("-")
        )
        part = content[start : stop + 1]
        self.sent[path.name] = self.sent.get(path.name, 0) + len(part)
        size = self.habits.get("size", len(content))
        place = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}
        accepted = self.headers.get("Accept-Encoding", "gzip")
        if self.habits.get("gzip") == "always" or ("gzip" in self.habits and "gzip" in accepted):
            part = gzip.compress(part)
            place["Content-Encoding"] = "gzip"
        self._send(206, part, place)

    def _send(
        self, code: int, body: bytes, headers: dict[str, str], *, length: bool = True
    ) -> None:
        self.send_response(code)
        told = {"Content-Length": str(len(body))} if length else {}
        for name, value in {**told, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # nobody has to read all of it
            self.wfile.write(body)

    def _whole(self, content: bytes) -> None:
        """Deaf to `Range`; from 1 MiB on the same again and again, to 256 MiB."""
        self._send(200, content, {"Connection": "close"}, length=len(content) < 1 << 20)
        while len(content) >= 1 << 20 and self.sent.setdefault("whole", 0) < 1 << 28:
            try:
                self.wfile.write(content)
            except ConnectionError:
                return
            self.sent["whole"] += len(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A hub on this machine with the files of a folder as user/m."""
    handler = type("Handler", (Server,), {"folder": tmp_path / "repo", "sent": {}, "habits": {}})
    handler.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        place + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hub, "_files", lambda repo: [p.name for p in handler.folder.iterdir()])
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_a_hub_name_only_headers_are_fetched(
    served: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_STEP", 1 << 16)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(EXAMPLE / name, served.folder)
    with hub.headers("user/m") as path:
        found = read(path)
        assert path.name == "m"
    assert not path.exists()
    assert served.sent["model.safetensors"] <= 1 << 16
    assert "tokenizer.model" not in served.sent
    assert not found.exact
    example = read(EXAMPLE)
    for file, whole in zip(found.files, example.files):
        assert (file.recipe, file.data) == (whole.recipe, whole.data)
        assert file.nbytes == pytest.approx(whole.nbytes, rel=0.1)


def test_of_a_hub_file_only_its_header_is_fetched(
    served: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_STEP", 1 << 14)  # less than the header: several requests
    made = edgeq.convert(EXAMPLE, served.folder / "m-F16.gguf", "F16", method="rtn")
    with hub.headers("user/m:f16") as path:
        found = read(path)
    assert found.exact
    assert [f.nbytes for f in found.files] == [f.nbytes for f in read(made).files]
    assert served.sent["m-F16.gguf"] < made.stat().st_size / 10


def test_damaged_files_of_a_hub_are_refused(
    served: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    (served.folder / "m-Q8_0.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FormatError), hub.headers("user/m"):
        pass
    (served.folder / "config.json").write_text("{}")
    (served.folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match="no header"), hub.headers("user/m"):
        pass
    monkeypatch.setattr(hub, "_files", lambda repo: ["gone.gguf"])
    with pytest.raises(ResourceError, match="not fetched"), hub.headers("user/m"):
        pass


def test_a_path_is_read_as_it_is() -> None:
    with hub.headers(str(EXAMPLE)) as path:
        assert path == EXAMPLE


# -- hubs and files of another kind ----------------------------------------------------------------
def test_errors_name_the_repository(served: type[Server]) -> None:
    """Not the temporary folder, which is gone when they are read."""
    made = edgeq.convert(EXAMPLE, served.folder / "m.gguf", "F16", method="rtn")
    made.write_bytes(made.read_bytes().replace(b"llama.block_count", b"llama.block_kount"))
    expected = r"^user/m/m\.gguf: llama\.block_count is missing"
    with pytest.raises(FormatError, match=expected), hub.headers("user/m") as path:
        read(path)
    (served.folder / "config.json").write_text("{")
    expected = r"^user/m/config\.json: not valid JSON"
    with pytest.raises(FormatError, match=expected), hub.headers("user/m") as path:
        read(path)


@pytest.mark.parametrize("size", [10**13, 10**30])
def test_sizes_that_no_file_has(served: type[Server], size: int) -> None:
    (served.folder / "config.json").write_text("{}")
    served.habits["size"] = size
    expected = rf"config\.json: {size} bytes: expected at most"
    with pytest.raises(FormatError, match=expected), hub.headers("user/m"):
        pass


def test_headers_for_which_there_is_no_room(served: type[Server]) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits of processes")
    made = edgeq.convert(EXAMPLE, served.folder / "m.gguf", "F16", method="rtn")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (made.stat().st_size - 1, limits[1]))
    try:
        with pytest.raises(ResourceError, match="set TMPDIR"), hub.headers("user/m"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_server_without_parts_of_files(served: type[Server]) -> None:
    """Small files will do; of a large one little more is taken than was asked for."""
    served.habits["whole"] = True
    (served.folder / "config.json").write_text('{"architectures": []}')
    with hub.headers("user/m") as path:
        assert json.loads((path / "config.json").read_text()) == {"architectures": []}
    (served.folder / "model.safetensors").write_bytes(bytes(1 << 20))
    expected = r"model\.safetensors: the server sends it only as a whole"
    with pytest.raises(FormatError, match=expected), hub.headers("user/m"):
        pass
    assert served.sent["whole"] < 1 << 26  # what buffers of sockets hold


def test_bytes_are_asked_for_as_they_are(served: type[Server]) -> None:
    """Compressed, the size in the answer would cut the file."""
    served.habits["gzip"] = True
    text = json.dumps({"architectures": ["a"] * 1000})
    (served.folder / "config.json").write_text(text)
    with hub.headers("user/m") as path:
        assert (path / "config.json").read_text() == text
    served.habits["gzip"] = "always"
    with pytest.raises(FormatError, match="the server compresses it"), hub.headers("user/m"):
        pass


def test_what_older_tools_say_of_quantization_is_fetched(served: type[Server]) -> None:
    names = ("config.json", "quantize_config.json", "quant_config.json", "other.json")
    for name in names:
        (served.folder / name).write_text("{}")
    with hub.headers("user/m") as path:
        assert {file.name for file in path.iterdir()} == set(names[:3])


def test_sessions_of_requests_do_as_well(
    served: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub before 1.0 has such."""
    requests = pytest.importorskip("requests", reason="requests is not installed")
    monkeypatch.setattr("huggingface_hub.get_session", requests.Session)
    (served.folder / "config.json").write_text("{}")
    with hub.headers("user/m") as path:
        assert (path / "config.json").read_text() == "{}"


# -- without a network -----------------------------------------------------------------------------
def test_what_is_cached_is_planned_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ResourceError, match="no route to host"), hub.headers("user/m"):
        pass
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    (tmp_path / "m-Q4_K_M.gguf").touch()
    with hub.headers("user/m") as path:
        assert path == tmp_path / "m-Q4_K_M.gguf"
    (tmp_path / "config.json").touch()
    with hub.headers("user/m") as path:
        assert path == tmp_path
    with hub.headers("user/m:q4_k_m") as path:
        assert path == tmp_path / "m-Q4_K_M.gguf"
    assert (tmp_path / "config.json").exists()  # nothing of the cache is removed
