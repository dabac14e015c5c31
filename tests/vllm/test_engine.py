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


def in_vllm(*tasks):
    """What run_model.py says of (model, engine's settings[, more of the task])."""
    every = [
        {"model": str(model), "prompts": PROMPTS, "tokens": TOKENS, "engine": engine} | more
        for model, engine, *rest in tasks
        for more in (rest or [{}])
    ]
    alone = all(t["engine"].get("tensor_parallel_size", 1) == 1 for t in every)
    one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if alone else {}
    command = [sys.executable, str(HERE / "run_model.py"), json.dumps(every)]
    done = subprocess.run(command, env=environment() | one, capture_output=True, text=True)
    lines = [s for s in done.stdout.splitlines() if s.startswith("RESULT ")]
    assert len(lines) == len(every), done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


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


def kept(out):
    """Bytes of all experts of a checkpoint: streams, where matrices lie in them, biases."""
    container = Container.open(out, check=False)
    experts = tuple(f"{path}." for path in container.modules)
    entries = [e for n, (_, _, e) in container.tensors.items() if n.startswith(experts)]
    return sum(e.end - e.begin for e in entries)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory, tiny):
    """Experts with biases."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    folder = tmp_path_factory.mktemp("gpt_oss")
    source = tiny.save("gpt_oss", folder / "source", **heads)
    tiny.save_tokenizer(source)
    return compressed(source, folder / "q", tiny.save_text(folder / "text.txt", 400))


def coded_dense(folder, tiny):
    """A Qwen3-MoE whose dense matrices are coded too."""
    source = tiny.save("qwen3_moe", folder / "source", **HEADS)
    tiny.save_tokenizer(source)
    return compressed(source, folder / "dense", tiny.save_text(folder / "t.txt", 400), dense_bits=8)


def without_a_class(folder, tiny):
    """A JetMoE, which vLLM runs through transformers' class or not at all."""
    source = tiny.save("jetmoe", folder / "jetmoe", kv_channels=32)
    tiny.save_tokenizer(source)
    return compressed(source, folder / "no_class", tiny.save_text(folder / "j.txt", 400))


def on_the_hub(model, cache):
    """Puts a model into the cache of the hub as owner/name."""
    folder = cache / "models--owner--name"
    commit = "0" * 39 + "1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(model, folder / "snapshots" / commit)
    return "owner/name"


def of_another_version(model, out):
    shutil.copytree(model, out)
    manifest = read_sealed(out / MANIFEST)
    write_sealed(out / MANIFEST, {**manifest, "format_version": 99})
    return out


def test_one_process(mixtral, qwen, tmp_path, tiny, monkeypatch):
    """The bundled model; coded dense matrices; an id of the hub, without a network; the kernels of
    a GPU; what cannot be served; a tensor that is missing, where vLLM itself would serve what lay
    in memory."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    dense = coded_dense(tmp_path, tiny)
    gone = {"forget": "layers.1.self_attn.k_proj"}
    wrong = of_another_version(qwen, tmp_path / "wrong")
    plain, coded, hub, kernels, *refused = in_vllm(
        (mixtral, {}),
        (dense, {}),
        (on_the_hub(qwen, tmp_path / "hub"), {}),
        (qwen, {}, {"kernels": True, "tokens": 3}),
        (qwen, {"enable_lora": True}),
        (qwen, {"load_format": "dummy"}),
        (qwen, {"load_format": "safetensors"}),
        (wrong, {}),
        (without_a_class(tmp_path, tiny), {}),
        (qwen, {}, gone),
    )
    assert plain == {"tokens": in_transformers(mixtral), "bytes": [kept(mixtral)]}
    assert coded["tokens"] == in_transformers(dense)
    assert hub["tokens"] == in_transformers(qwen)
    assert kernels["tokens"] == [t[:3] for t in hub["tokens"]]
    assert kernels["bytes"] == [0]  # the streams are gone
    assert {"matvec_shared", "sum_tokens"} <= {*kernels["launches"]}
    sentences = (
        "--enable-lora cannot be used",
        "--load-format dummy cannot be used",
        "--load-format safetensors cannot be used",
        "format version 99",
        "has no layer that takes encoded experts",
        "layers.1.self_attn.qkv_proj.weight",
    )
    for found, sentence in zip(refused, sentences, strict=True):
        assert sentence in found["error"]
    assert refused[-1]["error"].startswith("CorruptError")


def test_compiled(mixtral, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    [found] = in_vllm((mixtral, {"enforce_eager": False}))
    assert found["tokens"] == in_transformers(mixtral)


@pytest.mark.parametrize(("model", "parallel"), [("qwen", "experts"), ("gpt_oss", "tensors")])
def test_two_ranks_keep_half_of_the_experts_each(request, model, parallel):
    model = request.getfixturevalue(model)
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": parallel == "experts"}
    [found] = in_vllm((model, engine))
    assert found["tokens"] == in_transformers(model)
    whole, ranks = kept(model), found["bytes"]
    print(f"bytes of the experts: {whole}, of the ranks: {ranks}")
    assert len(ranks) == 2
    assert sum(ranks) >= whole  # tables that both use are on both
    assert max(ranks) < 0.65 * whole


def test_what_vllm_computes_otherwise_is_mended():
    """A correction bias of the router, positions of latent attention, a bias of the head: with each
    vLLM alone gives other tokens on a CPU."""
    families = ["ernie4_5_moe", "deepseek_v3", "phimoe"]
    command = [sys.executable, str(ROOT / "scripts" / "families_vllm"), *families, "--no-write"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{f}: tokens equal" for f in families], done.stderr[-4000:]


def test_a_damaged_file_is_refused_before_the_port_opens(qwen, tmp_path):
    out = tmp_path / "q"
    shutil.copytree(qwen, out)
    file = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    command = [sys.executable, "-m", "qmoe", "serve", "--engine", "vllm", str(out), "--port", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "is corrupt: sha256" in done.stderr
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
