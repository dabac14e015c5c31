"""A local stand-in for the HTTP interface of the Hugging Face hub; the client is the real one.

Tests take it from the fixture `serve_hub` (conftest.py), since tests are no package.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_sesame"


def commit_of(branch: str) -> str:
    """The one commit of a branch."""
    return COMMIT if branch == "main" else hashlib.sha1(branch.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves one repository's files, with ranges, and takes commits to it.

    Attributes:
        repo: "owner/name".
        files: name -> bytes; of the default branch and of COMMIT.
        branches: name -> files, of branches that were pushed to.
        log: (method, file, bytes of the body) of every download.
        before: called with the name of every file that is asked for whole.
        commits: header of every commit.
        objects: sha256 -> bytes of uploaded large files.
        created: body of the request that made the repository.
        private: what the hub says about it.
        exists: whether there is such a repository.
    """

    def __init__(self, files: dict[str, bytes], repo: str = "owner/model", exists: bool = True):
        self.repo, self.files, self.exists, self.private = repo, files, exists, False
        self.log: list[tuple[str, str, int]] = []
        self.before: Callable[[str], object] = lambda file: None
        self.branches: dict[str, dict[str, bytes]] = {"main": files}
        self.commits: list[dict] = []
        self.objects: dict[str, bytes] = {}
        self.received: list[str] = []
        self.created: dict | None = None
        super().__init__(("127.0.0.1", 0), Handler)

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """Environment of a process that takes this for the hub."""
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home)}
        env |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_OFFLINE": str(int(offline)), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            env.pop(name, None)
        return env

    def attach(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """Makes this process take it for the hub; what the library reads from the environment at
        its import is in its constants by now.
        """
        end = f"http://127.0.0.1:{self.server_port}"
        patch.setattr(constants, "ENDPOINT", end)
        template = f"{end}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        patch.setenv("NO_PROXY", "127.0.0.1")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Sends a response."""
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, status: int = 200) -> None:
        """Sends JSON."""
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        """Like GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Information about the repository, its tree, and files."""
        path, hub = self.path.split("?")[0], self.server
        info = re.fullmatch(rf"/api/models/{hub.repo}(/revision/([^/]+))?", path)
        tree = re.fullmatch(rf"/api/models/{hub.repo}/tree/([^/]+)", path)
        file = re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)", path)
        branch = (info and info[2]) or (tree and tree[1]) or (file and file[1]) or "main"
        branch = next((b for b in hub.branches if commit_of(b) == branch), branch)
        files = hub.branches.get(branch)
        if not (info or tree or file) or files is None or not hub.exists:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if info:
            siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
            about = {"id": hub.repo, "modelId": hub.repo, "private": hub.private}
            about["sha"] = commit_of(branch)
            return self.json(about | {"siblings": siblings, "tags": []})
        if tree:
            entries = [
                {"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in files.items()
            ]
            return self.json(entries)
        if file[2] not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.send_file(file[2], files[file[2]], commit_of(branch))

    def send_file(self, name: str, body: bytes, commit: str) -> None:
        """A file or a range of it."""
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit}
        status, part = 200, body
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(body) - 1)
            part, status = body[first : last + 1], 206
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        got = self.command == "GET"
        self.server.log.append((self.command, name, len(part) if got else 0))
        if got and len(part) == len(body):
            self.server.before(name)
        return self.answer(status, part, Accept_Ranges="bytes", **headers)

    def do_POST(self) -> None:
        """Making the repository or a branch, and the steps of a commit."""
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].startswith("---\n")
            return self.json({"errors": [], "warnings": []}, 200 if head else 400)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            # the client takes no other host for the hub's
            about = {"url": f"https://huggingface.co/{hub.repo}", "name": hub.repo}
            if hub.exists:
                return self.json(about | {"error": "You already created this model repo"}, 409)
            hub.exists, hub.created = True, json.loads(body)
            hub.private = hub.created.get("visibility") == "private"
            return self.json(about)
        if m := re.fullmatch(rf"/api/models/{hub.repo}/branch/(.+)", path):
            hub.branches.setdefault(m[1], dict(hub.files))
            return self.json({})
        if re.fullmatch(rf"/api/models/{hub.repo}/preupload/(.+)", path):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.json({"files": modes})
        if path == f"/{hub.repo}.git/info/lfs/objects/batch":
            return self.json({"transfer": "basic", "objects": self.uploads(json.loads(body))})
        if m := re.fullmatch(rf"/api/models/{hub.repo}/commit/(.+)", path):
            return self.commit(m[1], [json.loads(line) for line in body.splitlines()])
        return self.answer(404)

    def uploads(self, asked: dict) -> list[dict]:
        """Where large files go; those that are here already go nowhere."""
        base = f"http://127.0.0.1:{self.server.server_port}/upload"
        return [
            item
            if item["oid"] in self.server.objects
            else item | {"actions": {"upload": {"href": f"{base}/{item['oid']}"}}}
            for item in asked["objects"]
        ]

    def commit(self, branch: str, lines: list[dict]) -> None:
        """Applies a commit."""
        hub = self.server
        files = hub.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value | {"branch": branch})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"https://huggingface.co/{hub.repo}/commit/{COMMIT}"
        self.json({"commitUrl": url, "commitOid": COMMIT})

    def do_PUT(self) -> None:
        """A large file."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400)
        self.server.objects[oid] = body
        self.server.received.append(oid)
        return self.answer(200)


def start(files: dict[str, bytes], **options: object) -> Hub:
    """A running hub; `shutdown` and `server_close` end it."""
    server = Hub(files, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
