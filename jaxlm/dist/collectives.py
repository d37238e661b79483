"""What devices send each other in a compiled program, read from its text: kinds, calls and bytes."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}  # fmt: skip
"""Width of the element types; types that are not listed start with f8 and have 8."""

PASSED_ON = {"bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element"}
"""Operations that leave a value whole; its users are looked for behind them."""


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`. An all-reduce of which every device keeps only its slice is a `reduce-scatter`: backends
        without that operation, the CPU's among them, write it so.
      name: of the instruction.
      bytes: of the whole array of one call: the result, and for a reduce-scatter the operand.
      calls: how often it runs, loops counted; 0 where a loop's length is not known to the compiler.
      group: devices that take part together; 0 where the text does not say.
    """

    kind: str
    name: str
    bytes: int
    calls: int
    group: int


class Total(NamedTuple):
    """Sum over the collectives of a kind: calls, and bytes as in `Collective` over all calls."""

    calls: int
    bytes: int


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: list[str]
    attributes: str


_Program = dict[str, list[_Instruction]]


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.
    """
    program, entry = _parse(text)
    calls = _calls(program, entry)
    return [
        found._replace(calls=calls.get(name, 0))
        for name, body in program.items()
        for instruction in body
        for found in _read(instruction, body, program)
    ]


def totals(text: str) -> dict[str, Total]:
    """Calls and bytes by kind, in the order of `KINDS`; kinds that do not occur are left out.

    Raises:
      ValueError: if a collective stands in a loop whose length the compiler does not know.
    """
    found = collectives(text)
    endless = [c.name for c in found if not c.calls]
    if endless:
        raise ValueError(f"collectives: {', '.join(endless)} in a loop of unknown length; give the loop a fixed one")
    sums = {}
    for kind in KINDS:
        chosen = [c for c in found if c.kind == kind]
        if chosen:
            sums[kind] = Total(sum(c.calls for c in chosen), sum(c.calls * c.bytes for c in chosen))
    return sums


def wire_bytes(found: Iterable[Collective]) -> float:
    """Bytes that a device sends if every collective runs as a ring: an all-reduce is a scatter and a gather."""
    factors = {"all-reduce": 2.0}
    return sum(
        c.bytes * c.calls * (1.0 if c.kind == "collective-permute" else factors.get(c.kind, 1.0) * (1 - 1 / c.group))
        for c in found
        if c.group > 1 or c.kind == "collective-permute"
    )


def _parse(text: str) -> tuple[_Program, str]:
    program: _Program = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = head.group(2)
            program[current] = []
            entry = current if head.group(1) else entry
            continue
        body = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line)
        if body and current:
            name, type_, op, rest = body.groups()
            inside, attributes = _split(rest)
            operands = [inside] if op == "parameter" else re.findall(r"%([\w.\-]+)", inside)
            program[current].append(_Instruction(name, type_, op, operands, attributes))
    return program, entry


def _split(rest: str) -> tuple[str, str]:
    """What stands before and after the bracket that closes the operands."""
    depth = 1
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:index], rest[index + 1 :]
    return rest, ""


def _calls(program: _Program, entry: str) -> dict[str, int]:
    """How often each computation runs; 0 inside a loop of unknown length."""
    edges = {name: list(_callees(body)) for name, body in program.items()}
    counts = dict.fromkeys(program, 0)
    # A computation stands before its callers in the text, so that in reverse order callers are done first.
    counts[entry] = 1
    for name in [entry, *(n for n in reversed(program) if n != entry)]:
        for callee, times in edges[name]:
            counts[callee] = counts.get(callee, 0) + counts[name] * times
    return counts


def _callees(body: list[_Instruction]) -> Iterator[tuple[str, int]]:
    for instruction in body:
        trips = 1
        if instruction.op == "while":
            known = re.search(r'known_trip_count":?\{"n":"(\d+)"', instruction.attributes)
            trips = int(known.group(1)) if known else 0
        listed = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                            instruction.attributes)  # fmt: skip
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        for name in [*listed, *re.findall(r"%([\w.\-]+)", branches.group(1) if branches else "")]:
            yield name, trips


def _read(instruction: _Instruction, body: list[_Instruction], program: _Program) -> Iterator[Collective]:
    kind = instruction.op.removesuffix("-start")
    if kind not in KINDS:
        return
    sizes = _sizes(instruction.type)
    if instruction.op.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The started forms return operands and results; XLA lists the operands first.
        sizes = sizes[len(instruction.operands) : 2 * len(instruction.operands)]
    group = _group(instruction.attributes)
    if kind == "reduce-scatter":
        sizes = [size * max(group, 1) for size in sizes]
    if kind != "all-reduce":
        yield Collective(kind, instruction.name, sum(sizes), 0, group)
        return
    # Backends without 16-bit sums widen the operands, and say so in the name of the sum.
    if re.search(r"to_apply=%?[\w.\-]*promoted", instruction.attributes):
        sizes = [size // 2 for size in sizes]
    scattered = [_sliced(instruction.name, body, program, index if len(sizes) > 1 else None)
                 for index in range(len(sizes))]  # fmt: skip
    for wanted, named in ((False, "all-reduce"), (True, "reduce-scatter")):
        chosen = [size for size, hit in zip(sizes, scattered, strict=True) if hit is wanted]
        if chosen:
            yield Collective(named, instruction.name, sum(chosen), 0, group)


def _sliced(name: str, body: list[_Instruction], program: _Program, index: int | None = None) -> bool:
    """Whether everything that reads this value (or its element `index`) takes a slice of it first."""
    users = [user for user in body if name in user.operands]
    if index is not None:
        users = [user for user in users if re.search(rf"index={index}\b", user.attributes)]
    return bool(users) and all(_slices(user, name, body, program) for user in users)


def _slices(user: _Instruction, name: str, body: list[_Instruction], program: _Program) -> bool:
    if user.op == "dynamic-slice":
        return user.operands[0] == name
    if user.op in PASSED_ON:
        return _sliced(user.name, body, program)
    if user.op in ("fusion", "call"):
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", user.attributes)
        inner = program.get(called.group(1), []) if called else []
        positions = {str(i) for i, operand in enumerate(user.operands) if operand == name}
        parameters = [i.name for i in inner if i.op == "parameter" and i.operands[0] in positions]
        return bool(parameters) and all(_sliced(p, inner, program) for p in parameters)
    return False


def _sizes(type_: str) -> list[int]:
    """Bytes of each array in a type such as `f32[2,3]{1,0}` or `(f32[2], bf16[4])`."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_)
    return [
        math.prod(int(n) for n in shape.split(",") if n) * BITS.get(kind, 8) // 8
        for kind, shape in found
        if kind != "token"
    ]


def _group(attributes: str) -> int:
    """Devices in a replica group, in any of XLA's three notations; 0 if there is none."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes.group(1)))
        # A part of an axis is written 'name':(before)size.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part or sizes[name]) for name, part in used)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota.group(1))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed.group(1).split(",")) if listed else 0
