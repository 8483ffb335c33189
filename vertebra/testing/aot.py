"""The compile gate: every kernel, compiled for every target on a machine without a GPU, and judged.

    python -m vertebra.testing.aot [--targets sm_90] [--typed sm_90] [--sampled sm_80]
                                   [--configurations sm_90] [-v]

The launches are those of declared cases, run on meta tensors through the ops' own Triton path,
forward and backward; launches that the JIT would serve with one binary are compiled once. For a
`--typed` target, one binary per kernel, layout, type and activation stands for those of other
shapes and optional arguments; for a `--sampled` one, one per kernel and layout. For those that
`--configurations` names, cases also run in every configuration that tuning would measure. A binary
fails if

* it spills: stack, local memory, scratch;
* it asks for more shared memory than the device has;
* it takes more registers (NVIDIA's, per thread) than `REGISTERS` in its module grants the kernel;
* it accesses a map in smaller pieces than memory allows: where all maps of a launch are contiguous
  along one axis, channels or pixels, v elements (the greatest power of two that divides offset and
  length of every run along that axis) or 128 bits are one access, unless a lane owns fewer. Its
  module may declare that a kernel's runs end with the row (`ROWS`), and which arguments it reads
  or writes element by element (`GATHERS`), both with the reason. Where it lists which blocks a lane
  shares each map's tile in (`TILES_OF_MAPS`), maps are judged one by one, by their channels;
* it has a dot that is not on tensor cores, or wgmmas that ptxas has serialized; or, in a kernel
  that its module lists in `FROM_SHARED`, wgmmas with an operand from registers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels._op import INTERPRETED
from ..kernels._triton import _aot
from ..kernels._triton._aot import Binary, Target, leaves
from ..kernels._triton._device import assumed
from ..kernels._triton._launch import Launch, granted
from .cases import Case, cases
from .launches import launches as launches_of
from .traffic import descriptors

# ------------------------------------------------------------------------------ what is compiled


def declared() -> list[Case]:
    """Return the cases to compile: real models' maps, every option once, then what is odd."""
    return cases("aot")


def launches(case: Case) -> list[Launch]:
    """Return what an H100 would launch for `case`: every gradient wanted, then only the maps'."""
    maps = tuple(name for name in case.differentiable if name not in case.subject.parameters)
    found: list[Launch] = []
    for wanted in dict.fromkeys((case.differentiable, maps)):
        _, forward, backward = launches_of(case, wanted)
        found += forward + backward
    return found


class Build(NamedTuple):
    """One binary to make, and the launches it serves, each with the case it came from."""

    key: str
    target: str
    launches: list[tuple[Launch, Case]]

    @property
    def launch(self) -> Launch:
        """One of the launches, which all compile to the same."""
        return self.launches[0][0]

    @property
    def row(self) -> tuple[str, str, str]:
        """Kernel, layout and dtype: the row of the table it belongs to."""
        tensors = [*descriptors(self.launch.arguments), *_tensors(self.launch).values()]
        first = next((t for t in tensors if t.dim() == 4), tensors[0])
        layout = contiguity(first)[0] if first.dim() == 4 else ""
        layout = self.launch.arguments.get("VIEW", layout)  # how boxes count pixels, if they do
        return self.launch.kernel.__name__, layout, str(first.dtype).removeprefix("torch.")

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the functions that the kernel is given: activations, summands."""
        values = dict(_arguments(self.launch)).values()
        return tuple(v.__name__ for v in values if hasattr(v, "__name__"))

    @property
    def label(self) -> str:
        """What tells it from the others: kernel, functions passed, arguments left out, a case."""
        absent = [f"-{name}" for name, v in _arguments(self.launch) if v is None]
        case = self.launches[0][1].id
        return " ".join([self.launch.kernel.__name__, *self.functions, *absent, f"({case})"])


def builds(
    targets: Iterable[str],
    of: Iterable[Case],
    only: str = "",
    configurations: Collection[str] = (),
) -> list[Build]:
    """Return the distinct binaries of the launches of cases, where the label contains `only`."""
    found: dict[tuple[str, str], Build] = {}
    for case in dict.fromkeys(of):
        same: list[Launch] | None = None
        for target in targets:
            with assumed(_aot.TARGETS[target].device) as asked:
                mine = launches(case) if same is None else same
                variants = case.subject.variants(case) if target in configurations else ()
                more = [launch for variant in variants for launch in launches(variant)]
            same = None if asked else mine
            for launch in (*mine, *more):
                key = _aot.identity(launch, _aot.TARGETS[target])
                build = found.setdefault((target, key), Build(key, target, []))
                build.launches.append((launch, case))
    return [build for build in found.values() if only in build.label]


def sample(
    of: Iterable[Build], sampled: Collection[str], typed: Collection[str] = ()
) -> Iterator[Build]:
    """Yield the builds, for some targets only the first of each kind: a real model's."""
    seen: set[tuple[Any, ...]] = set()
    for build in of:
        if build.target in sampled:
            kind = (build.target, *build.row[:2])
        elif build.target in typed:
            kind = (build.target, *build.row, build.functions)
        else:
            kind = (build.target, build.key)
        if kind not in seen:
            seen.add(kind)
            yield build


def binaries(
    todo: Sequence[Build], jobs: int, cache: Path | None
) -> Iterator[tuple[Build, Binary]]:
    """Yield every build with its binary: read from `cache`, or made, by `jobs` processes."""
    missing: dict[str, list[Build]] = defaultdict(list)
    for build in todo:
        kept = cache and cache / f"{build.key}.json"
        if kept and kept.exists():
            yield build, Binary(**json.loads(kept.read_text()))
        else:
            missing[build.target].append(build)
    if not missing:
        return
    parts = [
        some[i : i + _AT_ONCE] for some in missing.values() for i in range(0, len(some), _AT_ONCE)
    ]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        # of its launches, which compile to the same, a build takes one along
        made = {
            pool.submit(make, [b._replace(launches=b.launches[:1]) for b in part]): part
            for part in parts
        }
        for future in as_completed(made):
            for build, binary in zip(made[future], future.result(), strict=True):
                if cache:
                    cache.mkdir(parents=True, exist_ok=True)
                    (cache / f"{build.key}.json").write_text(json.dumps(binary._asdict()))
                yield build, binary


_AT_ONCE = 8  # builds: what is read of one binary and of eight takes as long


def make(part: Sequence[Build]) -> list[Binary]:
    """Compile builds for one target."""
    target = _aot.TARGETS[part[0].target]
    results: list[_aot.Compiled] = []
    for build in part:
        try:
            results.append(_aot.compiled(build.launch, target))
        except Exception as error:
            raise RuntimeError(f"{build.target}: {build.label} does not compile") from error
    return _aot.measured(results, target)


# ------------------------------------------------------------------------------ how it is judged


def _arguments(launch: Launch) -> Iterator[tuple[str, Any]]:
    for name, tree in launch.arguments.items():
        yield from leaves(tree, name)


def _tensors(launch: Launch) -> dict[str, Tensor]:
    return {name: value for name, value in _arguments(launch) if isinstance(value, Tensor)}


def contiguity(t: Tensor, *, by_rows: bool = False) -> tuple[str, int]:
    """Return the axis that is contiguous in memory, and what divides its runs' offsets and lengths.

    Runs of pixels are as long as memory allows, or end with the row.

    >>> contiguity(torch.empty(2, 24, 5, 5).to(memory_format=torch.channels_last))
    ('channels', 24)
    >>> contiguity(torch.empty(2, 24, 14, 14))
    ('pixels', 196)
    >>> contiguity(torch.empty(2, 24, 14, 14), by_rows=True)
    ('pixels', 14)
    """
    C = t.shape[1]
    pixels = sorted((t.stride(d), t.shape[d]) for d in (0, 2, 3) if t.shape[d] > 1)
    if C > 1 and t.stride(1) == 1:
        axis, length, others = "channels", C, [stride for stride, _ in pixels]
    else:
        axis, length = "pixels", 1
        while pixels and pixels[0][0] == length:
            length *= pixels.pop(0)[1]
            if by_rows:
                break
        others = [stride for stride, _ in pixels] + [t.stride(1)] * (C > 1)
    return axis, math.gcd(length, t.storage_offset(), *others)


def required_bits(launch: Launch, target: Target) -> dict[str, int]:
    """Return how wide every access of each map must at least be; the module docstring says why."""
    kernel, module = launch.kernel.__name__, sys.modules[launch.kernel.__module__]
    lanes = launch.arguments["num_warps"] * target.gpu.warp_size
    if (tiles := getattr(module, "TILES_OF_MAPS", {}).get(kernel)) is not None:
        return _required_bits_by_channels(launch, tiles, lanes)
    gathered = getattr(module, "GATHERS", {}).get(kernel, ())
    by_rows = kernel in getattr(module, "ROWS", ())
    maps = {
        name: t
        for name, t in _tensors(launch).items()
        if t.dim() == 4 and name.partition("[")[0] not in gathered
    }
    C = max((t.shape[1] for t in maps.values()), default=0)
    maps = {name: t for name, t in maps.items() if t.shape[1] == C}  # not values per pixel
    runs = [contiguity(t, by_rows=by_rows) for t in maps.values()]
    axes, divisors = zip(*runs, strict=True) if runs else ((), ())
    elements = math.gcd(16, *divisors) if len(set(axes)) == 1 else 1
    blocks = [size for name, size in launch.arguments.items() if name.startswith("BLOCK")]
    elements = min(elements, max(1, math.prod(blocks) // lanes))
    return {name: min(128, 8 * t.itemsize * elements) for name, t in maps.items()}


def _required_bits_by_channels(
    launch: Launch, tiles: dict[str, tuple[str, ...]], lanes: int
) -> dict[str, int]:
    found: dict[str, int] = {}
    maps = _tensors(launch)
    for name in tiles.keys() & maps.keys():
        axis, divisor = contiguity(maps[name])
        elements = math.gcd(16, divisor) if axis == "channels" else 1
        of_lane = math.prod(launch.arguments[block] for block in tiles[name]) // lanes
        found[name] = min(128, 8 * maps[name].itemsize * min(elements, max(1, of_lane)))
    return found


def failures(build: Build, binary: Binary) -> list[str]:
    """Return what is wrong with a binary, in words."""
    target = _aot.TARGETS[build.target]
    found: list[str] = []
    if binary.stack or binary.spills:
        found.append(f"spills: {binary.stack} bytes of stack, {binary.spills} accesses")
    if binary.shared > target.shared:
        found.append(f"{binary.shared} bytes of shared memory, of {target.shared}")
    budget = granted(build.launch.kernel, "REGISTERS")
    if budget and target.gpu.backend == "cuda" and binary.registers > budget:
        found.append(f"{binary.registers} registers, of {budget}")

    required: dict[str, tuple[int, str]] = {}
    for launch, case in build.launches:
        for name, bits in required_bits(launch, target).items():
            required[name] = max((bits, case.id), required.get(name, (0, "")))
    accesses = (("loads", binary.loads), ("stores", binary.stores))
    narrow: dict[tuple[int, int, str], list[str]] = defaultdict(list)
    for name, (bits, case) in required.items():
        if not any(name in width for _, width in accesses):
            found.append(f"no access of {name}: a needless argument, or the gate is blind")
        for way, width in accesses:
            # AMD's matrix units leave four results to a lane, and triton stores them from there
            of_four = way == "stores" and binary.dots > 0 and target.gpu.backend == "hip"
            if width.get(name, bits) < (min(bits, 64) if of_four else bits):
                narrow[width[name], bits, case].append(f"{way} {name}")
    for (bits, allowed, case), names in narrow.items():
        which = ", ".join(sorted(names))
        found.append(f"{which} {bits} bits at a time; {case} allows {allowed}")
    final = (binary.widest_load, binary.widest_store)
    for (way, width), widest in zip(accesses, final, strict=True):
        if widest < max(width.values(), default=0):
            found.append(f"{way} at most {widest} bits at a time in the final code: not {width}")

    if binary.dots and not binary.matrix:
        found.append(f"{binary.dots} dots and no matrix instruction {target.matrix}")
    if binary.from_registers and build.launch.kernel.__name__ in getattr(
        sys.modules[build.launch.kernel.__module__], "FROM_SHARED", ()
    ):
        found.append(f"{binary.from_registers} of {binary.matrix} wgmmas read registers")
    if binary.serialized:
        found.append("ptxas has serialized its wgmmas")
    return found


# ------------------------------------------------------------------------------- how it is shown


def table(results: Sequence[tuple[Build, Binary]]) -> str:
    """Return one line per kernel, layout and dtype: the worst of its binaries."""
    targets = list(dict.fromkeys(build.target for build, _ in results))
    rows: dict[tuple[str, ...], list[tuple[Build, Binary]]] = defaultdict(list)
    for build, binary in results:
        rows[build.row].append((build, binary))
    head = ("kernel", "layout", "dtype", "", *targets, "spills", "shared", "bits", "mma")
    lines: list[tuple[str, ...]] = [head]
    for row, members in sorted(rows.items()):
        registers = {target: 0 for target in targets}
        bits: set[int] = set()
        for build, binary in members:
            registers[build.target] = max(registers[build.target], binary.registers)
            for name in required_bits(build.launch, _aot.TARGETS[build.target]):
                bits.update(t[name] for t in (binary.loads, binary.stores) if name in t)
        made = [binary for _, binary in members]
        lines.append(
            (
                *row,
                f"{len(made)}x",
                *map(str, registers.values()),
                str(sum(b.stack + b.spills > 0 for b in made)),
                str(max(b.shared for b in made)),
                "/".join(map(str, sorted(bits, reverse=True))),
                str(max(b.matrix for b in made)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def complaints(results: Sequence[tuple[Build, Binary]]) -> str:
    """Return the failures, each once, with the targets it is seen on; empty if there is none."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for build, binary in results:
        for failure in failures(build, binary):
            found[build.label][failure].append(build.target)
    return "\n".join(
        f"FAIL {label}\n"
        + "\n".join(f"     {failure} ({', '.join(on)})" for failure, on in reasons.items())
        for label, reasons in found.items()
    )


def _watched(results: Iterator[tuple[Build, Binary]], total: int) -> Iterable[tuple[Build, Binary]]:
    """Show progress where somebody is watching and rich is installed."""
    if not sys.stderr.isatty():
        return results
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return results
    return track(results, "compiling", total, console=Console(stderr=True), transient=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gate; return 1 if a binary fails it."""
    parser = argparse.ArgumentParser(
        "python -m vertebra.testing.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=_aot.TARGETS, default=list(_aot.TARGETS))
    parser.add_argument(
        "--typed",
        nargs="+",
        choices=_aot.TARGETS,
        default=[],
        help="one binary per kernel, layout, type and activation",
    )
    parser.add_argument(
        "--sampled",
        nargs="+",
        choices=_aot.TARGETS,
        default=[],
        help="one binary per kernel and layout",
    )
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=_aot.TARGETS,
        default=[],
        help="every configuration that tuning would measure",
    )
    parser.add_argument("--filter", default="", help="only binaries whose label contains this")
    parser.add_argument("--jobs", type=int, default=cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=Path(".cache/aot"))
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None)
    parser.add_argument("--json", type=Path, help="write what was measured, binary by binary")
    parser.add_argument("-v", "--verbose", action="store_true", help="print it")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error(
            "TRITON_INTERPRET is set: kernels are then Python functions, with nothing to compile; "
            "set TRITON_INTERPRET=0"
        )

    start = time.perf_counter()
    todo = builds(options.targets, declared(), options.filter, options.configurations)
    todo = list(sample(todo, options.sampled, options.typed))
    if not todo:
        parser.error(f"no binary's label contains {options.filter!r}")
    results = list(_watched(binaries(todo, options.jobs, options.cache), len(todo)))
    order = list(_aot.TARGETS)
    results.sort(key=lambda r: (r[0].row, r[0].label, order.index(r[0].target)))
    rows = [
        {"target": build.target, "label": build.label, **binary._asdict()}
        for build, binary in results
    ]
    if options.json:
        options.json.write_text(json.dumps({"triton": _aot.VERSION, "binaries": rows}, indent=1))
    for row in rows if options.verbose else ():
        print(*row.values())
    print(f"triton {_aot.VERSION}: {len(todo)} binaries, {time.perf_counter() - start:.0f} s")
    print(table(results))
    wrong = complaints(results)
    print(wrong or "every binary passes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
