"""Memory of a launch. Every access is checked: all its bytes lie in one tensor (or in the CTA's
shared memory), aligned to their number; loaded bytes were written before; no other thread wrote or
read them without a barrier between.
"""

import numpy as np

from ptx.faults import Fault

GAP = 0x2_0000_0000  # a wrong 32-bit offset from one tensor does not reach the next


class Tensor:
    """Bytes in global memory.

    Attributes:
        base: address; data: uint8 array; name: of the argument.
        written: which bytes hold something, or None for all.
        writer, epoch: thread that wrote a byte last in this launch, and barriers it had passed.
    """

    def __init__(self, base, data, written, name):
        self.base, self.data, self.written, self.name = base, data, written, name
        self.writer = self.epoch = None

    def rows(self, array, width):
        """`array` by accesses of `width` bytes."""
        return array[: array.size // width * width].reshape(-1, width)

    def track(self):
        """Starts to note writers."""
        if self.writer is None:
            self.writer = np.full(self.data.size, -1, np.int32)
            self.epoch = np.zeros(self.data.size, np.int32)


class Global:
    """The tensors of a launch. `cta` is the number of threads of a CTA."""

    def __init__(self):
        self.tensors, self.next = [], 0x7F31_0000_0000
        self.bases = np.zeros(0, np.uint64)

    def add(self, data, written=None, name=""):
        """Places a contiguous uint8 array; returns its address."""
        base = self.next
        self.next = (base + data.size + GAP + 511) // 512 * 512
        self.tensors.append(Tensor(base, data, written, name))
        self.bases = np.array([t.base for t in self.tensors], np.uint64)
        return base

    def find(self, address, width):
        """Yields (tensor, which accesses are its, their offsets in bytes)."""
        k = np.searchsorted(self.bases, address, "right") - 1
        if (k < 0).any():
            raise Fault("address below every tensor")
        for i in np.unique(k):
            t, here = self.tensors[i], k == i
            offset = (address[here] - np.uint64(t.base)).astype(np.int64)
            far = offset[offset + width > t.data.size]
            if far.size:
                raise Fault(f"byte {far.min()} to {far.max()} of {t.name}, of {t.data.size} bytes")
            if (offset % width).any():
                raise Fault(f"address is not a multiple of {width}")
            yield t, here, offset

    def load(self, address, who, width, epoch, cta):
        """Bytes [n, width] for threads `who` that have passed `epoch` barriers."""
        out = np.empty((len(who), width), np.uint8)
        for t, here, offset in self.find(address, width):
            row = offset // width
            if t.written is not None and not t.rows(t.written, width)[row].all():
                raise Fault(f"loads bytes of {t.name} that nothing has written")
            if t.writer is not None:
                self._race(t, row, who[here], width, epoch[here], cta)
            out[here] = t.rows(t.data, width)[row]
        return out

    def store(self, address, who, width, data, epoch, cta):
        """Stores bytes [n, width]."""
        for t, here, offset in self.find(address, width):
            t.track()
            row, new, by = offset // width, data[here], who[here]
            view = t.rows(t.data, width)
            self._race(t, row, by, width, epoch[here], cta, new != view[row])
            view[row] = new
            t.rows(t.writer, width)[row] = by[:, None]
            t.rows(t.epoch, width)[row] = epoch[here][:, None]
            if t.written is not None:
                t.rows(t.written, width)[row] = True
            if not np.array_equal(view[row], new):
                raise Fault(f"threads write different values to one place of {t.name}")

    def _race(self, t, row, by, width, epoch, cta, changed=None):
        """Other threads' writes to the same bytes must lie behind a barrier of the same CTA."""
        w, then = t.rows(t.writer, width)[row], t.rows(t.epoch, width)[row]
        by = by[:, None]
        bad = (w >= 0) & (w != by) & ((w // cta != by // cta) | (then >= epoch[:, None]))
        if changed is not None:
            bad &= changed
        if bad.any():
            i, k = np.argwhere(bad)[0]
            raise Fault(
                f"thread {by[i, 0]} meets a write of thread {w[i, k]} to {t.name} without a "
                "barrier between"
            )


class Shared:
    """Shared memory of all CTAs of a launch."""

    def __init__(self, ctas, size):
        self.size, self.pitch = size, max(1, size)
        n = ctas * self.pitch
        self.memory = np.zeros(n, np.uint8)
        self.writer, self.written = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        self.reader, self.read = np.full(n, -1, np.int32), np.full(n, -1, np.int32)

    def _place(self, cta, address, width):
        if (address < 0).any() or (address + width > self.size).any():
            raise Fault(f"shared byte {address.min()} to {address.max()} of {self.size}")
        if (address % width).any():
            raise Fault(f"shared address is not a multiple of {width}")
        return cta * self.pitch + address

    def load(self, cta, address, who, width, epoch):
        """Bytes [n, width]."""
        flat = self._place(cta, address, width)
        out = np.empty((len(who), width), np.uint8)
        for k in range(width):
            at = flat + k
            w = self.writer[at]
            if (w < 0).any():
                i = np.argmax(w < 0)
                raise Fault(f"shared byte {address[i] + k} is read before it is written")
            self._refuse((w != who) & (self.written[at] >= epoch), who, address + k, w)
            out[:, k] = self.memory[at]
            mixed = (self.read[at] == epoch) & (self.reader[at] != who)
            self.reader[at] = np.where(mixed, -2, who)
            self.read[at] = epoch
            self.reader[at[self.reader[at] != who]] = -2  # several of these threads read it
        return out

    def store(self, cta, address, who, width, data, epoch):
        """Stores bytes [n, width]."""
        flat = self._place(cta, address, width)
        for k in range(width):
            at, new = flat + k, data[:, k]
            w, reader = self.writer[at], self.reader[at]
            bad = (w >= 0) & (w != who) & (self.written[at] >= epoch)
            bad |= (reader != -1) & (reader != who) & (self.read[at] >= epoch)
            self._refuse(bad & (self.memory[at] != new), who, address + k, w)
            self.memory[at], self.writer[at], self.written[at] = new, who, epoch
            if (self.memory[at] != new).any():
                raise Fault("threads write different values to one shared byte at once")

    @staticmethod
    def _refuse(bad, who, address, other):
        if bad.any():
            i = np.argmax(bad)
            raise Fault(f"thread {who[i]} races with thread {other[i]} at shared byte {address[i]}")
