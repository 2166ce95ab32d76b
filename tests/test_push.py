"""Publishing, against a stand-in of the hub that records what the real client sends."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distillabse import layout
from distillabse.checksums import write_checksums
from distillabse.errors import ConfigurationError, InputError, StorageError
from distillabse.export.push import push

FILES = {
    "README.md": "---\nlicense: mit\n---\n# Tiny\n",
    "config.json": "{}",
    "onnx/model.onnx": "not a graph",
    layout.PROVENANCE: "{}",
}


class Hub(ThreadingHTTPServer):
    """Answers what the client asks for an upload; `refuse` maps the start of a path to an HTTP status."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.refuse = [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def body(self, start):
        """What was posted to the first path that begins so."""
        return next(body for path, body in self.requests if path.startswith(start))

    @property
    def files(self):
        lines = [json.loads(line) for line in self.body("/api/models/me/tiny/commit").splitlines()]
        return {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]).decode()
            for line in lines if line["key"] == "file"
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, body))
        status = next((code for start, code in self.server.refuse.items() if self.path.startswith(start)), 200)
        url = f"{self.server.url}/me/tiny"
        if status != 200:
            answer = {"error": "because"}
        elif self.path.startswith("/api/repos/create"):
            answer = {"url": url, "name": "me/tiny", "id": "1"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{url}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        else:
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def bundle(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).write_text(content)
    write_checksums(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_every_file_is_uploaded_in_one_commit(bundle, hub, api):
    done = push(bundle, "me/tiny", private=True, message="First", api=api)
    assert hub.files == {**FILES, layout.CHECKSUMS: (bundle / layout.CHECKSUMS).read_text()}
    created = json.loads(hub.body("/api/repos/create"))
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "tiny", "private")
    header = json.loads(hub.body("/api/models/me/tiny/commit/main").splitlines()[0])
    assert header["value"]["summary"] == "First"
    assert done.commit == f"{hub.url}/me/tiny/commit/abc"
    assert sum("/commit/" in path for path, _ in hub.requests) == 1


def test_a_branch_is_made(bundle, hub, api):
    assert push(bundle, "me/tiny", revision="int8", api=api).pull_request is None
    paths = [path for path, _ in hub.requests]
    assert "/api/models/me/tiny/branch/int8" in paths
    assert "/api/models/me/tiny/commit/int8" in paths
    with pytest.raises(ConfigurationError, match="not both"):
        push(bundle, "me/tiny", revision="int8", create_pr=True, api=api)


def test_a_pull_request_is_asked_for(bundle, hub, api, monkeypatch):
    """The client makes it in several steps of its own; what it is asked for is all that is ours."""
    from types import SimpleNamespace

    asked = {}

    def upload_folder(**settings):
        asked.update(settings)
        return SimpleNamespace(commit_url="commit", pr_url="discussions/1")

    monkeypatch.setattr(api, "upload_folder", upload_folder)
    assert push(bundle, "me/tiny", create_pr=True, api=api).pull_request == "discussions/1"
    assert asked["create_pr"] is True and asked["folder_path"] == bundle and asked["revision"] is None


def test_a_changed_file_or_no_card_is_not_uploaded(bundle, hub, api):
    (bundle / "config.json").write_text('{"changed": 1}')
    with pytest.raises(InputError, match=r"not whole: config\.json"):
        push(bundle, "me/tiny", api=api)
    (bundle / layout.MODEL_CARD).unlink()
    write_checksums(bundle)
    with pytest.raises(InputError, match=r"has no README\.md"):
        push(bundle, "me/tiny", api=api)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("start", "status", "error", "message"),
    [
        ("/api/repos/create", 401, ConfigurationError, "does not know the token .*hf auth login"),
        ("/api/models/me/tiny/preupload", 403, ConfigurationError, "may not write to me/tiny"),
        ("/api/models/me/tiny/commit", 400, InputError, "refused me/tiny: .*because"),
    ],
)
def test_what_the_hub_refuses_is_explained(bundle, hub, api, start, status, error, message):
    hub.refuse[start] = status
    with pytest.raises(error, match=message):
        push(bundle, "me/tiny", api=api)


def test_a_name_that_is_none(bundle, hub, api):
    with pytest.raises(InputError, match="'no name/at/all' is no name"):
        push(bundle, "no name/at/all", api=api)
    assert not any("/commit/" in path for path, _ in hub.requests)


def test_no_network(bundle, hub):
    from huggingface_hub import HfApi

    unused = f"http://127.0.0.1:{hub.server_port}"
    hub.shutdown()
    hub.server_close()
    with pytest.raises(StorageError, match="cannot be reached"):
        push(bundle, "me/tiny", api=HfApi(endpoint=unused, token="hf_test"))


def test_no_token(bundle, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="hf auth login"):
        push(bundle, "me/tiny")


def test_offline_mode_is_named(bundle, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="cannot be reached"):
        push(bundle, "me/tiny", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))
