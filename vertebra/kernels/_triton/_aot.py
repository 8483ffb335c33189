"""Ahead-of-time compilation: the binary a GPU would run for a captured launch, made without one.

`specialise` passes the launch, meta tensors and all, through Triton's own binder, so that types,
constants and alignments are those of the JIT by construction. `compiled` compiles the result, and
`measured` reads each fact where it is final and still legible:

    registers, stack         ptxas's log; on AMD the metadata of the assembly
    spills, widest access    the disassembled binary
    access by argument       LLVM IR, the last form in which an access knows its pointer
    tensor cores             the dots of Triton's IR, the instructions of the binary
"""

from __future__ import annotations

import copyreg
import hashlib
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ._launch import Launch, limits

VERSION = triton.__version__


class Target(NamedTuple):
    """A device family, the shared memory one program may use, its matrix instructions."""

    gpu: GPUTarget
    shared: int
    matrix: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, r"\b[HIDB]MMA\b"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 << 10, r"\b[HIDBQ]MMA\b"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, r"\b[HIBQ]GMMA\b"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, r"\bUTC\w*MMA\b"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, r"\bv_s?mfma_"),
}


class Binary(NamedTuple):
    """What one compiled launch uses.

    `loads` and `stores` are the bits of the narrowest access, by pointer argument; `dots` are those
    that belong on tensor cores, `matrix` the instructions there that do them.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    widest_load: int
    widest_store: int
    dots: int
    matrix: int
    serialized: bool


# A jitted function is a global of its module, and travels to another process as one.
copyreg.pickle(JITFunction, lambda kernel: kernel.__qualname__)


def specialise(launch: Launch, target: Target) -> tuple[ASTSource, Any]:
    """Return the source and the options that Triton's JIT would compile for `launch`."""
    kernel, backend = launch.kernel, make_backend(target.gpu)
    arguments = launch.arguments | limits(kernel, target.gpu.backend)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(**arguments)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, arguments, bound, specialisation, None
    )
    return ASTSource(kernel, signature, constexprs, attrs), options


def identity(launch: Launch, target: Target) -> str:
    """Return a key that changes with anything that could change what is measured of `launch`."""
    source, options = specialise(launch, target)
    parts = (VERSION, make_backend(target.gpu).hash(), source.hash(), options.hash(), _own_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _own_text() -> str:
    return Path(__file__).read_text()


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tuples under the names of their paths: maps[0], strides[1][3]."""
    if isinstance(tree, tuple):
        for i, branch in enumerate(tree):
            yield from leaves(branch, f"{name}[{i}]")
    else:
        yield name, tree


class Compiled(NamedTuple):
    """What a compilation yields, and what it said."""

    source: ASTSource
    shared: int
    asm: dict[str, Any]
    log: str


def compiled(launch: Launch, target: Target) -> Compiled:
    """Compile `launch` for `target`."""
    source, options = specialise(launch, target)
    with (
        tempfile.TemporaryDirectory() as scratch,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        redirect_stdout(StringIO()) as log,
    ):
        knobs.cache.dir = scratch
        knobs.nvidia.dump_ptxas_log = True
        result = triton.compile(source, target=target.gpu, options=vars(options))
        return Compiled(source, result.metadata.shared, dict(result.asm), log.getvalue())


def measured(results: Sequence[Compiled], target: Target) -> list[Binary]:
    """Read what came out of compilations for one target."""
    if target.gpu.backend == "cuda":
        codes = _disassembled(results)
        usages = [_cuda_usage(result.log, code) for result, code in zip(results, codes)]
    else:
        codes = [result.asm["amdgcn"] for result in results]
        usages = [_hip_usage(code) for code in codes]
    found: list[Binary] = []
    for result, code, usage in zip(results, codes, usages):
        loads, stores = _accesses(result.asm["llir"], result.source.signature)
        found.append(
            Binary(
                **usage,
                shared=result.shared,
                loads=loads,
                stores=stores,
                dots=_dots(result.asm["ttir"]),
                matrix=len(re.findall(target.matrix, code)),
                serialized="serialized" in result.log,
            )
        )
    return found


# --------------------------------------------------------------------------------- the final code

_INSTRUCTION = 16  # bytes


def _disassembled(results: Sequence[Compiled]) -> list[str]:
    """Return the instructions of each binary.

    The disassembler takes one file, and as long to start as for ten thousand instructions. So it is
    given those of all binaries, one after the other, which addresses tell apart.
    """
    codes = [_instructions(result.asm["cubin"]) for result in results]
    starts = [0, *accumulate(map(len, codes))]
    (architecture,) = {_found(r"\.target sm_(\w+)", result.asm["ptx"]) for result in results}
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-ndf", "-b", f"SM{architecture}", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines: list[list[str]] = [[] for _ in codes]
    for line in text.splitlines():
        if address := re.search(r"/\*([0-9a-f]{4,})\*/", line):
            lines[bisect_right(starts, int(address[1], 16)) - 1].append(line)
    for own, code in zip(lines, codes):
        assert len(own) == len(code) // _INSTRUCTION, "not one line per instruction"
    return ["\n".join(own) for own in lines]


def _instructions(cubin: bytes) -> bytes:
    """Return the one section with code of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, strings = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[strings][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def _cuda_usage(log: str, sass: str) -> dict[str, int]:
    widest = {"LD": 0, "ST": 0}
    for way, modifiers in re.findall(r"\b(LD|ST)G(?:STS)?\.(\S+)", sass):
        # LDG.E is 32 bits; LDG.E.U16, .64, .128, .ENL2.256 say theirs
        sizes = re.findall(r"\b[US]?(8|16|64|128|256)\b", modifiers)
        widest[way] = max(widest[way], int(sizes[-1]) if sizes else 32)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "widest_load": widest["LD"],
        "widest_store": widest["ST"],
    }


def _hip_usage(amdgcn: str) -> dict[str, int]:
    widest = {"load": 0, "store": 0}
    for way, unit, count in re.findall(
        r"\b(?:global|buffer|flat)_(load|store)_\w*?(dword|short|byte)(?:x(\d))?", amdgcn
    ):
        bits = {"dword": 32, "short": 16, "byte": 8}[unit] * int(count or 1)
        widest[way] = max(widest[way], bits)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", amdgcn),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", amdgcn),
        # scalar registers spill to lanes of vector registers, and show up there
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", amdgcn),
        "widest_load": widest["load"],
        "widest_store": widest["store"],
    }


def _number(pattern: str, text: str) -> int:
    return int(_found(pattern, text))


def _found(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text)  # one kernel, so one: anything else is a new format
    return found


def _dots(ttir: str) -> int:
    """Count the dots that belong on tensor cores: all but fp64 and fp32 that stays fp32."""
    dots = [line for line in ttir.splitlines() if " tt.dot" in line]
    fp64 = [dot for dot in dots if "xf64> *" in dot]
    fp32 = [dot for dot in dots if "xf32> *" in dot and not re.search("tf32|bf16x", dot)]
    return len(dots) - len(fp64) - len(fp32)


# -------------------------------------------------------------------------- accesses, by argument

_POINTER = re.compile(r"ptr addrspace\([18]\) (?:\[ )?(%[\w.]+)|\[ (%[\w.]+), %")
_ACCESS = [  # way, lanes, type of a lane
    re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d+))?\.b(\d+)\b"),  # PTX as inline assembly
    re.compile(r"\b(cp)\.async\.c[ag]\.shared\.global .*?, (0x\w+)()"),  # the same, in bytes
    re.compile(r"\.buffer\.(load|store)\.(?:v(\d+))?((?:i|f|bf)\d+)\("),  # AMD's intrinsics
    re.compile(r"\b(load|store) (?:<(\d+) x )?(\w+)"),  # LLVM's own
]
_BITS = {"": 8, "half": 16, "bfloat": 16, "float": 32, "double": 64}


def _accesses(llir: str, signature: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bits of the narrowest global load and store of each pointer argument."""
    lines = llir[llir.index("\ndefine ") + 1 :].splitlines()
    arguments = [leaf for name, tree in signature.items() for leaf in leaves(tree, name)]
    arguments = [(name, kind) for name, kind in arguments if kind != "constexpr"]
    names = {f"%{i}": name for i, (name, kind) in enumerate(arguments) if kind.startswith("*")}
    parameters = re.findall(r"ptr addrspace\(1\)[^%]* (%\d+)", lines[0])
    assert names.keys() <= set(parameters), "the kernel has not one parameter per argument"

    pointers = [[a or b for a, b in _POINTER.findall(line)] for line in lines]
    origins = {
        line.partition(" = ")[0].strip(): pointed
        for line, pointed in zip(lines, pointers)
        if " = " in line
    }
    loads: dict[str, int] = {}
    stores: dict[str, int] = {}
    for line, pointed in zip(lines, pointers):
        access = next(filter(None, (pattern.search(line) for pattern in _ACCESS)), None)
        if access is None or not pointed:
            continue
        way, lanes, kind = access.groups()
        bits = int(lanes or "1", 0) * (_BITS.get(kind) or int(kind.lstrip("ibf")))
        table = stores if way in ("st", "store") else loads
        for root in _roots(pointed[-1], origins):
            name = names.get(root, "?")
            table[name] = min(bits, table.get(name, bits))
    return loads, stores


def _roots(pointer: str, origins: dict[str, list[str]]) -> set[str]:
    """Follow address arithmetic, phis and selects back to the parameters they start from."""
    seen, todo = set[str](), [pointer]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += origins.get(name, [])
    return seen - origins.keys()
