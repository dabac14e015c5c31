"""Matrix instructions of a warp or of four: each takes the machine and the instruction.

Sums are formed in float64 and added to the accumulator once: more exact than the hardware.
"""

import re

import numpy as np

from ptx.arithmetic import convert
from ptx.faults import Fault

WARP = 32
SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}  # of a wgmma descriptor: bits of the row that flip


def _complete(machine):
    machine.whole_warps(np.full(len(machine.idx), 0xFFFFFFFF, np.uint32))


def ldmatrix(machine, i):
    """8 x 8 matrices of 16 bits from shared memory, a row of 4 words to each lane."""
    _complete(machine)
    count, warps = len(i.args[0]), len(machine.idx) // WARP
    address = machine.address(i.args[1], "s32").reshape(warps, WARP)[:, : 8 * count]
    who = machine.idx.reshape(warps, WARP)[:, : 8 * count]
    rows = machine.access_shared(address.ravel(), who.ravel(), 16).reshape(warps, count, 8, 16)
    halves = rows.view(np.uint16)
    if "trans" in i.parts:
        halves = halves.swapaxes(2, 3)
    words = np.ascontiguousarray(halves).view(np.uint32)  # [warps, count, 8, 4]
    for k, name in enumerate(i.args[0]):
        machine.put(name, np.ascontiguousarray(words[:, k]).reshape(-1))


def stmatrix(machine, i):
    """The way back of `ldmatrix`."""
    _complete(machine)
    names = i.args[1] if isinstance(i.args[1], list) else [i.args[1]]
    count, warps = len(names), len(machine.idx) // WARP
    address = machine.address(i.args[0], "s32").reshape(warps, WARP)[:, : 8 * count]
    who = machine.idx.reshape(warps, WARP)[:, : 8 * count]
    values = [np.broadcast_to(machine.get(n, "b32"), machine.idx.shape) for n in names]
    words = np.stack([v.reshape(warps, 8, 4) for v in values], 1)  # [warps, count, 8, 4]
    halves = np.ascontiguousarray(words).view(np.uint16)  # [warps, count, 8, 8]
    if "trans" in i.parts:
        halves = halves.swapaxes(2, 3)
    data = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)
    machine.access_shared(address.ravel(), who.ravel(), 16, data)


def _fragments(machine, names, kind):
    """Registers of pairs of 16-bit floats as float64 [warps, lanes, registers, 2]."""
    values = [np.broadcast_to(machine.get(n), machine.idx.shape) for n in names]
    bits = np.stack(values, 1).copy().view(np.uint16)
    return convert(bits, "f32", kind).astype(np.float64).reshape(-1, WARP, len(names), 2)


def _left(machine, names, kind):
    """The left operand [warps, 16, 16] from four registers of each lane."""
    parts = _fragments(machine, names, kind)
    lane, half = np.arange(WARP)[:, None], np.arange(2)
    a = np.zeros((len(parts), 16, 16))
    for r in range(4):
        a[:, lane // 4 + 8 * (r & 1), 2 * (lane % 4) + half + 8 * (r >> 1)] = parts[:, :, r]
    return a


def mma(machine, i):
    """m16n8k16 of a warp."""
    if "m16n8k16" not in i.parts or i.parts[-4] != "f32":
        raise NotImplementedError(i.text)
    _complete(machine)
    a = _left(machine, i.args[1], i.parts[-3])
    fb = _fragments(machine, i.args[2], i.parts[-2])
    lane, half = np.arange(WARP)[:, None], np.arange(2)
    b = np.zeros((len(fb), 16, 8))
    for r in range(2):
        b[:, 2 * (lane % 4) + half + 8 * r, lane // 4] = fb[:, :, r]
    d, lane = a @ b, np.arange(WARP)
    for r, name in enumerate(i.args[0]):
        part = d[:, lane // 4 + 8 * (r >> 1), 2 * (lane % 4) + (r & 1)].reshape(-1)
        old = machine.get(i.args[3][r], "f32").view(np.float32)
        machine.put(name, (old + part).astype(np.float32))


def _described(machine, name, rows, kind):
    """An operand [groups, rows, 16] of wgmma, K-major in shared memory, from its descriptor."""
    d = machine.get(name).reshape(-1, 128)
    if (d != d[:, :1]).any():
        raise Fault("descriptors of a warp group differ")
    d = d[:, 0].astype(np.uint64)

    def field(at):
        bits = (d >> np.uint64(at)) & np.uint64(0x3FFF)
        return bits.astype(np.int64)[:, None, None] * 16

    mask = np.array([SWIZZLE[int(v)] for v in d >> np.uint64(62)])[:, None, None]
    if (mask == 0).any():
        raise NotImplementedError("wgmma without a swizzle")
    r, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    at = field(0) + r // 8 * field(32) + r % 8 * (16 * (mask + 1)) + 2 * k
    at ^= (at >> 7 & mask) << 4
    who = np.broadcast_to(machine.idx.reshape(-1, 128)[:, :1, None], at.shape)
    bits = machine.access_shared(at.ravel(), who.ravel(), 2).view(np.uint16)
    return convert(bits.reshape(-1), "f32", kind).astype(np.float64).reshape(at.shape)


def wgmma(machine, i):
    """m64nNk16 of four warps, the left operand in registers or in shared memory, the right one in
    shared memory; done at once, so that fence, commit and wait have nothing to do.
    """
    if i.parts[0] != "mma_async":
        return
    n = int(re.match(r"m64n(\d+)k16", i.parts[3])[1])
    held = isinstance(i.args[1], list)  # then only the right operand may be transposed
    if len(machine.idx) % 128 or i.args[-1] != "0" or not (held or i.args[-2] == "0"):
        raise NotImplementedError(i.text)
    if held:
        a = _left(machine, i.args[1], i.parts[-2]).reshape(-1, 64, 16)
    else:
        a = _described(machine, i.args[1], 64, i.parts[-2])
    d = a @ _described(machine, i.args[2], n, i.parts[-1]).swapaxes(1, 2)
    add = np.broadcast_to(machine.get(i.args[3], "pred"), machine.idx.shape)
    t = np.arange(128)
    for r, name in enumerate(i.args[0]):
        row = t // 32 * 16 + t % 32 // 4 + 8 * (r // 2 % 2)
        part = d[:, row, 8 * (r // 4) + 2 * (t % 4) + r % 2].reshape(-1)
        old = np.where(add, machine.get(name).view(np.float32), np.float32(0))
        machine.put(name, (old + part).astype(np.float32))


OPS = {"ldmatrix": ldmatrix, "stmatrix": stmatrix, "mma": mma, "wgmma": wgmma}
