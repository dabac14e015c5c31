"""The real vLLM beside transformers: equal greedy tokens, alone and in parallel, compiled, with
coded dense matrices; what each rank keeps; what is refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import qmoe
from qmoe.compression.pipeline import Settings, compress
from qmoe.store.manifest import MANIFEST, read_sealed, write_sealed
from qmoe.store.reader import Container

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROMPTS = [[5, 9, 20, 33, 17], [30, 21, 8], list(range(5, 25))]
TOKENS = 12
# vLLM's attention on a CPU wants heads of 32; two ranks want two key-value heads
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 6}


def environment():
    """A small cache, no pinned threads, no network."""
    return {
        **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def started(out, **engine):
    """A finished process of run_model.py."""
    one = (
        {} if engine.get("tensor_parallel_size", 1) > 1 else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    )
    task = json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "engine": engine})
    command = [sys.executable, str(HERE / "run_model.py"), str(out), task]
    return subprocess.run(command, env=environment() | one, capture_output=True, text=True)


def in_vllm(out, **engine):
    """{"tokens": ..., "bytes": ...} of a run that must succeed."""
    done = started(out, **engine)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_transformers(out):
    model = qmoe.load(out, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(new[0, len(prompt) :].tolist())
    return found


def compressed(source, out, text, **options):
    settings = Settings(method="rtn", calib=str(text), calib_tokens=256, ctx=32, **options)
    compress(str(source), out, settings)
    return out


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """The bundled trained model."""
    folder = tmp_path_factory.mktemp("mixtral")
    text = ROOT / "examples" / "text" / "calib.txt"
    return compressed(ROOT / "examples" / "tiny-mixtral", folder / "q", text)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tiny):
    """A random Qwen3-MoE of six experts."""
    folder = tmp_path_factory.mktemp("qwen")
    source = tiny.save("qwen3_moe", folder / "source", **HEADS)
    tiny.save_tokenizer(source)
    return compressed(source, folder / "q", tiny.save_text(folder / "text.txt", 400))


def streams(out):
    """Bytes of all experts of a checkpoint: streams and where matrices lie in them."""
    found = Container.open(out, check=False).tensors
    leaves = (".stream", ".offsets")
    return sum(e.end - e.begin for n, (_, _, e) in found.items() if n.endswith(leaves))


def test_one_process(mixtral):
    found = in_vllm(mixtral)
    assert found["tokens"] == in_transformers(mixtral)
    assert found["bytes"] == [streams(mixtral)]


def test_compiled(mixtral, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert in_vllm(mixtral, enforce_eager=False)["tokens"] == in_transformers(mixtral)


@pytest.mark.parametrize("parallel", ["experts", "tensors"])
def test_two_ranks_keep_half_of_the_experts_each(qwen, parallel):
    found = in_vllm(qwen, tensor_parallel_size=2, enable_expert_parallel=parallel == "experts")
    assert found["tokens"] == in_transformers(qwen)
    whole, ranks = streams(qwen), found["bytes"]
    assert len(ranks) == 2
    assert sum(ranks) >= whole  # tables that both use are on both
    assert max(ranks) < 0.65 * whole


def test_coded_dense_matrices(tmp_path, tiny):
    source = tiny.save("qwen3_moe", tmp_path / "source", **HEADS)
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 400)
    out = compressed(source, tmp_path / "q", text, dense_bits=8)
    assert in_vllm(out)["tokens"] == in_transformers(out)


def test_experts_with_biases(tmp_path, tiny):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    source = tiny.save("gpt_oss", tmp_path / "source", **heads)
    tiny.save_tokenizer(source)
    out = compressed(source, tmp_path / "q", tiny.save_text(tmp_path / "text.txt", 400))
    assert in_vllm(out, tensor_parallel_size=2)["tokens"] == in_transformers(out)


def test_a_model_of_the_hub(qwen, tmp_path, monkeypatch):
    """An id is found in the hub's cache, without a network."""
    folder = tmp_path / "hub" / "models--owner--name"
    commit = "0" * 39 + "1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(qwen, folder / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert in_vllm("owner/name")["tokens"] == in_transformers(qwen)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"enable_lora": True}, "--enable-lora cannot be used"),
        ({"load_format": "dummy"}, "--load-format dummy cannot be used"),
        ({"load_format": "safetensors"}, "--load-format safetensors cannot be used"),
    ],
)
def test_what_encoded_experts_cannot_do_is_refused(qwen, engine, words):
    done = started(qwen, **engine)
    assert done.returncode != 0
    assert words in done.stderr


def test_a_parameter_that_nothing_filled_is_an_error(qwen, tmp_path):
    """vLLM itself would serve the model with what lay in memory."""
    code = (
        "import vllm, qmoe.engines.vllm as plug\n"
        "plug.register()\n"
        "from qmoe.engines.vllm.loader import QmoeLoader as L\n"
        "plain = L.get_all_weights\n"
        "gone = 'layers.1.self_attn.k_proj'\n"
        "L.get_all_weights = lambda *a: (p for p in plain(*a) if gone not in p[0])\n"
        f"vllm.LLM({str(qwen)!r}, enforce_eager=True, max_model_len=64)\n"
    )
    one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | one, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "CorruptError" in done.stderr
    assert "layers.1.self_attn.qkv_proj.weight" in done.stderr


@pytest.mark.parametrize("fault", ["version", "bit"])
def test_a_wrong_file_is_refused_before_the_port_opens(qwen, tmp_path, fault):
    out = tmp_path / "q"
    shutil.copytree(qwen, out)
    if fault == "version":
        manifest = read_sealed(out / MANIFEST)
        write_sealed(out / MANIFEST, {**manifest, "format_version": 99})
    else:
        file = sorted(out.glob("*.safetensors"))[0]
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    command = [sys.executable, "-m", "qmoe", "serve", "--engine", "vllm", str(out), "--port", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert {"version": "format version 99", "bit": "is corrupt: sha256"}[fault] in done.stderr
    assert "Uvicorn running" not in done.stderr + done.stdout


def _complete(port, body):
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    return urllib.request.urlopen(request).read().decode()


def test_a_server_streams_and_answers_side_by_side(mixtral):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qmoe", "serve", str(mixtral), "--engine", "vllm"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
    command += ["--max-num-seqs", "8", "--enforce-eager"]
    server = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    log = []
    try:
        for line in server.stderr:
            log.append(line)
            if "Application startup complete" in line:
                break
        else:
            raise AssertionError("".join(log)[-6000:])
        threading.Thread(target=lambda: [*server.stderr], daemon=True).start()
        tokenizer = AutoTokenizer.from_pretrained(mixtral)
        wanted = [tokenizer.decode(t) for t in in_transformers(mixtral)]
        bodies = [
            {"model": str(mixtral), "prompt": p, "max_tokens": TOKENS, "temperature": 0}
            for p in PROMPTS
        ]
        bodies = [b | {"ignore_eos": True} for b in bodies]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda b: _complete(port, b), bodies * 2))
        assert [json.loads(f)["choices"][0]["text"] for f in found] == wanted * 2
        events = _complete(port, bodies[0] | {"stream": True}).splitlines()
        parts = [json.loads(e[6:])["choices"][0]["text"] for e in events if e[:7] == "data: {"]
        assert len(parts) > 2
        assert "".join(parts) == wanted[0]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
