"""Collectives of a compiled program, read from its text: what, where, how large, how often.

The text is XLA's after partitioning, so shapes are those of one device. A collective in the body of
a loop counts as often as the loop runs, which the compiler notes or its condition tells: a counter
from 0, compared with a constant; the body tells its step, 2 where products wait for parts from both
sides. Where a loop may end earlier (decoding stops when all responses have),
that is the most.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s4": 1, "u4": 1}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# What runs on a SparseCore says so.
_END = re.compile(r"^\}(, execution_thread=\"\w+\")?\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation|called_computation)=%([\w.\-]+)"
)
_SEVERAL = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%([\w.\-]+), body=%([\w.\-]+)")
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_USED = re.compile(r"%([\w.\-]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      shapes: (type, dimensions) of what each device has afterwards.
      group: devices that take part together.
      times: how often it runs.
      depth: loops that it is in.
      source: where in the program it comes from, as JAX named it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int
    depth: int
    source: str

    @property
    def size(self) -> int:
        """Bytes of what each device has after one run."""
        return sum(bytes_of(*shape) for shape in self.shapes)

    @property
    def moved(self) -> int:
        """Bytes that each device receives in all runs, on a ring."""
        others = self.group - 1
        share = {
            # What a device has already is one part of the result.
            "all-gather": others / self.group,
            "all-reduce": 2 * others / self.group,
            "reduce-scatter": others,
            "all-to-all": others / self.group,
            "collective-permute": 1,
        }[self.kind]
        return round(self.times * self.size * share)


def bytes_of(kind: str, dimensions: tuple[int, ...]) -> int:
    """Returns the size of an array of XLA's type, "bf16" and the like."""
    bits = re.search(r"\d+", kind)
    each = _BYTES.get(kind) or max(int(bits[0]) // 8, 1)
    return each * math.prod(dimensions)


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns all collectives of a compiled program.

    Args:
      text: of the program, as `Compiled.as_text()` gives it.
      devices: that it is compiled for; the group of a collective that names none.
    """
    bodies, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int, depth: int) -> None:
        lines = bodies.get(name, [])
        for line in lines:
            operation = _operation(line)
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                shapes = _shapes(line, operation)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    # So the TPU's compiler writes one: each device keeps a slice of the sum.
                    kind, shapes = "reduce-scatter", _shapes(lines[-1], _operation(lines[-1]))
                source = _NAME.search(line)
                group = _group_size(line, devices) if kind != "collective-permute" else 2
                said = source[1] if source else ""
                found.append(Collective(kind, shapes, group, times, depth, said))
                continue
            if loop := _LOOP.search(line):
                known = _KNOWN.search(line)
                runs = (
                    int(known[1])
                    if known
                    else _trip_count(*(bodies.get(x, []) for x in loop.groups()))
                )
                visit(loop[1], times * (runs + 1), depth + 1)
                visit(loop[2], times * runs, depth + 1)
                continue
            for called in _called(line):
                visit(called, times, depth)

    visit(entry, 1, 0)
    return found


def moved_bytes(found: list[Collective]) -> dict[str, int]:
    """Returns kind → bytes that each device receives, kinds that do not occur left out."""
    totals = {kind: sum(c.moved for c in found if c.kind == kind) for kind in KINDS}
    return {kind: total for kind, total in totals.items() if total}


def weight_gathers(
    found: Iterable[Collective], shapes: Iterable[tuple[int, ...]], *, stacked: bool = False
) -> list[Collective]:
    """Returns the all-gathers of weights among collectives, told by their shapes.

    Args:
      found: of a program.
      shapes: of the weights, as one device has them where nothing is cut over `fsdp`; the first
        dimension may be that of the layers.
      stacked: only those of a weight as it is, layers in front; else of a single layer too.
    """

    def bare(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size for size in shape if size > 1)

    shapes = list(shapes)
    wanted = {bare(shape) for shape in shapes}
    if not stacked:
        wanted |= {bare(shape[1:]) for shape in shapes}
    # A vector could be anything, and costs nothing.
    wanted = {shape for shape in wanted if len(shape) > 1}
    return [
        c
        for c in found
        if c.kind == "all-gather" and any(bare(shape) in wanted for _, shape in c.shapes)
    ]


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the first one to run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None and (match := _COMPUTATION.match(line)):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif _END.match(line):
            # Kernels have text of several lines, which may begin so too.
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.append(line)
    return bodies, entry


def _operation(line: str) -> str:
    """Returns the operation of an instruction: the first word before "(" that is not of a type."""
    right = _INSTRUCTION.match(line)[2]
    # A type may hold layouts such as {1,0:T(8,128)}, whose letters are large.
    match = _OPERATION.search(right)
    return match[1] if match else ""


def _shapes(line: str, operation: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    right = _INSTRUCTION.match(line)[2]
    kind = right[: right.index(f"{operation}(")]
    arrays = [
        (name, tuple(int(x) for x in dims.split(",") if x)) for name, dims in _ARRAY.findall(kind)
    ]
    if operation.endswith("-start") and not operation.startswith("all-reduce"):
        # (operands, results, …): the results are as many as the operands.
        operands = right[right.index(f"{operation}(") :].split(")")[0].count("%")
        arrays = arrays[operands : 2 * operands]
    return tuple(arrays)


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _SEVERAL.findall(line):
        yield from re.findall(r"%([\w.\-]+)", names)


def _trip_count(condition: list[str], body: list[str]) -> int:
    """Returns how often a loop runs at most; 1 where its condition does not tell."""
    constants = _constants(condition)
    bounds = [
        constants[name]
        for line in condition
        if "direction=LT" in line or "fusion(" in line
        for name in _USED.findall(line)
        if name in constants
    ]
    return max((-(-bound // _step(condition, body)) for bound in bounds), default=1)


def _step(condition: list[str], body: list[str]) -> int:
    """Returns what a loop's body adds to the counter that its condition reads; 1 if unknown."""
    counters = {match[1] for line in condition if (match := _ELEMENT.search(line))}
    results = [line for line in body if "ROOT " in line and " tuple(" in line]
    if len(counters) != 1 or not results:
        return 1
    names = _USED.findall(results[0].split(" tuple(")[1].split(")")[0])
    counter, constants = names[int(counters.pop())], _constants(body)
    added = [
        constants[name]
        for line in body
        if f"%{counter} = " in line and " add(" in line
        for name in _USED.findall(line.split(" add(")[1].split(")")[0])
        if name in constants
    ]
    return max(added, default=1)


def _constants(lines: list[str]) -> dict[str, int]:
    found = (match.groups() for line in lines if (match := _CONSTANT.search(line)))
    return {name: int(value) for name, value in found}


def _group_size(line: str, devices: int) -> int:
    """Returns how many devices a collective brings together; three ways to write it."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(shape[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    return devices
