"""Counts the collectives of a compiled program and their bytes, by parsing its HLO text."""

import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"([a-z]+\d*)[a-z0-9]*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.-]+)|branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    rest: str  # the rest of the line: operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def number(self) -> int:
        return int(self.rest.split(")")[0])


@dataclass
class Exchange:
    """The collectives of one kind, in one run of the program."""

    count: int = 0
    bytes: int = 0  # per device; each collective counts the larger of its input and its output


def exchanged(text: str) -> dict[str, Exchange]:
    """The collectives of a program by kind. A collective in a loop counts once for each iteration.

    The number of iterations is known if the loop compares its counter with a constant. Any other loop, such as that
    over the steps of a dispatch, counts as one iteration. A collective that several fusions implement in parts, on the
    same channel, counts once.
    """
    computations, types = _read(text)
    callers = defaultdict(list)  # for each computation: the computations that call it, and how often
    for name, lines in computations.items():
        for instruction in lines:
            times, rest = 1, instruction.rest
            if loop := re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", rest):
                times = _rounds(*(computations[part] for part in loop.groups()))
            for called, branches in _CALLED.findall(rest):
                for other in [called] if called else re.findall(r"%([\w.-]+)", branches):
                    callers[other].append((name, times))

    @functools.cache
    def runs(name: str) -> int:
        return sum(times * runs(caller) for caller, times in callers[name]) if callers[name] else 1

    found: dict[tuple[str, str], tuple[int, int]] = {}
    for computation, lines in computations.items():
        for own in lines:
            kind = own.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            given, made = sum(_bytes(types.get(x, "")) for x in own.operands), _bytes(own.type)
            if own.operation != kind and kind != "all-reduce":
                made -= given  # the result of a "-start" instruction includes the operands
            channel = re.search(r"channel_id=(\d+)", own.rest)
            key = kind, channel[1] if channel else own.name
            found[key] = max(found.get(key, (0, 0)), (runs(computation), max(given, made)))
    total: dict[str, Exchange] = {}
    for (kind, _), (times, size) in found.items():
        own = total.setdefault(kind, Exchange())
        own.count += times
        own.bytes += times * size
    return total


def _read(text: str) -> tuple[dict[str, list[_Instruction]], dict[str, str]]:
    """The instructions of each computation, and the type of each named instruction."""
    computations: dict[str, list[_Instruction]] = {}
    own: list[_Instruction] = []
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            own = computations[begun[1]] = []
        elif found := _INSTRUCTION.match(line):
            own.append(_Instruction(*found.groups()))
    return computations, {x.name: x.type for lines in computations.values() for x in lines}


def _rounds(condition: list[_Instruction], body: list[_Instruction]) -> int:
    """The iterations of a loop whose counter starts at 0: the bound in its condition over the step in its body."""
    bounds = [x.number for x in condition if x.operation == "constant"]
    places = [re.search(r"index=(\d+)", x.rest) for x in condition if x.operation == "get-tuple-element"]
    if len(bounds) != 1 or len(places) != 1 or not places[0]:
        return 1
    in_body = {x.name: x for x in body}
    counter = in_body.get(body[-1].operands[int(places[0][1])])
    while counter is not None and counter.operation == "copy":
        counter = in_body.get(counter.operands[0])
    added = [in_body[x] for x in counter.operands if x in in_body] if counter is not None else []
    steps = [x.number for x in added if x.operation == "constant"]
    return -(-bounds[0] // (steps[0] if steps else 1))


def _bytes(type_: str) -> int:
    """The bytes of all arrays of a type such as `(f32[8,128]{1,0}, bf16[])`."""
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _width(name) // 8 for name, dims in _ARRAY.findall(type_)
    )


def _width(name: str) -> int:
    """The bits of one element."""
    return 8 if name == "pred" else int(re.sub(r"\D", "", name) or 0)
