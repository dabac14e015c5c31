"""A block of 64 streams in compiled loops: a lane each, in four registers of AVX-512.

Four, because a lane is a chain of lookups: while one register waits for its gather the others issue
theirs. `LANES` holds 64 integers of 32 bits, `SUMS` 64 float32, `PAIRS` two float32 a lane. Memory
is read by masked gathers, sixteen lanes at a time. A lane that is compared is unsigned; an index is
below 2^31.
"""

from typing import Any

import numba as nb
from llvmlite import ir
from numba.extending import intrinsic

from qmoe.codec.decoder.registers import (
    COUNT,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    STREAMS,
    WORDS,
    Vector,
    call,
    data,
    everywhere,
)

LANES = Vector("lanes", I32, STREAMS)
SUMS, PAIRS = Vector("sums", F32, STREAMS), Vector("pairs", F32, 2 * STREAMS)


def _constant(n: int, count: int = STREAMS) -> Any:
    return ir.Constant(ir.VectorType(I32, count), [n] * count)


def _pick(builder: Any, x: Any, lanes: list[int]) -> Any:
    """These lanes of x."""
    at = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), at)


def _cut(builder: Any, x: Any, count: int) -> list[Any]:
    """x in parts of so many lanes."""
    return [_pick(builder, x, list(range(k, k + count))) for k in range(0, x.type.count, count)]


def _join(builder: Any, parts: list[Any]) -> Any:
    """The parts, a power of two of them, behind each other."""
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        at = ir.Constant(ir.VectorType(I32, n), list(range(n)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(a, b, at) for a, b in pairs]
    return parts[0]


def _gather(builder: Any, base: Any, index: Any, element: Any, step: int = 1) -> Any:
    """base[step * index] for every lane of a register of indices, with base an array of 32-bit
    words; an element I64 is that word and the one behind it."""
    count = index.type.count
    vector, mask = ir.VectorType(element, count), ir.VectorType(I1, count)
    name = {I32: "dpi", I64: "dpq", F32: "dps"}[element]
    return call(
        builder,
        f"llvm.x86.avx512.mask.gather.{name}.512",
        vector,
        *(ir.Constant(vector, [0] * count), builder.bitcast(base, I8.as_pointer()), index),
        *(ir.Constant(mask, [1] * count), I32(4 * step)),
    )


@intrinsic
def splat(context: Any, x: Any) -> Any:
    """An integer's low 32 bits in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        word = builder.trunc(x, I32) if x.type.width > 32 else x
        return everywhere(builder, word, STREAMS)

    return LANES(x), code


def _nothing(kind: Vector) -> Any:
    def typed(context: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return ir.Constant(kind.vector, [0.0] * kind.count)

        return kind(), code

    return intrinsic(typed)


no_sums, no_pairs = _nothing(SUMS), _nothing(PAIRS)


@intrinsic
def load(context: Any, array: Any, at: Any) -> Any:
    """array[at : at + 64] of an array of 32-bit integers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I32)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), LANES.vector.as_pointer())
        return builder.load(place, align=4)

    return LANES(array, at), code


@intrinsic
def store(context: Any, array: Any, at: Any, x: Any) -> Any:
    """array[at : at + its lanes] = x, of 32-bit elements."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[2].vector
        base = data(context, builder, signature.args[0], arguments[0], kind.element)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), kind.as_pointer())
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return nb.types.void(array, at, x), code


@intrinsic
def gather(context: Any, array: Any, index: Any) -> Any:
    """array[index], lane by lane; float32 if the array is."""
    floats = array.dtype == nb.types.float32

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = F32 if floats else I32
        base = data(context, builder, signature.args[0], arguments[0], element)
        parts = _cut(builder, arguments[1], COUNT)
        return _join(builder, [_gather(builder, base, p, element) for p in parts])

    return (SUMS if floats else LANES)(array, index), code


@intrinsic
def gather_pairs(context: Any, array: Any, first: Any, index: Any) -> Any:
    """array[first + 2 * index] and the element behind it, of a flat array of float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], F32)
        base, parts = builder.gep(base, [arguments[1]]), _cut(builder, arguments[2], COUNT // 2)
        found = _join(builder, [_gather(builder, base, p, I64, 2) for p in parts])
        return builder.bitcast(found, PAIRS.vector)

    return PAIRS(array, first, index), code


@intrinsic
def doubled(context: Any, x: Any) -> Any:
    """Every lane of sums twice, as pairs."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _pick(builder, arguments[0], [k // 2 for k in range(PAIRS.count)])

    return PAIRS(x), code


@intrinsic
def bits_at(context: Any, words: Any, bit: Any) -> Any:
    """The next 32 bits at position `bit` of an array of 32-bit words."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I32)
        words = _cut(builder, builder.lshr(arguments[1], _constant(5)), COUNT // 2)
        rests = _cut(builder, builder.and_(arguments[1], _constant(31)), COUNT // 2)
        long, found = ir.VectorType(I64, COUNT // 2), []
        for word, rest in zip(words, rests, strict=True):
            pair = _gather(builder, base, word, I64)
            shifted = builder.lshr(pair, builder.zext(rest, long))
            found.append(builder.trunc(shifted, ir.VectorType(I32, COUNT // 2)))
        return _join(builder, found)

    return LANES(words, bit), code


@intrinsic
def pick64(context: Any, table: Any, index: Any) -> Any:
    """table[index] of 64 32-bit integers, by permutations of registers where there are such."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = data(context, builder, signature.args[0], arguments[0], I32)
        held, found = [], []
        for k in range(4):
            place = builder.bitcast(builder.gep(base, [I64(COUNT * k)]), WORDS.as_pointer())
            held.append(builder.load(place, align=4))
        for index in _cut(builder, arguments[1], COUNT):
            name = "llvm.x86.avx512.vpermi2var.d.512"
            low = call(builder, name, WORDS, held[0], index, held[1])
            high = call(builder, name, WORDS, held[2], index, held[3])
            upper = builder.icmp_unsigned(">", index, _constant(31, COUNT))
            found.append(builder.select(upper, high, low))
        return _join(builder, found)

    return LANES(table, index), code


def _binary(name: str) -> Any:
    def typed(context: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return a(a, b), code

    return intrinsic(typed)


add, both = _binary("add"), _binary("and_")


@intrinsic
def least(context: Any, a: Any, b: Any) -> Any:
    """The smaller of two unsigned integers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.umin.v{STREAMS}i32", LANES.vector, *arguments)

    return LANES(a, b), code


@intrinsic
def right(context: Any, x: Any, by: Any) -> Any:
    """x shifted right by a literal number of bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        by = builder.trunc(arguments[1], I32)
        return builder.lshr(arguments[0], everywhere(builder, by, STREAMS))

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
        return call(builder, f"llvm.fshr.v{STREAMS}i32", LANES.vector, _constant(0), x, count)

    return LANES(x, count), code


@intrinsic
def top_byte(context: Any, x: Any) -> Any:
    """The signed number in the upper eight bits, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.ashr(arguments[0], _constant(24)), SUMS.vector)

    return SUMS(x), code


@intrinsic
def where_negative(context: Any, sign: Any, x: Any) -> Any:
    """x where the integer `sign` is negative, else 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        below = builder.icmp_signed("<", arguments[0], _constant(0))
        return builder.select(below, arguments[1], ir.Constant(SUMS.vector, [0.0] * STREAMS))

    return SUMS(sign, x), code


@intrinsic
def any_less(context: Any, a: Any, b: Any) -> Any:
    """Whether a < b in any lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask = builder.bitcast(builder.icmp_unsigned("<", *arguments), I64)
        return builder.icmp_unsigned("!=", mask, I64(0))

    return nb.types.boolean(a, b), code


@intrinsic
def high_byte(context: Any, x: Any) -> Any:
    """The signed number in the upper eight bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ashr(arguments[0], _constant(24))

    return LANES(x), code


@intrinsic
def kept(context: Any, entry: Any, x: Any) -> Any:
    """x where the entry has no advance (bits 8 to 15), else 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        advance = builder.and_(arguments[0], _constant(0xFF00))
        stays = builder.icmp_unsigned("==", advance, _constant(0))
        return builder.select(stays, arguments[1], _constant(0))

    return LANES(entry, x), code


@intrinsic
def in_tile(context: Any, place: Any, lane: Any) -> Any:
    """Index of a place and a lane in a tile of rows of 64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(builder.shl(arguments[0], _constant(6)), arguments[1])

    return LANES(place, lane), code


@intrinsic
def weights_of(context: Any, codes: Any, at: Any, by: Any, rows: Any, out: Any, to: Any) -> Any:
    """out[to : to + 64] = the bits of ``codes[at : at + 64] * by * rows[:64]``, of ``rows[64:]``
    where a code is negative: as float32, or as bfloat16 (the nearest, ties to even) where `out` is
    of 16 bits.

    Args:
        codes: int8; by: float32; rows: float32 [128]; out: uint16 or uint32.
    """
    narrow = out.dtype.bitwidth == 16
    kinds = {0: I8, 3: F32, 4: I16 if narrow else I32}

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        args = signature.args
        base = {k: data(context, builder, args[k], arguments[k], kinds[k]) for k in kinds}
        scale = everywhere(builder, arguments[2], COUNT)

        def place(k: int, start: Any, lane: int) -> Any:
            where = builder.gep(base[k], [builder.add(start, I64(lane))])
            return builder.bitcast(where, ir.VectorType(kinds[k], COUNT).as_pointer())

        for lane in range(0, STREAMS, COUNT):
            q = builder.sext(builder.load(place(0, arguments[1], lane), align=1), WORDS)
            above, below = (builder.load(place(3, I64(s), lane), align=4) for s in (0, STREAMS))
            negative = builder.icmp_signed("<", q, _constant(0, COUNT))
            row = builder.select(negative, below, above)
            weight = builder.fmul(builder.fmul(builder.sitofp(q, scale.type), scale), row)
            bits = builder.bitcast(weight, WORDS)
            if narrow:
                bits = _upper_half(builder, bits)
            builder.store(bits, place(4, arguments[5], lane), align=2 if narrow else 4)
        return context.get_dummy_value()

    return nb.types.void(codes, at, by, rows, out, to), code


@intrinsic
def weights_along(context: Any, codes: Any, by: Any, row: Any, out: Any, at: Any) -> Any:
    """out[at : at + 16] = the bits of ``codes[at : at + 16] * by[at : at + 16] * row``, as
    `weights_of` has them.

    Args:
        codes: int8; by: float32; row: float32; out: uint16 or uint32; each a row of a matrix.
    """
    narrow = out.dtype.bitwidth == 16
    kinds = {0: I8, 1: F32, 3: I16 if narrow else I32}

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(k: int) -> Any:
            base = data(context, builder, signature.args[k], arguments[k], kinds[k])
            vector = ir.VectorType(kinds[k], COUNT).as_pointer()
            return builder.bitcast(builder.gep(base, [arguments[4]]), vector)

        row = everywhere(builder, arguments[2], COUNT)
        q = builder.sext(builder.load(place(0), align=1), WORDS)
        weight = builder.fmul(builder.sitofp(q, row.type), builder.load(place(1), align=4))
        weight = builder.fmul(weight, row)
        bits = builder.bitcast(weight, WORDS)
        if narrow:
            bits = _upper_half(builder, bits)
        builder.store(bits, place(3), align=2 if narrow else 4)
        return context.get_dummy_value()

    return nb.types.void(codes, by, row, out, at), code


def _upper_half(builder: Any, bits: Any) -> Any:
    """Float32 rounded to bfloat16, as 16-bit integers."""
    odd = builder.and_(builder.lshr(bits, _constant(16, COUNT)), _constant(1, COUNT))
    bits = builder.add(builder.add(bits, _constant(0x7FFF, COUNT)), odd)
    return builder.trunc(builder.lshr(bits, _constant(16, COUNT)), ir.VectorType(I16, COUNT))
