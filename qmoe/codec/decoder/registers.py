"""Vectors for compiled loops: what numba lacks of AVX-512, and products by whole registers.

A value of type `FLOATS` is one register, 16 x float32; each function is one or two of LLVM's
instructions. LLVM compiles them for any processor, but only where `AVAILABLE` do they beat plain
loops.
"""

from typing import Any

import llvmlite.binding as llvm
import numba as nb
from llvmlite import ir
from numba.extending import intrinsic, models, register_model

COUNT = 16  # lanes of a register
STREAMS = 64  # columns of the lists of `accumulate`
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
WORDS = ir.VectorType(I32, COUNT)


def _features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know
        return {}


def _fast_gathers() -> bool:
    """Whether this processor has the instructions, and gathers that are not microcode: AMD's Zen 4
    and 5 take longer for one than for sixteen loads."""
    wanted = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2")
    return all(_features().get(f) for f in wanted) and "znver" not in llvm.get_host_cpu_name()


AVAILABLE = _fast_gathers()
MATRIX_UNIT = bool(_features().get("amx-bf16"))  # dense bfloat16 products are ten times as fast


class Vector(nb.types.Type):
    """So many elements, in as many registers as they take."""

    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, count)
        self.count = count


FLOATS = Vector("floats", F32, COUNT)


@register_model(Vector)
class _Registers(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.vector)


def everywhere(builder: Any, scalar: Any, count: int) -> Any:
    """The scalar in every lane."""
    vector = ir.VectorType(scalar.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    first = ir.Constant(ir.VectorType(I32, count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), first)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """LLVM's function of that name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(
        nb.core.cgutils.get_or_insert_function(builder.module, kind, name), arguments
    )


def data(context: Any, builder: Any, kind: Any, array: Any, element: Any) -> Any:
    """Where the elements of an array lie."""
    start = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(start, element.as_pointer())


@intrinsic
def zeros(context: Any) -> Any:
    """0.0 in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(FLOATS.vector, [0.0] * COUNT)

    return FLOATS(), code


@intrinsic
def fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding, for three vectors or three float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = f"v{a.count}f32" if isinstance(a, Vector) else "f32"
        return call(builder, f"llvm.fma.{name}", arguments[0].type, *arguments)

    return a(a, b, c), code


@intrinsic
def accumulate(
    context: Any, places: Any, values: Any, count: Any, x: Any, sums: Any, blocks: Any
) -> Any:
    """``sums[s, b] = sum over k of values[k, s] * x[places[k, s], b]`` for the first 16 / blocks
    columns s of the lists and all b < blocks, where sums[s, b] and x[t, b] are 16 float32. Each sum
    is fused and in order of k. The sixteen sums stay in registers.

    Args:
        places, values: pointers into arrays of 32-bit elements, rows of `STREAMS` elements.
        count: rows, int64.
        x: pointer to float32 [., blocks, 16].
        sums: pointer to float32 [16 / blocks, blocks, 16], written.
        blocks: literal 1, 2 or 4.
    """
    if not isinstance(blocks, nb.types.IntegerLiteral):
        return None
    n, streams = blocks.literal_value, COUNT // blocks.literal_value
    vector = FLOATS.vector

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = (I32, F32, None, F32, F32)
        pairs = zip(arguments, kinds, strict=False)
        at = [a if k is None else builder.bitcast(a, k.as_pointer()) for a, k in pairs]
        held = [nb.core.cgutils.alloca_once(builder, vector) for _ in range(COUNT)]
        for slot in held:
            builder.store(ir.Constant(vector, [0.0] * COUNT), slot)
        with nb.core.cgutils.for_range(builder, at[2]) as loop:
            row = builder.mul(loop.index, I64(STREAMS))
            for s in range(streams):
                k = builder.add(row, I64(s))
                place = builder.sext(builder.load(builder.gep(at[0], [k])), I64)
                value = everywhere(builder, builder.load(builder.gep(at[1], [k])), COUNT)
                start = builder.mul(place, I64(COUNT * n))
                for b in range(n):
                    here = builder.gep(at[3], [builder.add(start, I64(COUNT * b))])
                    here = builder.bitcast(here, vector.as_pointer())
                    slot = held[s * n + b]
                    old, term = builder.load(slot), builder.load(here, align=4)
                    new = call(builder, "llvm.fma.v16f32", vector, value, term, old)
                    builder.store(new, slot)
        for i, slot in enumerate(held):
            place = builder.bitcast(builder.gep(at[4], [I64(COUNT * i)]), vector.as_pointer())
            builder.store(builder.load(slot), place, align=4)
        return context.get_dummy_value()

    pointer = nb.types.voidptr
    return nb.types.void(pointer, pointer, nb.types.int64, pointer, pointer, blocks), code


@intrinsic
def pointer_to(context: Any, array: Any, at: Any) -> Any:
    """Where array[at] of a flat array of 32-bit elements lies."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I32)
        return builder.bitcast(builder.gep(base, [arguments[1]]), nb.core.cgutils.voidptr_t)

    return nb.types.voidptr(array, at), code


@intrinsic
def load_floats(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of an array of float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], F32)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), FLOATS.vector.as_pointer())
        return builder.load(place, align=4)

    return FLOATS(array, at), code


@intrinsic
def load_bytes(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of an array of int8, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I8)
        vector = ir.VectorType(I8, COUNT)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), vector.as_pointer())
        wide = builder.sext(builder.load(place, align=1), WORDS)
        return builder.sitofp(wide, FLOATS.vector)

    return FLOATS(array, at), code


@intrinsic
def prefetch(context: Any, array: Any, at: Any) -> Any:
    """Asks for the cache line `at` bytes from the beginning of an array, or behind its end."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I8)
        kind = ir.FunctionType(ir.VoidType(), [base.type, I32, I32, I32])
        line = builder.module.declare_intrinsic("llvm.prefetch", [base.type], kind)
        builder.call(line, [builder.gep(base, [arguments[1]]), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return nb.types.none(array, at), code


@intrinsic
def total(context: Any, x: Any) -> Any:
    """The sum of all lanes: halves are added until one is left."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, width = arguments[0], COUNT
        while width > 1:
            width //= 2
            undefined = ir.Constant(x.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(
                    x, undefined, ir.Constant(ir.VectorType(I32, width), list(range(a, a + width)))
                )
                for a in (0, width)
            ]
            x = builder.fadd(*halves)
        return builder.extract_element(x, I32(0))

    return nb.types.float32(x), code
