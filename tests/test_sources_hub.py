"""Hub sources against a local stand-in of the hub's HTTP interface (the client library is the real
one).
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/model"


class Hub(ThreadingHTTPServer):
    """Serves one repository's files, with ranges; `log` holds (method, file, bytes of the body)."""

    def __init__(self, files):
        self.files, self.log = files, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        files = self.server.files
        siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|{COMMIT}))?", path):
            info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        m = re.fullmatch(rf"/{REPO}/resolve/(main|{COMMIT})/(.+)", path)
        if not m or m.group(2) not in files:
            code = "EntryNotFound" if m else "RepoNotFound"
            return self.answer(404, X_Error_Code=code)
        body = files[m.group(2)]
        headers = {"ETag": f'"{hash(body) & 0xFFFFFFFF:x}"', "X_Repo_Commit": COMMIT}
        status, part = 200, body
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(body) - 1)
            part, status = body[first : last + 1], 206
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        self.server.log.append(
            (self.command, m.group(2), len(part) if self.command == "GET" else 0)
        )
        return self.answer(status, part, Accept_Ranges="bytes", **headers)


@pytest.fixture
def hub(tmp_path):
    torch.manual_seed(0)
    files = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}"}
    where = {}
    for i in range(2):
        tensors = {f"t{i}.{k}": torch.randn(300, 1000) for k in "ab"}
        save_file(tensors, tmp_path / "x")
        name = f"model-{i}.safetensors"
        files[name] = (tmp_path / "x").read_bytes()
        where.update(dict.fromkeys(tensors, name))
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, home, script, offline=False, ok=True):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": str(int(offline))}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    head = "import json\nfrom qmoe.checkpoint import open_checkpoint\n"
    cmd = [sys.executable, "-c", head + script]
    r = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=120)
    if not ok:
        assert r.returncode != 0
        return r.stderr.strip().splitlines()[-1]
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])


SHAPES = f"""
ck = open_checkpoint("{REPO}")
print(json.dumps([{{n: ck.shape(n) for n in ck.names()}}, ck.source_bytes, ck.fingerprint()]))
"""
READ = f"""
ck = open_checkpoint("{REPO}")
print(json.dumps([float(ck.read("t1.b").double().sum()), ck.directory.name]))
"""


def got(hub, name):
    return sum(n for _, file, n in hub.log if file == name)


def test_headers_first_shards_when_read_then_offline(hub, tmp_path):
    shapes, size, _ = run(hub, tmp_path / "home", SHAPES)
    assert shapes == {f"t{i}.{k}": [300, 1000] for i in range(2) for k in "ab"}
    weights = {f: b for f, b in hub.files.items() if f.startswith("model-")}
    assert size == sum(map(len, weights.values()))
    assert all(got(hub, f) < len(b) / 10 for f, b in weights.items())

    value, commit = run(hub, tmp_path / "home", READ)
    assert got(hub, "model-1.safetensors") >= len(weights["model-1.safetensors"])
    assert got(hub, "model-0.safetensors") < len(weights["model-0.safetensors"]) / 5
    assert commit == COMMIT

    hub.log.clear()
    assert run(hub, tmp_path / "home", READ, offline=True) == [value, commit]
    assert not hub.log
    script = READ.replace("t1.b", "t0.b")
    message = run(hub, tmp_path / "home", script, offline=True, ok=False)
    assert message.startswith("qmoe.errors.SourceError")
    assert "model-0.safetensors" in message


def test_finished_shards_are_deleted_from_the_cache_directory(hub, tmp_path):
    cache = tmp_path / "cache"
    script = f"""
from pathlib import Path
cache = Path({str(cache)!r})
held = lambda: sorted(p.name for p in cache.glob("*.safetensors"))
ck = open_checkpoint("{REPO}", cache=cache)
seen = [held()]
for n in ck.names():
    ck.read(n)
    seen.append(held())
    ck.finished([n])
    seen.append(held())
print(json.dumps(seen))
"""
    a, b = [f"model-{i}.safetensors" for i in range(2)]
    assert run(hub, tmp_path / "home", script) == [[], [a], [a], [a], [], [b], [b], [b], []]


def test_prefetch_downloads_in_the_background(hub, tmp_path):
    script = f"""
import time
ck = open_checkpoint("{REPO}")
ck.prefetch(["t0.a", "t0.b"])
end = time.monotonic() + 30
while ck._stored.where["t0.a"]._repository.cached("model-0.safetensors") is None:
    assert time.monotonic() < end
    time.sleep(0.05)
print(json.dumps(float(ck.read("t0.a")[0, 0])))
"""
    run(hub, tmp_path / "home", script)
    full = [f for method, f, n in hub.log if n > 2_000_000]
    assert full == ["model-0.safetensors"]


def test_no_such_repository(hub, tmp_path):
    message = run(hub, tmp_path / "home", 'open_checkpoint("owner/other")', ok=False)
    assert message.startswith("qmoe.errors.SourceError: 'owner/other' is neither a local directory")


def test_index_that_disagrees_with_a_remote_header(hub, tmp_path):
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["ghost"] = "model-0.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    script = f'open_checkpoint("{REPO}").shape("t0.a")'
    assert "'ghost' is in owner/model/model-0" in run(hub, tmp_path / "home", script, ok=False)
