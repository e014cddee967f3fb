"""A data set is fetched from a hub by the real client, and a hub that fails says what to do."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest

from hauberk.data.sources import load
from hauberk.data.sources.hub import locate
from hauberk.errors import BadData
from tests.data.layouts import LAYOUTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYOUT = next(layout for layout in LAYOUTS if layout.name == "textvqa")


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs."""

    files: ClassVar[dict[str, bytes]] = {}
    status = 200
    code = ""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        content = self.files.get(name, b"")
        if self.status == 200 and path.startswith("/api/datasets/"):
            listed = [
                {"type": "file", "rfilename": each, "path": each, "size": len(held), "oid": "0"}
                for each, held in self.files.items()
            ]
            told = listed if "/tree/" in path else {"id": "o/n", "sha": COMMIT, "siblings": listed}
            content = json.dumps(told).encode()
        self.send_response(self.status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"some-etag"')
        if self.code:
            self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = LAYOUT.write(tmp_path / "there")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    handler = type("Some", (Hub,), {"files": {**files, "data/test-00000-of-00001.parquet": b"x"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    reached(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def reached(monkeypatch, cache, endpoint):
    """Let the client look for its hub there, and keep what it fetches in a folder of the test."""
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **more: fetch(name, cache_dir=cache, endpoint=endpoint, **more),
    )


def test_what_is_needed_is_fetched_and_its_commit_is_the_revision(hub, tmp_path):
    found = load("textvqa", "some/mirror", allow_partial=True)
    assert found.manifest.revision == COMMIT
    assert [sample.revision for sample in found] == [COMMIT] * 2
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.parquet")}
    assert fetched == {"validation-00000-of-00001.parquet"}


def test_a_branch_is_told_as_the_commit_that_was_fetched(hub):
    assert load("textvqa", "o/n", revision="main", allow_partial=True).manifest.revision == COMMIT


def test_what_was_fetched_is_there_without_the_hub(hub, tmp_path):
    first = list(load("textvqa", "some/mirror", allow_partial=True))
    hub.status = 503
    assert list(load("textvqa", "some/mirror", allow_partial=True)) == first


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"o/n: must be asked for.*accept its terms at https.*hf auth login"),
        (404, "RepoNotFound", r"o/n: is no folder here and no data set on the hub"),
        (404, "RevisionNotFound", r"o/n: has no revision 'abc'"),
        (503, "", r"the hub does not hand it out.*Fetch data/x\.parquet of https.*hf download"),
    ],
)
def test_a_hub_that_refuses_says_what_to_do(hub, status, code, message):
    hub.status, hub.code = status, code
    with pytest.raises(BadData, match=message):
        locate("o/n", ["data/x.parquet"], "abc")


def test_no_hub_at_all_names_the_files_and_where_to_put_them(tmp_path, monkeypatch):
    reached(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(BadData) as told:
        load("textvqa")
    for part in ("lmms-lab/textvqa", "data/validation-*.parquet", "--local-dir", "that folder"):
        assert part in str(told.value)


def test_a_place_that_is_neither_folder_nor_id_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "none", "a/b/c", "nothing here"):
        with pytest.raises(BadData, match="is no folder; give the folder of the data set, or its"):
            locate(where, ["*"], None)
