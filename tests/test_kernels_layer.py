"""Layers through the kernels, around the products: gradients, packing once and in one copy,
graphs, devices, and machines that lack something.
"""

import dataclasses
import importlib.util
import math
import sys
import types

import accelerate
import pytest
import torch
import transformers
from ptx.launch import executed
from torch.utils._python_dispatch import TorchDispatchMode

import qmoe
from qmoe.inference import cuda, experts, quantizer
from qmoe.inference.experts import EncodedExperts
from qmoe.kernels import launch, ops, project, shared, twins
from qmoe.kernels.interleave import LANES
from qmoe.kernels.pack import GROUP_BITS
from qmoe.measure.kernels import gpu as bench
from qmoe.measure.kernels import sass, static
from qmoe.measure.kernels.sample import packed, stored_layer
from qmoe.measure.kernels.sample import rough_matrix as matrix
from qmoe.store.stored_experts import StoredExperts


def layer(count=4, hidden=48, inner=40):
    up = packed([matrix(2 * inner, hidden, seed=s) for s in range(count)])
    down = packed([matrix(hidden, inner, seed=9 + s) for s in range(count)], 2)
    return ops.ExpertsPack(up, down)


def routed(tokens=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 48, generator=g).to(dtype)
    index = torch.tensor([[0, 1], [1, 0], [1, 7]])[:tokens]  # 7 is no expert
    return hidden, index, torch.rand(tokens, 2, generator=g)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["twins", "executed"])
@pytest.mark.parametrize("gate", ["silu", ops.silu_gate])
def test_gradients_reach_the_input_and_the_routing(how, gate):
    pack = layer()
    hidden, index, weight = routed()
    grads = []
    for product in (ops.experts_forward, None):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if product is None:
            y = bench.dense_layer(pack, x, index, w)
        elif how == "twins":
            y = product(pack, x, index, w, gate)
        else:
            with executed(90):
                y = product(pack, x, index, w, gate)
                grads.append(torch.autograd.grad(y.sin().sum(), (x, w)))
            continue
        grads.append(torch.autograd.grad(y.sin().sum(), (x, w)))
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_operators_pass_opcheck_with_gradients():
    pack = layer()
    hidden, index, weight = routed()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    parts = pack.up.tensors(), pack.up.numbers(), pack.down.tensors(), pack.down.numbers()
    torch.library.opcheck(torch.ops.qmoe.experts_silu.default, (hidden, index, weight, *parts))
    torch.library.opcheck(torch.ops.qmoe.project.default, (hidden, index.flatten(), 2, *parts[:2]))


def test_a_model_trains_through_the_kernels(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    ids = torch.randint(3, 120, (1, 6))
    embedding = model.get_input_embeddings().weight
    grads = []
    for backend in (None, cuda.run_kernels):
        if backend is not None:
            monkeypatch.setitem(experts.BACKENDS, "cpu", backend)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        grads.append(torch.autograd.grad(loss, embedding)[0])
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5 * float(grads[0].abs().max()))


# --- packing: at load, once, one copy ------------------------------------------------------------


def bytes_on(module, device):
    """Bytes of everything of an experts module on a type of device, its pack included."""
    tensors = [*module.parameters(), *module.buffers()]
    pack = module.__dict__.get(cuda.PACK)
    if pack is not None:
        tensors += [t for p in pack.projections.values() for t in p.tensors()]
    return sum(t.nbytes for t in tensors if t.device.type == device)


def as_module(streams, offloaded=False):
    """What `cuda` needs of an `EncodedExperts` around stored experts."""
    found = types.SimpleNamespace(
        stream=torch.nn.Parameter(streams.stream, requires_grad=False),
        offsets=torch.nn.Parameter(streams.offsets, requires_grad=False),
        layout=streams.layout, offloaded=offloaded, buffers=list,
    )  # fmt: skip
    found.parameters = lambda: [found.stream, found.offsets]
    return found


@pytest.mark.parametrize(
    ("shapes", "cuts"),
    [
        (((1024, 2048), (1024, 2048)), [1, 1]),  # large layers are not cut
        (((1536, 2048), (2048, 768)), [4, 4]),  # Qwen3-30B-A3B's are, for speed
    ],
)
def test_one_copy_of_the_experts_is_resident(shapes, cuts):
    streams = stored_layer(shapes, 8, 0.8, 2)
    plan = launch.LaunchPlan(fill=0) if cuts == [1, 1] else launch.PLANS[90]
    with launch.forced(plan):
        made = cuda.pack_streams(streams, torch.device("cpu"), 8)
    assert [p.segments for p in made.values()] == cuts
    module = as_module(streams)
    pack = cuda.Pack((module.stream, module.offsets), made, {}, None)
    cuda._keep(module, pack.to(torch.device("meta")))  # meta stands for the GPU
    stored = sum(
        streams.offsets[e, j, 3] - streams.offsets[e, j, 2] for e in range(8) for j in range(2)
    )
    assert 0 < bytes_on(module, "meta") <= 1.2 * float(stored)
    assert module.stream.device.type == "cpu"


def test_packed_at_load_and_never_in_a_forward(compressed, monkeypatch, tmp_path):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    ids = torch.randint(3, 120, (1, 6))
    want = model(input_ids=ids, use_cache=False).logits
    assert cuda.prepare(model, ("cpu",)) > 0
    monkeypatch.setitem(experts.BACKENDS, "cpu", cuda.run_kernels)
    monkeypatch.setattr(cuda, "pack_projection", None)  # whoever packs now fails
    got = model(input_ids=ids, use_cache=False).logits
    assert (want - got).abs().max() < 1e-4 * want.abs().max()
    model.save_pretrained(tmp_path / "copy")  # the streams are still there
    again = qmoe.load(tmp_path / "copy", dtype=torch.float32)
    monkeypatch.delitem(experts.BACKENDS, "cpu")
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, want)


def test_offloaded_modules_are_packed_once(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    ids = torch.randint(3, 120, (1, 6))
    want = model(input_ids=ids, use_cache=False).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(m.offloaded for m in model.modules() if isinstance(m, EncodedExperts))
    monkeypatch.setitem(experts.BACKENDS, "cpu", cuda.run_kernels)
    calls, real = [], cuda.pack_projection
    monkeypatch.setattr(cuda, "pack_projection", lambda *a: calls.append(1) or real(*a))
    for _ in range(2):
        got = model(input_ids=ids, use_cache=False).logits
        assert (want - got).abs().max() < 1e-4 * want.abs().max()
    modules = [m for m in model.modules() if isinstance(m, EncodedExperts)]
    assert len(calls) == sum(len(m.layout.projections) for m in modules)


def test_new_weights_are_packed_anew(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    cuda.prepare(model, ("cpu",))
    model.load_state_dict(model.state_dict())
    modules = [m for m in model.modules() if isinstance(m, EncodedExperts)]
    assert not any(cuda.PACK in m.__dict__ for m in modules)


def test_tables_of_a_group_are_parsed_once(monkeypatch):
    streams = stored_layer(((64, 48), (48, 32)), 8, 0.8, 2)
    calls, real = [], StoredExperts.tables
    monkeypatch.setattr(StoredExperts, "tables", lambda *a: calls.append(a) or real(*a))
    made = cuda.pack_streams(streams, torch.device("cpu"), 2)
    assert len(calls) == 2  # one for each projection, not for each expert
    assert all(len(p.context_maps) == 1 for p in made.values())


def test_bench_packs_as_the_product_does():
    plan = launch.PLANS[90]
    with launch.forced(plan):
        pack = bench.random_layer(bench.Shape("small", 192, 96, 6, 2), "cpu")
    assert pack.up.segments == launch.segments(plan, 192, 192, 2)
    assert pack.down.segments == launch.segments(plan, 192, 96, 2)


def test_threads_pack_to_the_same_bits():
    streams = stored_layer(((200, 300),), 6, 0.8, 3)
    one = cuda.pack_streams(streams, torch.device("cpu"), 2)["down"]
    with cuda.workers() as run:
        many = cuda.pack_streams(streams, torch.device("cpu"), 2, run)["down"]
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), many.tensors(), strict=True))


# --- graphs and devices --------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Refuses what reads a value back or allocates by one."""

    BAD = ("_local_scalar_dense", "nonzero", "unique", "item", "equal", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert not any(b in name for b in self.BAD), f"{name} in a forward"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_nothing_is_read_back_in_a_forward(tokens):
    pack = layer()
    hidden = torch.randn(tokens, 48).bfloat16()
    index, weight = bench.routing(tokens, 4, 2, 0, "cpu")
    with executed(90) as session:
        session.dry = True
        with NoSync():
            ops.experts_forward(pack, hidden, index, weight)
            ops.experts_forward(pack, hidden, index, weight, ops.silu_gate)
    assert session.launches


def test_a_whole_model_is_one_graph(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    monkeypatch.setitem(experts.BACKENDS, "cpu", cuda.run_kernels)
    cuda.prepare(model, ("cpu",))
    ids = torch.randint(3, 120, (1, 6))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, want, atol=1e-5)


def test_generate_with_a_static_cache_compiles_one_graph_of_the_kernels(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    ids = torch.randint(3, 120, (1, 2), generator=torch.Generator().manual_seed(0))
    plainly = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **plainly)
    monkeypatch.setitem(experts.BACKENDS, "cpu", cuda.run_kernels)
    cuda.prepare(model, ("cpu",))
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    how = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    how._compile_all_devices = True  # on a GPU it is compiled unasked
    with executed(90) as session:
        got = model.generate(ids, cache_implementation="static", compile_config=how, **plainly)
    assert torch.equal(got, want)
    assert len(graphs) == 1
    assert graphs[0].count("qmoe.experts_silu") == model.config.num_hidden_layers
    assert "matvec_shared" in {launched.name for launched in session.launches}


def test_packing_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module = as_module(stored_layer(((64, 48), (48, 32)), 2))
    with pytest.raises(qmoe.errors.QmoeError, match="call the model once before"):
        cuda._pack_of(module, torch.device("cuda", 0), 2)


def test_operators_make_their_device_the_current_one(monkeypatch):
    assert isinstance(project.guard(torch.device("cuda", 1)), torch.cuda.device)
    devices, real = [], ops.guard
    monkeypatch.setattr(ops, "guard", lambda d: devices.append(d) or real(d))
    pack = layer()
    hidden, index, weight = routed()
    with executed(90) as session:
        session.dry = True
        ops.experts_forward(pack, hidden, index, weight)
        ops.project_pairs(pack.up, hidden, index[:, 0])
    assert len(devices) == 2


# --- machines that lack something ----------------------------------------------------------------


def test_without_triton_the_cpu_decodes_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "qmoe.inference.cuda", None)
    with pytest.warns(UserWarning, match="experts are decoded on the CPU"):
        quantizer.use_kernels(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("missing", ["triton.experimental.gluon", "triton.experimental"])
def test_without_gluon_the_plain_loop_runs(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("shared_without_gluon", shared.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.SUPPORTED
    assert not module.fits(7, False)


def test_float_tiles_fit_an_amd_gpu():
    kernel, types_, constants, _ = static.kernels("gfx942")["grouped dot"]
    wide = types_ | {"xs": "*fp32", "codes": "*fp32", "y": "*fp32"}
    plan = launch.PORTABLE
    options = {"num_warps": plan.dot_warps, "num_stages": plan.float_stages}
    made = sass.compile_for(kernel, wide, constants | {"EXACT": True}, "gfx942", **options)
    assert made.shared <= 65536


def test_the_choice_of_a_path_is_quick_and_the_same():
    plan = launch.PLANS[90]

    def slowly(tokens, share):
        cost = dict.fromkeys((*launch.BATCHES, 0), 0.0)
        for n in range(1, tokens + 1):
            log = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
            p = math.exp(log + n * math.log(share) + (tokens - n) * math.log1p(-share))
            for b, c in zip(launch.BATCHES, plan.costs, strict=True):
                cost[b] += p * -(-n // b) * c
            cost[0] += p * (plan.tile_cost[0] + -(-n // plan.token_tile) * plan.tile_cost[1])
        return min(cost, key=lambda b: (cost[b], b))

    for tokens in (2, 3, 5, 8, 17, 33, 64, 129, 400):
        for top_k, count in ((8, 128), (2, 8), (1, 64)):
            assert launch.batch_of(plan, tokens, top_k, count) == slowly(tokens, top_k / count)
    n, p = launch._tokens_of_an_expert(1 << 17, 1 / 16)
    assert len(n) < 3000  # 12 standard deviations to each side, not 131,072 numbers
    assert abs(float(p.sum()) - 1) < 1e-9


def test_twins_decode_from_the_words_of_one_expert():
    p = packed([matrix(40, 60, seed=s) for s in range(3)], 2)
    want = twins.weights_torch(p, 1)
    torn = p.words.clone()
    torn[: int(p.records[1, :, 0].min())] = -1
    first, rows = p.records[1, :, 0], p.records[1, :, 1] >> GROUP_BITS
    torn[int((first + rows * LANES).max()) + LANES :] = -1
    p = dataclasses.replace(p, words=torn)
    assert torch.equal(twins.weights_torch(p, 1), want)
