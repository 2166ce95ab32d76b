"""The page, its server, and what it runs on; end to end in headless Chromium where that is installed."""

import base64
import hashlib
import http.client
import io
import sys
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distillabse import layout
from distillabse.config import ExportConfig, TeacherConfig
from distillabse.demo import assets
from distillabse.demo.server import demo_server
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError, StorageError
from distillabse.export.bundle import write_bundle
from distillabse.models.teacher import load_teacher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "consumers"))

from chromium import browser_page, find_chromium  # noqa: E402


@pytest.fixture(scope="module")
def bundle(encoder_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "bundle"
    path.mkdir()
    write_bundle(load_teacher(TeacherConfig(model=str(encoder_folder))), path, ExportConfig(), {"name": "tiny"})
    return path


@contextmanager
def running(*arguments, **settings):
    with demo_server(*arguments, **settings) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_server_gives_the_page_and_the_bundle_and_nothing_else(bundle, tmp_path):
    (tmp_path / "ort.wasm").write_bytes(b"wasm")
    with running(bundle, 0, assets=tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, headers, page = get(server, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert b"http" not in page  # the page loads nothing from elsewhere
        assert get(server, "/page/demo.mjs")[1]["Content-Type"] == "text/javascript; charset=utf-8"
        status, headers, content = get(server, "/assets/ort.wasm")
        assert (status, headers["Content-Type"], content) == (200, "application/wasm", b"wasm")
        int8 = layout.ONNX_INT8["avx512_vnni"]
        assert get(server, f"/bundle/{int8}")[2] == (bundle / int8).read_bytes()
        assert get(server, "/info.json")[2] == b'{"name": "tiny", "graph": "onnx/model_qint8_avx512_vnni.onnx"}'
        for path in ("/bundle/model.safetensors", "/bundle/../bundle/config.json", "/%2e%2e/etc/passwd", "/page/"):
            assert get(server, path)[0] == 404


def test_what_cannot_be_served_is_refused(bundle, tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        demo_server(tmp_path, 0, assets=tmp_path)
    with pytest.raises(InputError, match=r"has no onnx/other\.onnx"):
        demo_server(bundle, 0, assets=tmp_path, file="onnx/other.onnx")
    with running(bundle, 0, assets=tmp_path) as server, pytest.raises(ConfigurationError, match="Choose another one"):
        demo_server(bundle, server.server_port, assets=tmp_path)


def test_assets_are_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in ("package/dist/a.mjs", "package/dist/not-needed.js"):
            file = tarfile.TarInfo(name)
            file.size = 5
            tar.addfile(file, io.BytesIO(b"hello"))
    archive = content.getvalue()
    registry = tmp_path / "registry"
    (registry / "@scope" / "a" / "-").mkdir(parents=True)
    (registry / "@scope" / "a" / "-" / "a-1.2.3.tgz").write_bytes(archive)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry.as_uri())
    integrity = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    monkeypatch.setattr(assets, "PACKAGES", (assets.Package("@scope/a", "1.2.3", integrity[::-1], ("dist/a.mjs",)),))
    with pytest.raises(InputError, match="distillabse demo --fetch-assets"):
        assets.require_assets()
    with pytest.raises(InputError, match=r"is not @scope/a 1\.2\.3 as it was published"):
        assets.fetch()
    assert not assets.assets_folder().exists()
    monkeypatch.setattr(assets, "PACKAGES", (assets.Package("@scope/a", "1.2.3", integrity, ("dist/a.mjs",)),))
    folder = assets.fetch()
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a.mjs", b"hello")]
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "nowhere").as_uri())
    assert assets.fetch() == assets.require_assets() == folder
    (folder / "a.mjs").unlink()
    with pytest.raises(StorageError, match="NPM_CONFIG_REGISTRY"):
        assets.fetch()


def test_the_command_says_what_is_missing(bundle, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from distillabse.cli import app

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(CliRunner().invoke(app, ["demo"]).exception, ConfigurationError)
    assert isinstance(CliRunner().invoke(app, ["demo", str(bundle)]).exception, InputError)


def has_assets():
    try:
        assets.require_assets()
    except InputError:
        return False
    return True


@pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
@pytest.mark.skipif(not has_assets(), reason="needs `distillabse demo --fetch-assets`")
@pytest.mark.parametrize(("file", "tolerance"), [(layout.ONNX_FP32, 1e-5), (layout.ONNX_INT8["avx512_vnni"], 2e-2)])
def test_what_is_typed_is_compared_in_the_browser(bundle, file, tolerance):
    """INT8 is compared loosely: other float kernels flip roundings (docs/shipping.md)."""
    left = ["Where is the old house?", "naïve, ÄÖÜ! 東京"]
    right = ["hello", "The cat and the dog sleep", "the " * 100]
    with running(bundle, 0, assets=assets.require_assets(), file=file) as server, browser_page(find_chromium()) as page:
        page.open(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for("self.encoder !== undefined")
        page.type("#left", "\n".join(left))
        page.type("#right", "\n".join(right))
        cells = "[...document.querySelectorAll('#similarities td[data-value]')]"
        page.wait_for(f"{cells}.length === 6")
        found = np.array(page.evaluate(f"{cells}.map((cell) => Number(cell.dataset.value))")).reshape(2, 3)
        encoder = Encoder(bundle, file=file)
        expected = encoder.encode(left) @ encoder.encode([text.strip() for text in right]).T
        np.testing.assert_allclose(found, expected, atol=tolerance)
        assert np.ptp(expected) > 0.1
        heads = page.evaluate("[...document.querySelectorAll('#similarities th')].map((cell) => cell.textContent)")
        assert heads == [*(text.strip() for text in right), *left]
        assert page.evaluate("document.querySelectorAll('#similarities td.best').length") == 2
        assert "onnx/" in page.evaluate("document.getElementById('status').textContent")
