"""What PTX instructions without memory compute, on arrays with one element a thread.

Values are raw register contents: unsigned integers or bool; instructions say how to read them.
"""

import re

import numpy as np

from ptx.faults import Fault

KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype(kind):
    """numpy's type of a PTX type name such as s32 or b64."""
    return np.dtype(bool) if kind == "pred" else np.dtype(f"{KINDS[kind[0]]}{int(kind[1:]) // 8}")


def raw(a):
    """The value as a register holds it."""
    return a if a.dtype == bool else a.view(f"u{a.dtype.itemsize}")


def fma(a, b, c):
    """float32 a * b + c rounded once: the float64 sum is rounded to odd, then to float32."""
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    with np.errstate(all="ignore"):
        p = a * b
        s = p + c
        t = s - p
        error = (p - (s - t)) + (c - t)
        even = s.view(np.int64) & 1 == 0
        fix = (error != 0) & np.isfinite(s) & np.isfinite(error) & even
        s = np.where(fix, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)
        return s.astype(np.float32)


def bf16(x):
    """float32 to the bits of bf16, to nearest even."""
    u = x.view(np.uint32)
    odd = (u >> np.uint32(16)) & np.uint32(1)
    r = ((u + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def convert(x, to, source):
    """cvt between two type names, without saturation."""
    if source == "bf16":
        wide = x.astype(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(dtype(to))
    x = x.astype(f"u{dtype(source).itemsize}").view(dtype(source))  # the register may be wider
    if to == "bf16":
        return bf16(x)
    with np.errstate(all="ignore"):
        return x.astype(dtype(to))


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
            "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
            "hi": np.greater, "hs": np.greater_equal}  # fmt: skip


def compare(how, a, b):
    """setp's comparison; with a trailing u it is true for NaN."""
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(1, bool)
    if how in ("num", "nan"):
        return unordered if how == "nan" else ~unordered
    if how not in _COMPARE:
        return _COMPARE[how[:-1]](a, b) | unordered
    return _COMPARE[how](a, b) & ~unordered


def shifted(x, n, left):
    """shl or shr: amounts beyond the width give zeros, or copies of the sign."""
    width = x.dtype.itemsize * 8
    over = n >= width
    n = np.minimum(n, width - 1).astype(x.dtype)
    y = x << n if left else x >> n
    if left or x.dtype.kind == "u":
        return np.where(over, x.dtype.type(0), y)
    return np.where(over, x >> x.dtype.type(width - 1), y)


def _wide(x, kind):
    return x.astype(dtype(kind[0] + str(2 * int(kind[1:]))))


def bfe(x, start, count, signed):
    """Bit field extract."""
    width = x.dtype.itemsize * 8
    start, count = start.astype(np.int64) & 255, count.astype(np.int64) & 255
    y = shifted(x, np.minimum(start, width), False)
    mask = np.where(count >= width, -1, (np.int64(1) << np.minimum(count, 62)) - 1)
    y = y.astype(np.int64) & mask
    if signed:
        sign = np.int64(1) << np.maximum(count - 1, 0)
        y = np.where((count > 0) & (count < width), (y ^ sign) - sign, y)
    return y.astype(x.dtype)


def divide(a, b):
    """Integer division towards zero."""
    if (b == 0).any():
        raise Fault("division by zero")
    a, b = a.astype(np.int64), b.astype(np.int64)
    return (np.sign(a) * np.sign(b)) * (np.abs(a) // np.abs(b))


def _cvt(parts, a):
    rounding = [p for p in parts if p in ("rni", "rzi", "rmi", "rpi")]
    if pair := {"bf16x2", "f16x2"} & {*parts}:
        high, low = (raw(convert(x, min(pair)[:-2], "f32")).astype(np.uint32) for x in a)
        return high << np.uint32(16) | low
    if rounding not in ([], ["rzi"]):
        raise NotImplementedError(parts)
    out = convert(a[0], *[p for p in parts if re.match(r"[busf]\d+$|bf16$", p)])
    return out.astype(np.int16) if out.dtype == np.int8 else out  # registers have 16 bits at least


def _funnel(parts, a):
    both = a[1].astype(np.uint64) << np.uint64(32) | a[0]
    n = a[2] & np.uint32(31) if "wrap" in parts else np.minimum(a[2], np.uint32(32))
    n = n.astype(np.uint64)
    return ((both << n) >> np.uint64(32) if parts[0] == "l" else both >> n).astype(np.uint32)


def _permute(a):
    both = a[1].astype(np.uint64) << np.uint64(32) | a[0]
    out = np.zeros(np.broadcast_shapes(*(x.shape for x in a)), np.uint32)
    for i in range(4):
        pick = (a[2] >> np.uint32(4 * i)) & np.uint32(15)
        place = np.uint64(8) * (pick & np.uint32(7))
        byte = (both >> place).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), 255, 0).astype(np.uint32)
        byte = np.where(pick & np.uint32(8), sign, byte)
        out |= byte << np.uint32(8 * i)
    return out


def _lop3(a):
    table, out = int(a[3][0]), np.zeros_like(a[0])
    for i in range(8):
        if table >> i & 1:
            each = zip(a[:3], (4, 2, 1), strict=True)
            out |= np.bitwise_and.reduce([x if i & bit else ~x for x, bit in each])
    return out


def _pairs(op, parts, a):
    """Two floats in a 64-bit register."""
    shape = np.broadcast_shapes(*(x.shape for x in a))
    halves = [np.broadcast_to(x, shape).astype(np.uint64) for x in a]
    split = [[(x >> np.uint64(s)).astype(np.uint32) for x in halves] for s in (0, 32)]
    kind = [*parts[:-1], "f32"]
    low, high = (raw(compute(op, kind, h)).astype(np.uint64) for h in split)
    return high << np.uint64(32) | low


def _bf16(op, a):
    """A product, sum or difference of bf16 numbers, one or two in a register: exact in float32,
    rounded once.
    """
    if op == "fma" and not (a[2].astype(np.uint32) & 0x7FFF7FFF).any():
        op = "mul"
    if op not in ("mul", "add", "sub"):
        raise NotImplementedError(f"{op} of bf16 with a sum")
    exact = {"mul": np.multiply, "add": np.add, "sub": np.subtract}[op]
    out = np.zeros(np.broadcast_shapes(*(x.shape for x in a)), np.uint32)
    for s in range(0, 8 * a[0].dtype.itemsize, 16):
        x, y = (convert(v.astype(np.uint32) >> np.uint32(s), "f32", "bf16") for v in a[:2])
        with np.errstate(all="ignore"):
            r = exact(x.astype(np.float64), y.astype(np.float64))
            single = r.astype(np.float32)
        if op != "mul" and (single != r).any():
            raise NotImplementedError(f"{op} of bf16 that would be rounded twice")
        out |= bf16(single).astype(np.uint32) << np.uint32(s)
    return out.astype(a[0].dtype)


def compute(op, parts, a):
    """Result of an instruction without memory or other lanes; `a` are raw operands."""
    kind = parts[-1]
    if op == "cvt":
        return _cvt(parts, a)
    if op == "setp":
        r = compare(parts[0], *(v.view(dtype(kind)) for v in a[:2]))
        return (
            r if len(parts) == 2 else {"and": r & a[2], "or": r | a[2], "xor": r ^ a[2]}[parts[1]]
        )
    if op == "selp":
        return np.where(a[2], a[0], a[1])
    if op in ("shl", "shr"):
        return shifted(a[0].view(dtype(kind)), a[1].astype(np.uint64), op == "shl")
    if op == "bfe":
        return bfe(a[0].view(dtype(kind)), a[1], a[2], kind[0] == "s")
    if op == "shf":
        return _funnel(parts, a)
    if op == "prmt":
        return _permute(a)
    if op == "lop3":
        return _lop3(a)
    if kind == "f32x2":
        return _pairs(op, parts, a)
    if kind.startswith("bf16"):
        return _bf16(op, a)
    return _simple(op, parts, a)


def _simple(op, parts, a):
    kind = parts[-1]
    size = dtype(kind).itemsize
    v = [x.view(dtype(kind)) if x.dtype != bool and x.dtype.itemsize == size else x for x in a]
    with np.errstate(all="ignore"):
        if op in ("mul", "mad") and "wide" in parts:
            r = _wide(v[0], kind) * _wide(v[1], kind)
            return raw(r) + a[2] if op == "mad" else r
        if op in ("mul", "mad") and "hi" in parts:
            r = (_wide(v[0], kind) * _wide(v[1], kind) >> size * 8).astype(dtype(kind))
            return r + v[2] if op == "mad" else r
        return {
            "add": lambda: v[0] + v[1], "sub": lambda: v[0] - v[1], "mul": lambda: v[0] * v[1],
            "mad": lambda: v[0] * v[1] + v[2], "fma": lambda: fma(*v),
            "min": lambda: np.minimum(*v), "max": lambda: np.maximum(*v),
            "and": lambda: v[0] & v[1], "or": lambda: v[0] | v[1], "xor": lambda: v[0] ^ v[1],
            "not": lambda: ~v[0], "neg": lambda: -v[0], "abs": lambda: np.abs(v[0]),
            "ex2": lambda: np.exp2(v[0].astype(np.float64)).astype(np.float32),
            "div": lambda: v[0] / v[1] if kind[0] == "f" else divide(*v).astype(dtype(kind)),
            "rem": lambda: (v[0].astype(np.int64) - divide(*v) * v[1]).astype(dtype(kind)),
        }[op]()  # fmt: skip
