"""PTX text -> basic blocks."""

import re
from dataclasses import dataclass, field


@dataclass
class Instruction:
    """One instruction: `ld.global.v2.b32 {a, b}, [c]` has op "ld", parts ["global", "v2", "b32"],
    args [["a", "b"], "[c]"]; `guard` is its predicate, `negated` if written @!p.
    """

    text: str
    op: str
    parts: list
    args: list
    guard: str | None = None
    negated: bool = False


@dataclass
class Block:
    """Instructions that run one after another; control enters at the first."""

    name: str
    code: list = field(default_factory=list)


@dataclass
class Kernel:
    """The only entry of a module.

    Attributes:
        name: of the entry.
        params: (type, name) of each parameter, in order.
        threads: of a CTA.
        blocks: in the order of the text; control falls through.
    """

    name: str
    params: list
    threads: int
    blocks: list


def parse(ptx):
    """The `Kernel` of a module's text."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    ptx = re.sub(r"^\s*\.loc[^\n]*", "", ptx, flags=re.M)
    head = re.search(r"\.entry\s+(\w+)\((.*?)\)[^{]*?(?=\{)", ptx, re.S)
    params = re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+)\s*(?:,|$)", head[2].strip(), re.M)
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    return Kernel(head[1], params, int(threads[1]), _blocks(_body(ptx, head.end())))


def _body(ptx, brace):
    """The text between the brace at `brace` and the one that closes it."""
    depth, at = 1, brace + 1
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[at], 0)
        at += 1
    return ptx[brace + 1 : at - 1]


def _blocks(body):
    targets = set(re.findall(r"bra(?:\.uni)?\s+(\$\w+)", body))
    blocks, scope, scoped = [Block("entry")], 0, False
    for statement in body.split(";"):
        text = statement.strip()
        while True:
            if m := re.match(r"(\$\w+):\s*", text):
                if m[1] in targets:
                    blocks.append(Block(m[1]))
                text = text[m.end() :]
            elif text[:1] in ("{", "}"):
                scoped, scope = text[0] == "{", scope + (text[0] == "{")
                text = text[1:].lstrip()
            else:
                break
        if not text or text.startswith("."):
            continue
        code = _instruction(text, scope if scoped else None)
        blocks[-1].code.append(code)
        if code.op in ("bra", "ret", "bar", "barrier"):
            blocks.append(Block(f"after {len(blocks)}"))
    return blocks


def _instruction(text, scope):
    m = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
    args = [_operand(t) for t in re.split(r",(?![^{\[]*[}\]])", m[4]) if t.strip()]
    if scope is not None:  # names declared inside { } are local to it
        args = [_scoped(a, scope) for a in args]
    op, *parts = m[3].replace("::", ".").split(".")
    return Instruction(" ".join(text.split()), op, parts, args, m[2], bool(m[1]))


def _scoped(a, scope):
    if isinstance(a, list):
        return [_scoped(part, scope) for part in a]
    return f"%{a}@{scope}" if re.match(r"[a-z]\w*$", a) else a


def _operand(text):
    text = text.strip()
    return [_operand(t) for t in text[1:-1].split(",")] if text.startswith("{") else text
