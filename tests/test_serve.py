"""`qmoe serve`, `qmoe chat`, `qmoe exec` with a small compressed model, in real processes."""

import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

import qmoe
from qmoe.cli import main
from qmoe.engines import chat as chats
from qmoe.engines.serve import cache_blocks
from qmoe.store.manifest import MANIFEST, read_sealed, write_sealed

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPTS = ["w1 w2 w3", "w9 w30", "w4 w4 w5 w6 w7", "w33"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny):
    """A compressed tiny Mixtral with a tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("serve")
    source = tiny.save("mixtral", folder / "source")
    tiny.save_tokenizer(source)
    text = str(tiny.save_text(folder / "text.txt", 400))
    settings = qmoe.Settings(method="rtn", calib=text, calib_tokens=256, ctx=32)
    qmoe.compress(str(source), folder / "q", settings)
    return folder / "q"


def _with_template(model, out):
    """A copy whose tokenizer has a chat template."""
    shutil.copytree(model, out)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    manifest = read_sealed(out / MANIFEST)
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    manifest["files"]["chat_template.jinja"] = {"bytes": len(TEMPLATE), "sha256": digest}
    write_sealed(out / MANIFEST, manifest)
    return out


def _greedy(model, prompt, tokens):
    loaded, tokenizer = qmoe.load(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = loaded.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


class Server:
    """`qmoe serve` as a process."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "qmoe", "serve", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://localhost:(\d+)/v1", line):
                self.port = int(found.group(1))
                break
        else:
            raise AssertionError(f"it ended: {''.join(self.log)}")
        threading.Thread(target=lambda: [*self.process.stderr], daemon=True).start()

    def ask(self, method, path, body=None):
        """Status and text of an answer; waits until the server accepts."""
        while True:
            connection = http.client.HTTPConnection("localhost", self.port)
            try:
                connection.request(
                    method, path, json.dumps(body), {"content-type": "application/json"}
                )
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except ConnectionRefusedError:  # the line was printed, the port opens next
                assert self.process.poll() is None, self.log

    def complete(self, model, prompt, **more):
        body = {"model": str(model), "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        status, text = self.ask("POST", "/v1/completions", body)
        assert status == 200, text
        return text


@pytest.fixture(scope="module")
def server(model):
    found = Server(str(model), "--port", "0", "--dtype", "float32")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def wanted(model):
    """What transformers continues the prompts with."""
    return [_greedy(model, p, 8) for p in PROMPTS]


def test_the_server_names_its_model(server, model):
    status, text = server.ask("GET", "/v1/models")
    assert status == 200
    assert [m["id"] for m in json.loads(text)["data"]] == [str(model)]


def test_completions_one_by_one_and_side_by_side(server, model, wanted):
    def one(prompt):
        return json.loads(server.complete(model, prompt))["choices"][0]["text"]

    assert [one(p) for p in PROMPTS] == wanted
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(one, PROMPTS)) == wanted


def test_a_stream_has_the_same_text(server, model, wanted):
    text = server.complete(model, PROMPTS[0], stream=True)
    events = [json.loads(s[6:]) for s in text.splitlines() if s.startswith("data: {")]
    assert len(events) > 2
    assert "".join(e["choices"][0].get("text") or "" for e in events) == wanted[0]


def test_requests_keep_their_own_sampling(server, model, wanted):
    """transformers' batches would all sample as the first request did."""

    def one(temperature):
        text = server.complete(model, PROMPTS[0], temperature=temperature)
        return json.loads(text)["choices"][0]["text"]

    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(one, [0, 0, 1.5, 1.5, 0, 0])]
    assert [found[i] for i in (0, 1, 4, 5)] == [wanted[0]] * 4
    assert wanted[0] not in found[2:4]
    assert found[2] != found[3]


REFUSED = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": ["w1", "w2"]}, "prompt must be one text"),
    ({"prompt": "w1 " * 900}, "the prompt has 900 tokens"),
    ({"max_tokens": 100_000}, "max_tokens is 100000"),
    ({"max_tokens": 0}, "from 1 on"),
    ({"stop": ["w3"]}, "stop=['w3'] is not supported"),
    ({"n": 2}, "n=2 is not supported"),
    ({"model": "another"}, "another"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_would_be_left_out_or_end_the_server_is_refused(server, model, wanted, change, words):
    body = {"model": str(model), "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    status, text = server.ask("POST", "/v1/completions", body | change)
    assert status == 400
    assert words in json.loads(text)["error"]["message"]
    assert json.loads(server.complete(model, PROMPTS[0]))["choices"][0]["text"] == wanted[0]


def test_a_client_that_goes_away_leaves_the_others_their_answers(server, model, wanted):
    connection = http.client.HTTPConnection("localhost", server.port)
    body = {"model": str(model), "prompt": PROMPTS[1], "max_tokens": 200, "temperature": 1.0}
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body | {"stream": True}),
        {"content-type": "application/json"},
    )
    assert connection.getresponse().read(20)
    connection.close()
    assert json.loads(server.complete(model, PROMPTS[0]))["choices"][0]["text"] == wanted[0]


@pytest.mark.parametrize("path", ["/reset", "/load_model"])
def test_no_client_unloads_the_model(server, path):
    assert server.ask("POST", path, {"model": "another"})[0] == 404


def test_a_model_without_a_chat_template_says_so(server):
    body = {"messages": [{"role": "user", "content": "w1"}]}
    for path in ("/v1/chat/completions", "/v1/responses"):
        status, text = server.ask("POST", path, body)
        assert status == 400
        assert "has no chat template" in json.loads(text)["error"]["message"]


def test_a_model_with_a_chat_template_talks_and_ctrl_c_ends_it(model, tmp_path):
    out = _with_template(model, tmp_path / "q")
    server = Server(str(out), "--port", "0", "--no-batching", "--dtype", "float32")
    body = {"messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 8}
    status, text = server.ask("POST", "/v1/chat/completions", {**body, "temperature": 0})
    assert status == 200, text
    assert json.loads(text)["choices"][0]["message"]["content"] == _greedy(model, PROMPTS[0], 8)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda:9"], "CUDA devices"),
        (["--max-model-len", "64"], "unknown arguments --max-model-len 64"),
        (["--engine", "vllm", "--device", "cpu"], "vLLM chooses the device itself"),
    ],
)
def test_what_cannot_be_served_is_said(model, arguments, words):
    found = CliRunner().invoke(main, ["serve", str(model), *arguments])
    assert found.exit_code == 2
    assert words in found.output


def test_a_file_is_no_model(model):
    found = CliRunner().invoke(main, ["chat", str(model / "config.json")])
    assert found.exit_code == 2
    assert "is a file; give the directory" in found.output


def test_a_damaged_file_and_a_taken_port_are_refused(model, tmp_path):
    out = tmp_path / "q"
    shutil.copytree(model, out)
    file = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    command = [sys.executable, "-m", "qmoe", "serve", str(out), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is corrupt: sha256" in done.stderr
    assert "http://" not in done.stderr
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        command[-1] = str(other.getsockname()[1])
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose another with --port" in done.stderr


def test_the_cache_is_sized_for_the_machine(build_model):
    config = build_model("mixtral").config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 4
    assert cache_blocks(config, 1 << 40, 4) == 16 * config.max_position_embeddings // 256
    assert cache_blocks(config, 4 * 512 * 20 * token, 4) <= 512 * 20 // 256
    assert cache_blocks(config, 0, 4) == 4


def _chat(model, template=None):
    loaded, tokenizer = chats.model_and_tokenizer(str(model), "cpu", "float32", False)
    tokenizer.chat_template = template
    return chats.Chat(loaded, tokenizer, {"max_new_tokens": 8, "do_sample": False})


def test_a_conversation_streams_what_generate_would_say(model, wanted):
    chat, written = _chat(model, TEMPLATE), []
    chats.talk(chat, iter(["w1 w2 w3", "/exit", "not read"]), written.append)
    text = "".join(written)
    assert text.startswith(wanted[0])
    assert re.search(r"\[8 tokens, first after [\d.]+ s, then [\d.]+ tokens/s\]", text)
    assert len(written) > 3  # piece by piece
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_text_is_continued_where_there_is_no_template(model, wanted):
    chat, written = _chat(model), []
    chats.talk(chat, iter(["w1 w2 w3"]), written.append)
    assert "no chat template" in written[0]
    assert chat.text == "w1 w2 w3" + wanted[0]
    chats.talk(chat, iter(["/clear"]), written.append)
    assert chat.text == ""


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_line_longer_than_the_model_reads_is_not_said(model, wanted, template):
    chat, written = _chat(model, template), []
    limit = chat.model.config.max_position_embeddings
    chats.talk(chat, iter(["w1 " * (limit + 1)]), written.append)
    assert f"the model reads {limit}" in "".join(written)
    assert (chat.messages, chat.text) == ([], "")
    chats.talk(chat, iter(["w1 w2 w3"]), written.append)
    assert wanted[0] in "".join(written)


def test_nothing_is_no_text_to_continue(model):
    chat, written = _chat(model), []
    chats.talk(chat, iter(["", "w1 w2", "", "/clear", ""]), written.append)
    text = "".join(written)
    assert text.count("no text to continue yet") == 2
    assert text.count("[8 tokens") == 2


def test_what_a_template_refuses_is_said(model):
    chat, written = _chat(model, "{{ raise_exception('only one message') }}"), []
    chats.talk(chat, iter(["w1"]), written.append)
    assert "chat template does not take this" in "".join(written)
    assert "only one message" in "".join(written)
    assert chat.messages == []


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("LOADED", type(model).__name__, __name__, len(sys.argv))
"""


@pytest.mark.parametrize("how", ["file", "module"])
def test_a_script_that_knows_nothing_of_us_loads_a_compressed_model(model, tmp_path, how):
    script = tmp_path / "somescript.py"
    script.write_text(SCRIPT)
    name = [str(script)] if how == "file" else ["-m", "somescript"]
    command = [sys.executable, "-m", "qmoe", "exec", *name, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LOADED MixtralForCausalLM __main__ 2" in done.stdout
    if how == "file":
        alone = [sys.executable, str(script), str(model)]
        assert subprocess.run(alone, capture_output=True).returncode != 0


def test_a_console_command_keeps_its_arguments_and_exit_code():
    command = [sys.executable, "-m", "qmoe", "exec", "--", "pytest", "--co", "-q", "/no/such/file"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert "/no/such/file" in done.stderr + done.stdout


@pytest.mark.parametrize("name", [["no-such-command"], ["-m", "no_such_module"]])
def test_what_cannot_be_run_is_said(name):
    command = [sys.executable, "-m", "qmoe", "exec", "--", *name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert name[-1] in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_without_its_packages_is_said(monkeypatch, model):
    import importlib.util

    from qmoe.engines.serve import serve
    from qmoe.errors import QmoeError

    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "fastapi" else plain(n, *a)
    )
    with pytest.raises(QmoeError, match=re.escape("pip install 'qmoe[serve]'")):
        serve(str(model))


def test_tokens_are_counted_not_pieces(model):
    chat = _chat(model)
    count, first, others = chat.say("w1 w2", lambda text: None)
    assert count == 8
    assert first > 0
    assert others > 0
    assert torch.is_grad_enabled()
