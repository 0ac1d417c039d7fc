"""A stand-in for the Hub: the part of its HTTP interface that the real client uses to publish."""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.hf_api import api
from huggingface_hub.utils import close_session

TOKEN = "hf_" + "a1B2" * 8
LARGE = (".safetensors", ".parquet")


@dataclass
class Hub:
    """State of the stand-in: its repositories, and the errors that it answers with."""

    address: str = ""
    repositories: dict[str, dict] = field(default_factory=dict)  # id -> {"private", "commits": [{path: bytes}]}
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    uploads: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # of the commits
    status: dict[str, int] = field(default_factory=dict)  # part of a path -> status of the answer

    def files(self, repo_id: str) -> dict[str, bytes]:
        (commit,) = self.repositories[repo_id]["commits"]
        return commit


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A running stand-in, with a token for it in the environment."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            for part, status in state.status.items():
                if part in self.path:
                    return self.answer({"error": "no"}, status)
            if "/upload/" in self.path:  # a signed address, as the Hub's storage has
                state.objects[self.path.rpartition("/")[2]] = body
                state.uploads.append(self.path)
                return self.answer()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid credentials"}, 401)
            return self.serve(self.path.split("?")[0], body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (http.server's names)

        def serve(self, path: str, body: bytes) -> None:
            if path == "/api/repos/create":
                wanted = json.loads(body)
                repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                if repo_id in state.repositories:
                    return self.answer(
                        {"error": "You already created this repo", "url": f"{state.address}/{repo_id}"}, 409
                    )
                state.repositories[repo_id] = {
                    "private": wanted.get("visibility") == "private" or wanted.get("private"),
                    "commits": [],
                }
                return self.answer({"url": f"{state.address}/{repo_id}", "id": repo_id})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path.endswith("/info/lfs/objects/batch"):
                return self.answer(
                    {"transfer": "basic", "objects": [self.object(o) for o in json.loads(body)["objects"]]}
                )
            repo_id = "/".join(path.split("/")[1:3] if "/resolve/" in path else path.split("/")[3:5])
            if repo_id not in state.repositories:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if "/resolve/" in path:
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            if "/preupload/" in path:
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
            if "/commit/" in path:
                return self.commit(repo_id, [json.loads(line) for line in body.splitlines()])
            return self.answer({"id": repo_id, "sha": "1" * 40, "siblings": []})

        def object(self, wanted: dict) -> dict:
            action = {"upload": {"href": f"{state.address}/upload/{wanted['oid']}"}}
            return wanted if wanted["oid"] in state.objects else wanted | {"actions": action}

        def commit(self, repo_id: str, lines: list[dict]) -> None:
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    state.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = state.objects[value["oid"]]
                    assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            state.repositories[repo_id]["commits"].append(files)
            url = f"{state.address}/{repo_id}/commit/{'2' * 40}"
            self.answer({"success": True, "commitOid": "2" * 40, "commitUrl": url, "hookOutput": ""})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    settings = {"ENDPOINT": state.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = state.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(api, "endpoint", state.address)  # used by the functions of huggingface_hub
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()  # it has the old settings
    yield state
    server.shutdown()
    server.server_close()
    close_session()
