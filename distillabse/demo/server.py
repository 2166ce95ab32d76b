"""Serves the page, what it runs on, and the files of one bundle, to this machine alone."""

from __future__ import annotations

import json
import shutil
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from distillabse import layout
from distillabse.errors import ConfigurationError, InputError
from distillabse.storage import read_json

_PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
_HEADERS = {
    # Both are needed for threads in WebAssembly.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    # Nothing is loaded from, or sent to, any other place.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src data:; connect-src 'self'; worker-src 'self' blob:",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
_BUNDLE_FILES = (
    layout.TOKENIZER, layout.TOKENIZER_SETTINGS, layout.TRANSFORMER_SETTINGS, layout.SENTENCE_TRANSFORMERS_SETTINGS,
)  # fmt: skip


def demo_server(bundle: Path, port: int, *, assets: Path, file: str | None = None) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1 that is ready to `serve_forever`.

    Args:
        bundle: Folder that `distillabse export` wrote.
        port: 0 takes any free one.
        assets: Folder with what the page runs on; see `assets.fetch`.
        file: Graph inside the bundle; by default INT8 where there is one.

    Raises:
        InputError: a file of the bundle is missing, or its graph is not one file.
        ConfigurationError: the port is taken.
    """
    graph = file or layout.int8_graph(bundle) or layout.ONNX_FP32
    missing = [name for name in (*_BUNDLE_FILES, graph) if not (bundle / name).is_file()]
    if missing:
        raise InputError(f"{bundle} has no {', '.join(missing)}. Give the folder that `distillabse export` wrote.")
    if (bundle / f"{graph}_data").exists():
        raise InputError(f"{bundle / graph} keeps its weights in a second file: too large for a browser. Take INT8.")
    files = {f"/bundle/{name}": bundle / name for name in (*_BUNDLE_FILES, graph)}
    files |= {f"/page/{path.name}": path for path in _PAGE.iterdir()}
    files |= {f"/assets/{path.name}": path for path in assets.iterdir()}
    files["/"] = _PAGE / "index.html"
    try:
        return _Server(port, files, {"name": _name(bundle), "graph": graph})
    except OSError as error:
        raise ConfigurationError(f"Port {port} cannot be used ({error}). Choose another one with --port.") from error


class _Server(ThreadingHTTPServer):
    def __init__(self, port: int, files: dict[str, Path], info: dict[str, Any]) -> None:
        self.files = files
        self.info = json.dumps(info).encode()
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send one of the files that the server was given; there are no others."""
        path = unquote(urlsplit(self.path).path)
        if path == "/info.json":
            self._start(HTTPStatus.OK, ".json", len(self.server.info))
            self.wfile.write(self.server.info)
        elif (file := self.server.files.get(path)) is not None:
            with file.open("rb") as content:
                self._start(HTTPStatus.OK, file.suffix, file.stat().st_size)
                shutil.copyfileobj(content, self.wfile)
        else:
            self._start(HTTPStatus.NOT_FOUND, ".html", 0)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal shows the address."""

    def _start(self, status: HTTPStatus, suffix: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(size))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()


def _name(bundle: Path) -> str:
    provenance = bundle / layout.PROVENANCE
    name = read_json(provenance).get("name") if provenance.is_file() else None
    return str(name or bundle.resolve().name)
