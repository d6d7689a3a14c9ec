"""What machine code says of a kernel: registers, spills, what fits on a multiprocessor, and what its main loop is made of.

Read from `ptxas -v` and from the disassembly of `cuobjdump`; both come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

SPILL_FREE = 0
LIMITS = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
"""Compute capability -> KiB of shared memory and warps of one multiprocessor. All have 65,536 registers and 32 blocks."""

BLOCK_RESERVE = 1024
"""Shared memory that the system takes for each block."""

WGMMA = ("HGMMA", "QGMMA", "IGMMA", "BGMMA")
PRODUCTS = (*WGMMA, "HMMA", "QMMA", "IMMA")
FLOAT = ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSETP", "FFMA2", "FADD2", "FMUL2")

_JUMPS = ("BRA", "BSYNC", "EXIT", "RET", "BRX", "JMP")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_REGISTER_OPERAND = re.compile(r"^R\d+, R(\d+), gdesc")
_WRITTEN = re.compile(r"^(?:!?U?P\w+, )?R(\d+)\b")
_WORDS = re.compile(r"\.(64|128|[24])(?:\.|$)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of the disassembly."""

    address: int
    name: str  # with its modifiers: "LDG.E.128"
    operands: str
    guarded: bool = False  # under a predicate

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def name_of_barrier(self) -> str:
        """Return the convergence barrier of a BSSY: the first of its operands."""
        return self.operands.split(",")[0]


@dataclass(frozen=True)
class Code:
    """A compiled kernel, as its machine code shows it. Counts of `loop` are for one warp and one turn."""

    registers: int
    stack: int  # bytes of a thread
    spill: int  # bytes of a thread, stores and loads
    shared: int  # bytes of a block
    warps: int
    blocks: int  # that one multiprocessor holds; 0 = a block asks for more than there is
    wgmma: int  # tensor-core products of the main loop
    waits: int  # for products in flight, in the main loop
    loop: Counter[str] = field(default_factory=Counter)  # kinds of instruction in the main loop
    load: str = "-"  # widest read of global memory: bits of a thread, or TMA
    store: str = "-"
    warnings: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()  # what writes registers that a product under way reads, see `overwriting`
    order: str = ""  # of the main loop, see `order_of`
    size: int = 0  # instructions of the kernel

    @property
    def float_work(self) -> int:
        """Return the float32 instructions of the main loop that are no special function."""
        return sum(self.loop[kind] for kind in FLOAT)

    @property
    def problems(self) -> list[str]:
        """Say what nobody wants: spills, a stack, products one after the other, a block that fits nowhere."""
        found = [f"spills {self.spill} bytes"] if self.spill > SPILL_FREE else []
        found += [f"stack of {self.stack} bytes"] if self.stack and not self.spill else []
        found += ["does not fit"] if self.blocks == 0 else []
        found += [f"operand of a product under way overwritten by {self.overwritten[0]}"] if self.overwritten else []
        return found + ["wgmma serialized" if "C7510" in text else text for text in self.warnings]


def read_code(
    ptx: str, cubin: bytes, *, shared: int, warps: int, arch: int, tools: Path, options: Sequence[str]
) -> Code:
    """Return what the code of one kernel is. `tools` holds ptxas and cuobjdump; `options` are Triton's own for ptxas.

    Raises `OSError` when a tool is missing, `ValueError` when ptxas refuses the kernel.
    """
    log = _assemble(ptx, tools, options)
    registers = _number(r"Used (\d+) registers", log)
    spill = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    instructions = list(disassemble(sass_of(cubin, tools)))
    loop = main_loop(instructions)
    kinds = Counter(one.kind for one in loop)
    return Code(
        registers=registers,
        stack=_number(r"(\d+) bytes stack frame", log),
        spill=spill,
        shared=shared,
        warps=warps,
        blocks=blocks_that_fit(registers, shared, warps, arch),
        wgmma=sum(kinds[kind] for kind in PRODUCTS),
        waits=sum(one.name.startswith("WARPGROUP.DEPBAR") for one in loop),
        loop=kinds,
        load=_widest(instructions, ("LDG", "LDGSTS"), "UTMALDG"),
        store=_widest(instructions, ("STG", "RED", "ATOMG"), "UTMASTG", "UTMAREDG"),
        warnings=tuple(dict.fromkeys(_warnings(log))),
        overwritten=overwriting(instructions),
        order=order_of(loop),
        size=len(instructions),
    )


def blocks_that_fit(registers: int, shared: int, warps: int, arch: int) -> int:
    """Return how many blocks one multiprocessor holds; registers go to warps in pieces of 256, shared memory of 128."""
    kilobytes, most_warps = LIMITS[arch]
    if shared > (kilobytes - 1) * 1024:
        return 0
    warps_by_registers = 65536 // (-(-max(registers, 16) // 8) * 256) // 4 * 4
    by_shared = kilobytes * 1024 // (-(-shared // 128) * 128 + BLOCK_RESERVE)
    return min(32, most_warps // warps, warps_by_registers // warps, by_shared)


def sass_of(cubin: bytes, tools: Path) -> str:
    """Return the disassembly of a kernel."""
    with tempfile.TemporaryDirectory(prefix="tessera-sass-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [str(tools / "cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout


def disassemble(sass: str) -> Iterator[Instruction]:
    """Yield the instructions of a disassembly in order."""
    for line in sass.splitlines():
        found = _LINE.match(line)
        if found:
            operands = found[4].strip()
            guarded = found[2] is not None or operands.startswith(("P", "!P", "UP", "!UP"))
            yield Instruction(int(found[1], 16), found[3], operands, guarded)


def encoded(lines: Sequence[str]) -> list[str]:
    """Return a disassembly's instructions and their bits: what two kernels have alike that do the same."""
    return [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in lines if "/*" in line]


def main_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Return the innermost loop with the most tensor-core products, or the longest one where nothing is multiplied.

    Loops are natural ones, so that blocks which the compiler moved out of the way count and those in between do not.
    """
    loops = [[instructions[i] for block in body for i in block] for body in _loops(instructions)]
    busy = [(frozenset(one.address for one in body), body) for body in loops if _weight(body)[0]]
    inner = [body for places, body in busy if not any(other < places for other, _ in busy)]
    return max(inner or loops, key=_weight, default=[])


def overwriting(instructions: Sequence[Instruction]) -> tuple[str, ...]:
    """Return the instructions that write into a register operand of a wgmma before anything waits for it: a race.

    The PTX ISA calls that undefined (wgmma.mma_async: fragments before wgmma.wait_group), and nothing warns of it. A
    product's group is the one that the next `gsb0` closes; a wait for N ends all groups but the last N.
    """
    places = {one.address: index for index, one in enumerate(instructions)}
    blocks = _blocks(instructions)
    of_place = {index: block for block in blocks for index in block}
    found: dict[str, None] = {}
    for start, one in enumerate(instructions):
        held = _REGISTER_OPERAND.match(one.operands) if one.kind in WGMMA else None
        if held is None:
            continue
        registers = range(int(held[1]), int(held[1]) + 4)
        waiting, seen = [(start, 0)], set()
        while waiting:
            index, closed = waiting.pop()
            block = of_place[index]
            for place in range(index, block.stop):
                this = instructions[place]
                if this.kind in WGMMA:
                    closed += "gsb0" in this.operands
                elif this.name.startswith("WARPGROUP.DEPBAR") and int(this.operands.split(",")[-1], 16) < closed:
                    break
                elif set(_written_by(this)) & set(registers):
                    found[f"{this.name} {this.operands} at 0x{this.address:x}"] = None
                    break
            else:
                onward = [(places[a], min(closed, 8)) for a in _next(instructions, block) if a in places]
                waiting += [state for state in onward if state not in seen]
                seen.update(onward)
    return tuple(found)


def _written_by(one: Instruction) -> range:
    """Return the numbers of the registers that an instruction writes."""
    found = _WRITTEN.match(one.operands)
    if found is None or (one.operands.startswith(("P", "!P", "U")) and one.kind not in ("SHFL", "ATOMG", "ATOMS")):
        return range(0)
    words = _WORDS.search(one.name)
    count = {"64": 2, "128": 4, "2": 2, "4": 4}[words[1]] if words else 2 if "WIDE" in one.name else 1
    return range(int(found[1]), int(found[1]) + count)


def order_of(body: Sequence[Instruction]) -> str:
    """Return a loop as one line: what is issued after what, runs of one class counted.

    P product, W<n> wait until n groups of products are in flight, x special function, f float32, c conversion, i all else.
    """
    words = []
    for _, run in groupby((_class_of(one) for one in body), lambda word: word if word not in tuple("xfci") else "mix"):
        found = Counter(run)
        words.append(" ".join(word if count == 1 else f"{word}*{count}" for word, count in found.items()))
    return " ".join(words)


_CLASSES = {"MUFU": "x", "F2F": "c", "F2FP": "c", "LDGSTS": "COPY", "SYNCS": "BARRIER", "BAR": "SYNC"}
_NAMED = (
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDG",
    "STG",
    "RED",
    "ATOMG",
    "LDL",
    "STL",
    "SHFL",
    "BRA",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
)


def _class_of(one: Instruction) -> str:
    if one.kind in PRODUCTS:
        return "P"
    if one.name.startswith("WARPGROUP"):
        return "W" + one.operands[-1:] if "DEPBAR" in one.name else "i"
    if one.kind in FLOAT:
        return "f"
    return one.kind if one.kind in _NAMED else _CLASSES.get(one.kind, "i")


def _loops(instructions: Sequence[Instruction]) -> list[list[range]]:
    """Return each natural loop as its blocks, a block as the indices of its instructions."""
    blocks = _blocks(instructions)
    first = {instructions[block.start].address: number for number, block in enumerate(blocks)}
    after = [[first[a] for a in _next(instructions, block) if a in first] for block in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for number, targets in enumerate(after):
        for target in targets:
            before[target].append(number)
    above = _dominators(before)
    found: dict[int, set[int]] = {}
    for number, targets in enumerate(after):
        for head in targets:
            if head in above[number]:
                body = found.setdefault(head, {head})
                waiting = [number]
                while waiting:
                    one = waiting.pop()
                    if one not in body:
                        body.add(one)
                        waiting += before[one]
    return [[blocks[number] for number in sorted(body)] for body in found.values()]


def _blocks(instructions: Sequence[Instruction]) -> list[range]:
    places = {one.address: index for index, one in enumerate(instructions)}
    starts = {0}
    for index, one in enumerate(instructions):
        if one.kind in (*_JUMPS, "BSSY"):
            starts |= {places[target] for target in [_target(one)] if target in places}
            starts.add(index + 1)
    edges = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    return [range(a, b) for a, b in pairwise(edges)]


def _next(instructions: Sequence[Instruction], block: range) -> list[int]:
    """Return the addresses where control may go from the end of a block."""
    last = instructions[block[-1]]
    onward = [instructions[block.stop].address] if block.stop < len(instructions) else []
    if last.kind == "BSYNC":  # goes where the last BSSY of its barrier says
        joins = [
            one for one in instructions[: block.stop] if one.kind == "BSSY" and one.name_of_barrier in last.operands
        ]
        return [target for target in [_target(joins[-1])] if target is not None] if joins else onward
    if last.kind not in _JUMPS:
        return onward
    target = _target(last) if last.kind == "BRA" else None
    return ([] if target is None else [target]) + (onward if last.guarded else [])


def _target(one: Instruction) -> int | None:
    found = _TARGET.search(one.operands)
    return int(found[1], 16) if found and one.kind in ("BRA", "BSSY") else None


def _dominators(before: Sequence[Sequence[int]]) -> list[set[int]]:
    """Return for each block the blocks that every way to it goes through; block 0 is the entry."""
    every = set(range(len(before)))
    above = [{0} if number == 0 else set(every) for number in every]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(before)):
            ways = [above[one] for one in before[number]]
            now = (set.intersection(*ways) if ways else set()) | {number}
            changed |= now != above[number]
            above[number] = now
    return above


def _weight(body: Sequence[Instruction]) -> tuple[int, int]:
    return sum(one.kind in PRODUCTS for one in body), len(body)


def _assemble(ptx: str, tools: Path, options: Sequence[str]) -> str:
    target = re.search(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory(prefix="tessera-ptx-") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [str(tools / "ptxas"), "-v", *options, f"--gpu-name={target[1] if target else ''}"]
        done = subprocess.run(
            [*command, str(path), "-o", str(path.with_suffix(".o"))], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise ValueError(f"ptxas: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
    return done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _warnings(log: str) -> Iterator[str]:
    for line in log.splitlines():
        code = re.search(r"C7\d+", line)
        if code:
            yield f"{code[0]}: {line.split(':', 2)[-1].strip()[:100]}"
        elif "warning" in line.lower():
            yield line.strip()[:100]


def _widest(instructions: Sequence[Instruction], kinds: Sequence[str], *bulk: str) -> str:
    bits = [_bits(one.name) for one in instructions if one.kind in kinds]
    words = ["TMA"] if any(one.kind in bulk for one in instructions) else []
    words += [str(max(bits))] if bits else []
    return " ".join(words) or "-"


def _bits(name: str) -> int:
    parts = name.split(".")
    if "U8" in parts or "S8" in parts:
        return 8
    if "U16" in parts or "S16" in parts:
        return 16
    return next((int(part) for part in parts if part in ("64", "128")), 32)
