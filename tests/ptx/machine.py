"""Executes a kernel: every thread of the grid at once, one numpy operation per instruction.

Divergence: each thread stands at a basic block; the lowest block runs next, for all threads that
stand there. Barriers make threads wait until all of their CTA (or warp) have come.
"""

import re
from collections import Counter

import numpy as np

from ptx import tensor_cores
from ptx.arithmetic import compute, dtype, raw
from ptx.faults import Fault
from ptx.memory import Shared

WARP = 32
SPECIAL = re.compile(r"%(n?ctaid|n?tid)\.([xyz])|%(laneid|warpid)$")
WIDTHS = {"%p": bool, "%r": np.uint32, "%rs": np.uint16, "%rd": np.uint64}
RUNS, WAITS, DONE = 0, 1, 2


class Machine:
    """One launch.

    Args:
        kernel: a `parse.Kernel`.
        grid: CTAs along x, y, z.
        memory: a `memory.Global`.
        arguments: integers for the parameters.
        shared: bytes of shared memory of a CTA.
        early: None; or, for a launch that may begin before the one in front of it has ended, the
            names of the tensors that may be read before griddepcontrol.wait.

    Attributes:
        counts: warps that ran each block.
    """

    def __init__(self, kernel, grid, memory, arguments, shared, early=None):
        self.blocks, self.cta, self.memory, self.early = (
            kernel.blocks,
            kernel.threads,
            memory,
            early,
        )
        self.grid = (*grid, 1, 1, 1)[:3]
        self.ctas = int(np.prod(self.grid))
        self.n = self.ctas * self.cta
        names = zip(kernel.params, arguments, strict=True)
        self.params = {name: (kind, value) for (kind, name), value in names}
        self.thread = np.arange(self.n)
        self.shared = Shared(self.ctas, shared)
        self.epoch = np.zeros(self.n, np.int32)  # barriers passed
        self.waited = np.zeros(self.n, bool)  # for the launch in front
        self.barrier_at = np.zeros(self.n, np.int32)
        self.registers, self.local, self.counts = {}, {}, Counter()
        self.jump = {b.name: i for i, b in enumerate(self.blocks)}

    def run(self):
        """Until all threads have left."""
        pc, state = np.zeros(self.n, np.int32), np.zeros(self.n, np.int8)
        while True:
            running = state == RUNS
            if not running.any():
                if (state == DONE).all():
                    if self.early is not None and not self.waited.all():
                        raise Fault("a thread leaves without griddepcontrol.wait")
                    return self
                self._release(state)
                continue
            at = int(pc[running].min())
            self._block(at, np.nonzero(running & (pc == at))[0], pc, state)

    def _release(self, state):
        """Lets CTAs go on whose threads all wait at one barrier."""
        waits = (state == WAITS).reshape(self.ctas, -1)
        complete = waits.all(1)
        if not complete.any():
            k = np.nonzero(waits.any(1))[0][0]
            left = (state == DONE).reshape(self.ctas, -1)[k].sum()
            raise Fault(f"CTA {k}: {waits[k].sum()} threads wait at a barrier, {left} have left")
        at = self.barrier_at.reshape(self.ctas, -1)[complete]
        if (at != at[:, :1]).any():
            raise Fault("threads of a CTA wait at different barriers")
        go = np.repeat(complete, self.cta)
        state[go] = RUNS
        self.epoch[go] += 1

    def _block(self, at, idx, pc, state):
        block = self.blocks[at]
        self.idx, self.full, self.local = idx, len(idx) == self.n, {}
        self.counts[at] += self.n // WARP if self.full else len(np.unique(idx // WARP))
        pc[idx] = at + 1
        if at + 1 == len(self.blocks):
            state[idx] = DONE
        for i in block.code:
            where = None
            if i.guard is not None:
                where = np.broadcast_to(self.get(i.guard), idx.shape)
                where = ~where if i.negated else where
            here = idx if where is None else idx[where]
            if i.op == "bra":
                pc[here] = self.jump[i.args[0]]
            elif i.op == "ret":
                state[here] = DONE
            elif i.op in ("bar", "barrier") and "warp" not in i.parts:
                if where is not None:
                    raise Fault(f"{i.text}: a guarded barrier")
                self.barrier_at[idx], state[idx] = at, WAITS
            else:
                try:
                    self.step(i, where)
                except Fault as e:
                    raise Fault(f"{block.name}: {i.text}: {e}") from None
                except Exception as e:
                    raise NotImplementedError(f"{i.text}: {e}") from e
        self._keep()

    def _keep(self):
        for name, value in self.local.items():
            if self.full:
                self.registers[name] = value
            else:
                if name not in self.registers:
                    self.registers[name] = np.zeros(self.n, value.dtype)
                self.registers[name][self.idx] = value

    def get(self, name, kind=None):
        """A register, number or special register of the threads that run, raw."""
        if name in self.local:
            return self.local[name]
        if name in self.registers:
            r = self.registers[name]
            return r if self.full else r[self.idx]
        if m := SPECIAL.match(name):
            return self._special(m)[self.idx].astype(np.uint32)
        if name.startswith("%"):
            raise Fault(f"register {name} is read before it is written")
        if name.startswith("0f"):
            return np.array([int(name[2:], 16)], np.uint32)
        if name == "global_smem":
            return np.zeros(1, dtype("u" + kind[1:]))
        if kind == "pred":
            return np.array([name not in ("0", "false")])
        size = int(kind[1:]) if kind else 32
        return np.array([int(name.rstrip("U"), 0) & (1 << size) - 1], f"u{size // 8}")

    def _special(self, m):
        inside, cta = self.thread % self.cta, self.thread // self.cta
        if m[3]:
            return self.thread % WARP if m[3] == "laneid" else inside // WARP
        axis = "xyz".index(m[2])
        x, y, _ = self.grid
        place = (cta % x, cta // x % y, cta // (x * y))[axis]
        return {
            "tid": inside if axis == 0 else inside * 0,
            "ntid": np.full(self.n, self.cta if axis == 0 else 1),
            "nctaid": np.full(self.n, self.grid[axis]),
            "ctaid": place,
        }[m[1]]

    def put(self, name, value, where=None):
        """Writes a register of the threads that run, of those `where`."""
        if name == "_":
            return
        value = raw(np.array(value))  # of its own: registers are changed in place
        if value.size == 1 and len(self.idx) != 1:
            value = np.repeat(value, len(self.idx))
        width = WIDTHS.get(re.match(r"%[a-z]+", name)[0])
        if width is not None and value.dtype != width:
            value = value.astype(width)  # loads of fewer bits are extended with zeros
        self.local[name] = (
            value if where is None else np.where(where, value, self._old(name, value))
        )

    def _old(self, name, value):
        """What a guarded write leaves in place; nothing may read it before all was written, which
        is not checked for predicated definitions (ptxas allows them)."""
        if name in self.local or name in self.registers:
            return self.get(name)
        return np.zeros_like(value)

    def step(self, i, where):
        """One instruction that does not branch."""
        op, parts, args = i.op, i.parts, i.args
        if op in ("ld", "st"):
            self._memory(i, where)
        elif op == "cp" and parts[0] == "async":
            if parts[1] in ("ca", "cg"):  # done at once: what it may overtake is not modelled
                self._copy(i, where)
        elif op == "prefetch":
            self._prefetch(i, where)
        elif op == "griddepcontrol":
            self._depend(parts[0])
        elif op == "mov":
            self._move(i, where)
        elif op in tensor_cores.OPS:
            tensor_cores.OPS[op](self, i)
        elif op == "redux":
            self.put(args[0], self._redux(i), where)
        elif op == "shfl":
            self._shuffle(i, where)
        elif op in ("fence", "membar"):
            pass
        elif op == "bar":  # bar.warp.sync
            self.whole_warps(np.full(len(self.idx), 0xFFFFFFFF, np.uint32))
            self.epoch[self.idx] += self.cta == WARP  # orders the CTA only if it is one warp
        else:
            kinds = [parts[-1]] * len(args)
            if op in ("shl", "shr", "bfe", "shf"):
                kinds[2:] = ["u32"] * (len(args) - 2)
            if op == "selp" or (op == "setp" and len(args) == 4):
                kinds[3] = "pred"
            if op == "mad" and "wide" in parts:
                kinds[3] = parts[-1][0] + str(2 * int(parts[-1][1:]))
            values = [self.get(a, k) for a, k in zip(args[1:], kinds[1:], strict=True)]
            self.put(args[0], compute(op, parts, values), where)

    def _move(self, i, where):
        to, source = i.args
        if isinstance(source, list):  # pack
            half = int(i.parts[-1][1:]) // len(source)
            value = np.zeros(1, dtype("u" + i.parts[-1][1:]))
            for k, name in enumerate(source):
                part = self.get(name, f"u{half}").astype(value.dtype)
                value = value | part << value.dtype.type(k * half)
            self.put(to, value, where)
        elif isinstance(to, list):  # unpack
            half = int(i.parts[-1][1:]) // len(to)
            value = self.get(source, i.parts[-1])
            for k, name in enumerate(to):
                part = value >> value.dtype.type(k * half)
                self.put(name, part.astype(f"u{half // 8}"), where)
        else:
            self.put(to, self.get(source, i.parts[-1]), where)

    def _depend(self, what):
        """Programmatic dependent launch: nothing is stored, and only what is `early` is loaded,
        before the wait; dependents are let go behind it, so that a launch two behind may read what
        this one's predecessor wrote.
        """
        if what == "wait":
            self.waited[self.idx] = True
        elif self.early is not None and not self.waited[self.idx].all():
            raise Fault("lets the next launch begin before this one has waited")

    def _before_wait(self, address, who, stores):
        if self.early is None or self.waited[who].all():
            return
        early = ~self.waited[who]
        if stores:
            raise Fault("a store before griddepcontrol.wait")
        for t, _, _ in self.memory.find(address[early], 1):
            if t.name not in self.early:
                raise Fault(f"{t.name} is read before griddepcontrol.wait")

    def whole_warps(self, mask):
        """Refuses instructions of a warp that not all of its lanes reach."""
        lanes = np.bincount(self.idx // WARP, minlength=self.n // WARP)
        if (lanes[np.unique(self.idx // WARP)] != WARP).any() or (mask != 0xFFFFFFFF).any():
            raise Fault("a warp is not complete")

    def _redux(self, i):
        self.whole_warps(np.broadcast_to(self.get(i.args[2], "u32"), self.idx.shape))
        x = self.get(i.args[1]).view(dtype(i.parts[-1])).reshape(-1, WARP)
        how = {"add": np.add, "min": np.minimum, "max": np.maximum}[i.parts[1]]
        return np.repeat(how.reduce(x, axis=1, dtype=x.dtype), WARP)

    def _shuffle(self, i, where):
        self.whole_warps(np.broadcast_to(self.get(i.args[-1], "u32"), self.idx.shape))
        names = i.args[0].split("|") if isinstance(i.args[0], str) else i.args[0]
        x = self.get(i.args[1])
        by = np.broadcast_to(self.get(i.args[2], "u32"), self.idx.shape).astype(np.int64)
        lane = np.arange(len(x)) % WARP
        to = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by % WARP}[i.parts[1]]
        inside = (to >= 0) & (to < WARP)
        self.put(names[0], x[np.arange(len(x)) - lane + np.where(inside, to, lane)], where)
        if len(names) > 1:
            self.put(names[1], inside)

    def address(self, operand, kind):
        """Of an operand such as [%r1 + 8], for each thread that runs."""
        m = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        base = self.get(m[1], kind).astype(np.uint64 if kind == "u64" else np.int64)
        offset = int(m[2] or "0", 0)
        at = base + base.dtype.type(offset % 2**64 if kind == "u64" else offset)
        return np.broadcast_to(at, self.idx.shape)

    def _memory(self, i, where):
        space = next(p for p in i.parts if p in ("param", "global", "shared"))
        kind = i.parts[-1]
        size = int(kind[1:]) // 8
        if space == "param":
            _, value = self.params[i.args[1].strip("[]")]
            self.put(i.args[0], np.array([value & (1 << 8 * size) - 1], f"u{size}"), where)
            return
        names, operand = (i.args[0], i.args[1]) if i.op == "ld" else (i.args[1], i.args[0])
        names = names if isinstance(names, list) else [names]
        width = size * len(names)
        address = self.address(operand, "u64" if space == "global" else "s32")
        active = np.ones(len(self.idx), bool) if where is None else where
        who = self.idx[active]
        if not len(who):
            return
        access = self.access_global if space == "global" else self.access_shared
        if i.op == "ld":
            data = np.zeros((len(self.idx), width), np.uint8)
            data[active] = access(address[active], who, width)
            for k, name in enumerate(names):
                part = np.ascontiguousarray(data[:, k * size : (k + 1) * size])
                self.put(name, part.view(f"u{size}")[:, 0], where)
        else:
            parts = [np.broadcast_to(self.get(n, kind), self.idx.shape) for n in names]
            data = np.stack([p.astype(f"u{size}")[active] for p in parts], 1)
            access(address[active], who, width, data.view(np.uint8).reshape(len(who), width))

    def access_global(self, address, who, width, data=None):
        """Loads bytes [n, width] for threads `who`, or stores `data`."""
        self._before_wait(address, who, data is not None)
        if data is None:
            return self.memory.load(address, who, width, self.epoch[who], self.cta)
        return self.memory.store(address, who, width, data, self.epoch[who], self.cta)

    def access_shared(self, address, who, width, data=None):
        """The same in the CTAs' shared memory."""
        cta, epoch = who // self.cta, self.epoch[who]
        if data is None:
            return self.shared.load(cta, address, who, width, epoch)
        return self.shared.store(cta, address, who, width, data, epoch)

    def _prefetch(self, i, where):
        """Changes nothing; its address must lie in a tensor that may be read now."""
        address = self.address(i.args[0], "u64")
        who = self.idx if where is None else self.idx[where]
        address = address if where is None else address[where]
        if len(who):
            self._before_wait(address, who, False)
            list(self.memory.find(address, 1))

    def _copy(self, i, where):
        width = int(i.args[2], 0)
        active = np.ones(len(self.idx), bool) if where is None else where
        size = self.get(i.args[3], "u32") if len(i.args) > 3 else np.full(1, width)
        size = np.broadcast_to(size, self.idx.shape)
        to, source = self.address(i.args[0], "s32"), self.address(i.args[1], "u64")
        data = np.zeros((len(self.idx), width), np.uint8)
        read = active & (size > 0)
        if (size[read] != width).any():
            raise Fault("a part of a copy")
        if read.any():
            data[read] = self.access_global(source[read], self.idx[read], width)
        if active.any():
            self.access_shared(to[active], self.idx[active], width, data[active])
