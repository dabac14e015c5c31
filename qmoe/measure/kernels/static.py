"""What can be known about the kernels without a GPU: registers, spills, instructions and cache
lines per weight, and a model of the H200.

The model: 132 SMs at 1.75 GHz; per warp and step (one symbol in each of 32 lanes) an SM needs N / 4
cycles to issue N instructions, A / 2 cycles for A of them on the half-rate integer pipe, and one L1
cycle per distinct cache line that the step touches, or per word in the fullest bank of shared
memory; filling shared memory counts as lines, too. The largest of the three is the bound. bf16's
floor is the time to read two bytes per weight from memory at 4.3 TB/s. The line rule has not been
checked on a GPU.
"""

import json as json_module
import os
from collections.abc import Sequence
from typing import Any

from qmoe.codec import encode_group
from qmoe.kernels import decode, decode_shared, grouped, inputs, matvec, pair_groups, shared, sums
from qmoe.kernels.launch import PLANS, PORTABLE, LaunchPlan, plan_for
from qmoe.kernels.pack import PackedProjection
from qmoe.measure.kernels import latency
from qmoe.measure.kernels.sample import packed, sample_matrix
from qmoe.measure.kernels.sass import Compiled, compile_for
from qmoe.measure.kernels.trace import LINE, Touched, mean, trace
from qmoe.types import QuantizedMatrix

TARGETS: tuple[int | str, ...] = (80, 89, 90, 100, "gfx942")
SM_CYCLES = 132 * 1.75e9
BF16_WEIGHTS = 4.3e12 / 2
WARPS = PLANS[90].warps
WIDTH = 1280  # inputs of a piece of 1024 columns, with zeros
BUDGET = 7.0  # lane instructions per weight of the batch-1 loop at 0.8 bit
_DECODER = dict.fromkeys(("words", "records", "cuts", "context_maps", "expert_info"), "*i32") | {
    **dict.fromkeys(("lanes", "starts", "lut"), "*i16"),
    **dict.fromkeys(("row_scale", "row_scale_neg"), "*bf16"),
    **dict.fromkeys(("row_classes", "classes"), "*u8"),
}
_ROUTING = {
    "group_expert": "*i32",
    "group_pairs": "*i32",
    "slots": "*i32",
    "columns": "*i16",
    "scales": "*bf16",
    "partial": "*fp32",
}


# kernel, argument types, constants, options of the compiler
Kernel = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]


def target_plan(target: int | str) -> LaunchPlan:
    """LaunchPlan of a target of `kernels`."""
    return plan_for(target) if isinstance(target, int) else PORTABLE


def kernels(target: int | str) -> dict[str, Kernel]:
    """Everything that is compiled: name -> (kernel, argument types, constants, options)."""
    asm = isinstance(target, int)
    warp = {"num_warps": 1}
    out: dict[str, Kernel] = {}
    loop = _DECODER | _ROUTING | {"xs": "*bf16"}
    variants: dict[str, dict[str, Any]] = {
        "matvec 1": {},
        "matvec 2": {"B": 2},
        "matvec 4": {"B": 4},
        "matvec 8": {"B": 8},
        "matvec 1 float32": {"X_BITS": 32},
        "matvec 8 float32": {"B": 8, "X_BITS": 32},
        "matvec 1 in 2 segments": {"S": 2},
        "matvec 1 of 8 bits": {"L": 8},
        "matvec 1 of 10 bits": {"L": 10},
        "matvec 1 of 12 bits": {"L": 12},
        "matvec 1 wide": {"WIDE": True},
        "matvec 1 two row scales": {"NEG": True},
    }
    for name, changed in variants.items():
        constants = {
            "B": 1,
            "X_BITS": 16,
            "L": 7,
            "S": 1,
            "W": 1,
            "WIDE": False,
            "NEG": False,
            "ASM": asm,
            "PDL": target_plan(target).pdl,
        } | changed
        types = (
            loop
            | ({"lut": "*i32"} if constants["WIDE"] else {})
            | ({"xs": "*fp32"} if constants["X_BITS"] == 32 else {})
        )
        out[name] = matvec.matvec, types, constants, warp
    if asm and shared.SUPPORTED:
        out |= _shared_loops(target, loop, asm)
    options = {"L": 7, "S": 1, "WIDE": False, "NEG": False, "ASM": asm}
    types = _DECODER | {"out": "*i8", "counts": "*i32"}
    out["decode"] = decode.decode_active, types, options, warp
    if asm and shared.SUPPORTED:
        tile = {"L": 7, "ASM": asm, "ROOM": 1024, "STEP": decode_shared.CHUNK}
        out["decode shared"] = decode_shared.decode_shared, types, tile, warp
    return out | _routing(target) | _grouped()


def _shared_loops(target: int | str, loop: dict[str, str], asm: bool) -> dict[str, Kernel]:
    """The batch-1 to batch-8 loops with lookup tables and inputs in shared memory."""
    out: dict[str, Kernel] = {}
    for batch, cut in ((1, 1), (1, 4), (4, 1), (8, 1)):
        constants = {
            "B": batch,
            "X_BITS": 16,
            "L": 7,
            "S": cut,
            "W": WARPS,
            "WIDE": False,
            "NEG": False,
            "ASM": asm,
            "PDL": target_plan(target).pdl,
            "ROOM": shared.room(WIDTH, batch),
            "FILL": shared.fill(WIDTH, WARPS),
            "FAN": 8 if batch == 1 else 0,
        }
        name = f"matvec {batch} shared" + f" in {cut} segments" * (cut > 1)
        types = loop | {"x": "*bf16"}
        out[name] = shared.matvec_shared, types, constants, {"num_warps": WARPS}
    return out


def _routing(target: int | str) -> dict[str, Kernel]:
    """The kernels around the products: inputs, gate, sums, groups."""
    block, pdl = {"BLOCK": 256}, {"PDL": target_plan(target).pdl}
    pairs = {"SLOTS": 2, "B": 1, "DIRECT": True} | block
    total = {"K": 8, "SLOTS": 1, "B": 1, "DIRECT": True} | block | pdl
    gathered = {"B": 8, "OFFSET": 0, "MEMBERS": True} | block | pdl
    gated = {"SLOTS": 2, "B": 1, "HALF": 1} | block | pdl
    x, y = _ROUTING | {"x": "*bf16", "xs": "*bf16"}, _ROUTING | {"y": "*bf16"}
    mixed = _ROUTING | {"weights": "*bf16", "out": "*bf16"}
    return {
        "inputs": (inputs.gather_inputs, x, gathered, {}),
        "gate": (inputs.silu_inputs, _ROUTING | {"xs": "*bf16"}, gated, {}),
        "sum pairs": (sums.sum_partials, y, pairs, {}),
        "sum tokens": (sums.sum_tokens, mixed, total, {}),
        "groups": (pair_groups.group_small, _ROUTING | {"index": "*i64"}, {"B": 8} | block, {}),
    }


def _grouped() -> dict[str, Kernel]:
    """The product of many tokens with decoded experts, and what empties their places."""
    plan = PLANS[90]
    tile = {"TOKENS": plan.token_tile, "ROWS": plan.row_tile, "DEPTH": plan.depth_tile}
    types = dict.fromkeys(("xs", "y", "row_scale"), "*bf16") | {"codes": "*i8"}
    types |= {"offsets": "*i32", "order": "*i32"}
    options = {"num_warps": plan.dot_warps, "num_stages": plan.dot_stages}
    emptied = {"out": "*i8", "counts": "*i32"}
    return {
        "grouped dot": (grouped.grouped_dot, types, tile | {"EXACT": False}, options),
        "zero": (decode.zero_active, emptied, {"BLOCK": 2048}, {}),
    }


def shared_listing(cut: int) -> str:
    """Machine code of the batch-1 kernel for sm_90 with `cut` segments a stream."""
    kernel, types, constants, options = kernels(90)["matvec 1 shared"]
    return compile_for(kernel, types, constants | {"S": cut}, 90, **options).listing


def estimate(
    loop: Compiled, symbols: int, touched: Touched, table_bytes: int = 0, input_bytes: int = 0
) -> dict[str, Any]:
    """Model of a matvec loop: weights per second by each bound, and lane instructions per weight.

    Args:
        loop: its machine code.
        symbols: symbols a turn.
        touched: what it touches.
        table_bytes, input_bytes: what a program of WARPS warps copies into shared memory; 0 reads
            through the cache.
    """
    n, alu = loop.instructions / symbols, loop.alu / symbols
    filling = 2 * (table_bytes + input_bytes) / LINE / WARPS / touched.steps  # read and written
    cycles = {
        "issue": n / 4,
        "alu": alu / 2,
        "lines": touched.cycles(table_bytes > 0, input_bytes > 0) + filling,
    }
    weights = 32 / touched.steps_per_weight * SM_CYCLES  # per second if a step took an SM one cycle
    bounds = {k: weights / c for k, c in cycles.items()}
    return {
        "instructions_per_symbol": n,
        "alu_per_symbol": alu,
        "filling_per_symbol": filling,
        **{f"{k}_cycles_per_symbol": c for k, c in cycles.items()},
        "binds": max(cycles, key=lambda k: cycles[k]),
        "symbols_per_weight": touched.steps_per_weight,
        "instructions_per_weight": n * touched.steps_per_weight,
        **{f"{k}_weights_per_s": v for k, v in bounds.items()},
        "weights_per_s": min(bounds.values()),
        "over_bf16": min(bounds.values()) / BF16_WEIGHTS,
    }


def run(json: bool = False, matrices: Sequence[QuantizedMatrix] | None = None) -> dict[str, Any]:
    """Compiles every kernel for every target and models the batch-1 loop on an H200.

    Args:
        json: print one line of JSON instead of the table.
        matrices: quantized experts of one projection to take symbols and cache lines from; default
            is `sample_matrix` at 0.8 bit.

    Returns:
        {"targets": {target: {kernel: {registers, spills, instructions, alu, code}}}, "model":
        {kernel: `estimate`}, "launches": `latency.table`, "stored_bits", "memory_bits" (per
        weight, on disk and in kernel form),
        "spills" (total), "budget", "within_budget"}.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where nothing can be compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1; unset it")
    sample = list(matrices) if matrices is not None else [sample_matrix(1536, 2048)]
    group, p = encode_group(sample), packed(sample)
    weights = sum(m.codes.numel() for m in sample)
    stored = group.tables.numel() + sum(b.numel() for b in group.matrices)
    result: dict[str, Any] = {
        "targets": {},
        "stored_bits": 8 * stored / weights,
        "memory_bits": 8 * p.nbytes() / weights,
        "budget": BUDGET,
        "bf16_weights_per_s": BF16_WEIGHTS,
    }
    modelled: dict[str, Compiled] = {}
    for target in TARGETS:
        compiled = {
            name: compile_for(kernel, types, constants, target, **options)
            for name, (kernel, types, constants, options) in kernels(target).items()
        }
        kept = ("registers", "spills", "instructions", "alu", "code")
        rows = {name: {k: getattr(c, k) for k in kept} for name, c in compiled.items()}
        result["targets"][str(target)] = rows
        if target == 90:
            modelled = compiled
    result["model"] = model = _model(modelled, p)
    if shared.SUPPORTED:
        result["launches"] = latency.table(shared_listing, PLANS[90], BF16_WEIGHTS)
    result["spills"] = sum(k["spills"] for t in result["targets"].values() for k in t.values())
    result["default"] = default = "matvec 1 shared" if "matvec 1 shared" in model else "matvec 1"
    result["within_budget"] = bool(
        default in model
        and model[default]["instructions_per_weight"] <= BUDGET
        and result["spills"] == 0
    )
    print(json_module.dumps(result) if json else report(result))
    return result


def _model(compiled: dict[str, Compiled], p: PackedProjection) -> dict[str, dict[str, Any]]:
    """`estimate` of the loops for sm_90 that the packed experts could run, uncut."""
    touched = {
        (size, warps): mean(
            [trace(p, e, input_bytes=size, warps=warps) for e in range(min(8, p.experts))]
        )
        for size in (2, 4, 8, 16)
        for warps in {1, WARPS}
    }
    model = {}
    for name, (_, _, constants, _) in kernels(90).items():
        if name.startswith("matvec") and (constants["L"], constants["S"]) == (p.limits[0], 1):
            size = min(16, constants["B"] * constants["X_BITS"] // 8)
            model[name] = estimate(
                compiled[name],
                32 // constants["L"],
                touched[size, constants["W"]],
                table_bytes=32 << constants["L"] if "ROOM" in constants else 0,
                input_bytes=size * p.width if constants.get("ROOM") else 0,
            )
    return model


def report(result: dict[str, Any]) -> str:
    """The result of `run` as a table."""
    end = (
        f"budget {result['budget']} instructions per weight, no spills: "
        f"{'kept' if result['within_budget'] else 'EXCEEDED'}; "
        f'batch 1 runs "{result["default"]}" where shared memory can gather'
    )
    return "\n".join([*_registers(result), "", *_rates(result), *_launches(result), end])


def _registers(result: dict[str, Any]) -> list[str]:
    lines = ["registers / spilled bytes / instructions of the inner loop (of them integer pipe)"]
    targets = list(result["targets"])
    lines.append(f"{'kernel':26}" + "".join(f"{t:>20}" for t in targets))
    for name in result["targets"][targets[0]]:
        line = f"{name:26}"
        for target in targets:
            c = result["targets"][target].get(name)
            if c is None:
                line += f"{'-':>20}"
                continue
            loop = f"{c['instructions']} ({c['alu']})" if c["instructions"] else "-"
            line += f"{c['registers']:>4} / {c['spills']} / {loop:>9}"
        lines.append(line)
    return lines


def _rates(result: dict[str, Any]) -> list[str]:
    lines = [
        f"H200 model, class mix of {result['stored_bits']:.3f} stored bits per weight "
        f"({result['memory_bits']:.3f} in kernel form); "
        f"bf16 reads {result['bf16_weights_per_s'] / 1e12:.2f} T weights/s"
    ]
    head = [
        *("symbols/weight", "instr/symbol", "instr/weight", "issue cycles", "ALU cycles"),
        *("line cycles", "binds:", "T weights/s", "x bf16"),
    ]
    lines.append(f"{'loop':26}" + "".join(f"{h:>15}" for h in head))
    counts = ["symbols_per_weight", "instructions_per_symbol", "instructions_per_weight"]
    counts += [f"{k}_cycles_per_symbol" for k in ("issue", "alu", "lines")]
    for name, m in result["model"].items():
        values = "".join(f"{m[k]:15.2f}" for k in counts)
        rates = "".join(f"{v:15.2f}" for v in (m["weights_per_s"] / 1e12, m["over_bf16"]))
        lines.append(f"{name:26}{values}{m['binds']:>15}{rates}")
    return lines


def _launches(result: dict[str, Any]) -> list[str]:
    if not result.get("launches"):
        return []
    lines = ["", "one token by the model of qmoe.measure.kernels.latency (assumed latencies):"]
    lines.append(f"{'launch':26}{'segments':>10}{'warps/SM':>10}{'us':>8}{'bf16 floor':>12}")
    lines += [
        f"{row['name']:26}{row['segments']:10}{row['warps_per_sm']:10.1f}"
        f"{row['us']:8.1f}{row['bf16_floor_us']:12.1f}"
        for row in result["launches"]
    ]
    return lines
