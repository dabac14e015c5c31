"""Vectors of 16 lanes for compiled loops: what numba lacks of AVX-512.

A value of type `LANES` (16 x 32 bits) or `FLOATS` (16 x float32) is one register; each function is
one or two of LLVM's instructions. Memory is read by masked gathers. LLVM compiles them for any
processor, but only where `AVAILABLE` do they beat plain loops.

A lane that is compared is unsigned; an index is below 2^31.
"""

from typing import Any

import llvmlite.binding as llvm
import numba as nb
from llvmlite import ir
from numba.extending import intrinsic, models, register_model

COUNT = 16
LIST = 2 * COUNT  # columns of the lists of `accumulate`
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()


def _fast_gathers() -> bool:
    """Whether this processor has the instructions, and gathers that are not microcode: AMD's Zen 4
    and 5 take longer for one than for sixteen loads."""
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know
        return False
    wanted = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2")
    return all(features.get(f) for f in wanted) and "znver" not in llvm.get_host_cpu_name()


AVAILABLE = _fast_gathers()


class _Lanes(nb.types.Type):
    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=name)
        self.vector = ir.VectorType(element, COUNT)


LANES, FLOATS = _Lanes("lanes", _I32), _Lanes("floats", _F32)


@register_model(_Lanes)
class _Register(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


def _all(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    vector = ir.VectorType(scalar.type, COUNT)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, COUNT), [0] * COUNT)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _constant(n: int) -> Any:
    return ir.Constant(LANES.vector, [n] * COUNT)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(
        nb.core.cgutils.get_or_insert_function(builder.module, kind, name), arguments
    )


def _data(context: Any, builder: Any, kind: Any, array: Any, element: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(data, element.as_pointer())


def _gather(builder: Any, base: Any, index: Any, element: Any) -> Any:
    """base[index] for every lane of index, 32-bit words of memory read as `element`."""
    count = index.type.count
    vector, mask = ir.VectorType(element, count), ir.VectorType(_I1, count)
    name = {_I32: "dpi", _I64: "dpq", _F32: "dps"}[element]
    return _call(
        builder,
        f"llvm.x86.avx512.mask.gather.{name}.512",
        vector,
        *(ir.Constant(vector, [0] * count), builder.bitcast(base, _I8.as_pointer()), index),
        *(ir.Constant(mask, [1] * count), _I32(4)),
    )


@intrinsic
def splat(context: Any, x: Any) -> Any:
    """An integer's low 32 bits in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        return _all(builder, builder.trunc(x, _I32) if x.type.width > 32 else x)

    return LANES(x), code


@intrinsic
def zeros(context: Any) -> Any:
    """0.0 in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(FLOATS.vector, [0.0] * COUNT)

    return FLOATS(), code


@intrinsic
def load(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of an array of 32-bit integers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _I32)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), LANES.vector.as_pointer())
        return builder.load(place, align=4)

    return LANES(array, at), code


@intrinsic
def store(context: Any, array: Any, at: Any, x: Any) -> Any:
    """array[at : at + 16] = x, of 32-bit elements."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[2].vector
        base = _data(context, builder, signature.args[0], arguments[0], kind.element)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), kind.as_pointer())
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return nb.types.void(array, at, x), code


@intrinsic
def gather(context: Any, array: Any, index: Any) -> Any:
    """array[index], lane by lane; float32 if the array is."""
    floats = array.dtype == nb.types.float32

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _F32 if floats else _I32
        base = _data(context, builder, signature.args[0], arguments[0], element)
        return _gather(builder, base, arguments[1], element)

    return (FLOATS if floats else LANES)(array, index), code


@intrinsic
def bits_at(context: Any, words: Any, bit: Any) -> Any:
    """The next 32 bits at position `bit` of an array of 32-bit words."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _I32)
        bit, halves = arguments[1], []
        word, rest = builder.lshr(bit, _constant(5)), builder.and_(bit, _constant(31))
        undefined = ir.Constant(LANES.vector, ir.Undefined)
        for first in (0, 8):
            pick = ir.Constant(ir.VectorType(_I32, 8), list(range(first, first + 8)))
            index = builder.shuffle_vector(word, undefined, pick)
            shift = builder.zext(
                builder.shuffle_vector(rest, undefined, pick), ir.VectorType(_I64, 8)
            )
            pair = _gather(builder, base, index, _I64)
            halves.append(builder.trunc(builder.lshr(pair, shift), ir.VectorType(_I32, 8)))
        both = ir.Constant(LANES.vector, list(range(COUNT)))
        return builder.shuffle_vector(*halves, both)

    return LANES(words, bit), code


@intrinsic
def pick64(context: Any, table: Any, index: Any) -> Any:
    """table[index] of 64 32-bit integers, by permutations of registers where there are such."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _I32)
        parts = []
        for k in range(4):
            place = builder.bitcast(builder.gep(base, [_I64(16 * k)]), LANES.vector.as_pointer())
            parts.append(builder.load(place, align=4))
        index, name = arguments[1], "llvm.x86.avx512.vpermi2var.d.512"
        low = _call(builder, name, LANES.vector, parts[0], index, parts[1])
        high = _call(builder, name, LANES.vector, parts[2], index, parts[3])
        upper = builder.icmp_unsigned(">", index, _constant(31))
        return builder.select(upper, high, low)

    return LANES(table, index), code


def _binary(name: str, kind: Any) -> Any:
    def typed(context: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return kind(kind, kind), code

    return intrinsic(typed)


add, both = _binary("add", LANES), _binary("and_", LANES)
times = _binary("fmul", FLOATS)


@intrinsic
def fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding, for three `FLOATS` or three float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        name = "llvm.fma.v16f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
        return _call(builder, name, kind, *arguments)

    return a(a, b, c), code


@intrinsic
def least(context: Any, a: Any, b: Any) -> Any:
    """The smaller of two unsigned integers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.umin.v16i32", LANES.vector, *arguments)

    return LANES(a, b), code


@intrinsic
def right(context: Any, x: Any, by: Any) -> Any:
    """x shifted right by a literal number of bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(arguments[0], _all(builder, builder.trunc(arguments[1], _I32)))

    return LANES(x, nb.types.int64), code


@intrinsic
def left8(context: Any, x: Any) -> Any:
    """x * 256."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shl(arguments[0], _constant(8))

    return LANES(x), code


@intrinsic
def drop(context: Any, x: Any, count: Any) -> Any:
    """x shifted right by the low five bits of `count`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count = arguments
        return _call(builder, "llvm.fshr.v16i32", LANES.vector, _constant(0), x, count)

    return LANES(x, count), code


@intrinsic
def top_byte(context: Any, x: Any) -> Any:
    """The signed number in the upper eight bits, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.ashr(arguments[0], _constant(24)), FLOATS.vector)

    return FLOATS(x), code


@intrinsic
def where_negative(context: Any, sign: Any, x: Any) -> Any:
    """x where the integer `sign` is negative, else 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        below = builder.icmp_signed("<", arguments[0], _constant(0))
        return builder.select(below, arguments[1], ir.Constant(FLOATS.vector, [0.0] * COUNT))

    return FLOATS(sign, x), code


@intrinsic
def any_less(context: Any, a: Any, b: Any) -> Any:
    """Whether a < b in any lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask = builder.bitcast(builder.icmp_unsigned("<", *arguments), _I16)
        return builder.icmp_unsigned("!=", mask, _I16(0))

    return nb.types.boolean(a, b), code


@intrinsic
def accumulate(
    context: Any, places: Any, values: Any, count: Any, x: Any, sums: Any, blocks: Any
) -> Any:
    """``sums[s, b] = sum over k of values[k, s] * x[places[k, s], b]`` for the first 16 / blocks
    columns s of the lists and all b < blocks, where sums[s, b] and x[t, b] are 16 float32. Each sum
    is fused and in order of k. The sixteen sums stay in registers.

    Args:
        places, values: pointers into arrays of 32-bit elements, rows of `LIST` elements.
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
        kinds = (_I32, _F32, None, _F32, _F32)
        pairs = zip(arguments, kinds, strict=False)
        at = [a if k is None else builder.bitcast(a, k.as_pointer()) for a, k in pairs]
        held = [nb.core.cgutils.alloca_once(builder, vector) for _ in range(COUNT)]
        for slot in held:
            builder.store(ir.Constant(vector, [0.0] * COUNT), slot)
        with nb.core.cgutils.for_range(builder, at[2]) as loop:
            row = builder.mul(loop.index, _I64(LIST))
            for s in range(streams):
                k = builder.add(row, _I64(s))
                place = builder.sext(builder.load(builder.gep(at[0], [k])), _I64)
                value = _all(builder, builder.load(builder.gep(at[1], [k])))
                start = builder.mul(place, _I64(COUNT * n))
                for b in range(n):
                    here = builder.gep(at[3], [builder.add(start, _I64(COUNT * b))])
                    here = builder.bitcast(here, vector.as_pointer())
                    slot = held[s * n + b]
                    old, term = builder.load(slot), builder.load(here, align=4)
                    new = _call(builder, "llvm.fma.v16f32", vector, value, term, old)
                    builder.store(new, slot)
        for i, slot in enumerate(held):
            place = builder.bitcast(builder.gep(at[4], [_I64(COUNT * i)]), vector.as_pointer())
            builder.store(builder.load(slot), place, align=4)
        return context.get_dummy_value()

    pointer = nb.types.voidptr
    return nb.types.void(pointer, pointer, nb.types.int64, pointer, pointer, blocks), code


@intrinsic
def pointer_to(context: Any, array: Any, at: Any) -> Any:
    """Where array[at] of a flat array of 32-bit elements lies."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _I32)
        return builder.bitcast(builder.gep(base, [arguments[1]]), nb.core.cgutils.voidptr_t)

    return nb.types.voidptr(array, at), code


@intrinsic
def load_floats(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of an array of float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _F32)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), FLOATS.vector.as_pointer())
        return builder.load(place, align=4)

    return FLOATS(array, at), code


@intrinsic
def load_bytes(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of an array of int8, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = _data(context, builder, signature.args[0], arguments[0], _I8)
        vector = ir.VectorType(_I8, COUNT)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), vector.as_pointer())
        wide = builder.sext(builder.load(place, align=1), LANES.vector)
        return builder.sitofp(wide, FLOATS.vector)

    return FLOATS(array, at), code


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
                    x, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(a, a + width)))
                )
                for a in (0, width)
            ]
            x = builder.fadd(*halves)
        return builder.extract_element(x, _I32(0))

    return nb.types.float32(x), code
