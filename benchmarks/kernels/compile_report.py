"""What machine code do the kernels become? Compiles every launch of the benches' shapes, without a GPU, and prints a table.

    python benchmarks/kernels/compile_report.py [--only op,op] [--arch 90] [--config N|all] [--sass DIR]

A line is one compiled kernel: the configuration it came from, warps, stages, registers, stack and spilled bytes of a thread,
shared memory of a block, blocks that one multiprocessor holds; in the main loop, for one warp and one turn, the tensor-core
products, the waits for them, special functions (exponentials) and float32 instructions; the widest read and write of global
memory; what ptxas warns of (C7510 = products serialized). It says how code is made, not how fast it is.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("kernel", "configuration", "warps", "stages", "regs", "stack", "spill", "shared", "blocks", "products", "waits",
           "special", "float", "loop", "all", "load", "store", "problems")  # fmt: skip


def main() -> int:
    """Print the table; 1 when something did not compile or, with --check, when a kernel has a problem."""
    options = _options()
    from compile_launches import Recorder, launches

    before = _read_listings(options.same_as)  # now: --sass may write into the same folder
    recorder = Recorder(arch=options.arch, only=options.kernel).install()
    clock, failed, done = time.perf_counter(), [], 0
    _say_versions(options.arch)
    for op in options.only:
        for launch in launches(op):
            if options.shape not in launch.shape:
                continue
            for config in _configs(options.config, launch.configs):
                recorder.place = (op, launch.shape, "chosen" if config is None else _plain(config))
                problem = _compile(launch.run, config)
                failed += [f"{op} {launch.shape} {recorder.place[2]}: {problem}"] if problem else []
            done = _print_from(done, recorder.found, options.sass, trace=options.trace)
    for line in failed:
        print(line)
    bad = [one for one in recorder.found if one.code.problems]
    print(f"{len(recorder.found)} kernels, {len(bad)} with a problem, {len(failed)} left out, "
          f"{time.perf_counter() - clock:.0f} s")  # fmt: skip
    if options.same_as:
        _compare(recorder.found, before, options.same_as)
    if not recorder.found:
        print("no kernel was compiled: expected at least one; try without --kernel and --shape", file=sys.stderr)
        return 2
    return 1 if any("refused" not in line for line in failed) or (options.check and bad) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of ops with commas between; default: all")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 = Hopper")
    parser.add_argument(
        "--config", default="", help="number of a configuration in CONFIGS, or all; default: the chosen one"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--shape", default="", help="only shapes whose line has this in it")
    parser.add_argument("--sass", type=Path, help="write each kernel's disassembly into this folder")
    parser.add_argument(
        "--same-as",
        type=Path,
        metavar="DIR",
        help="say which kernels are not what --sass wrote into this folder before",
    )
    parser.add_argument(
        "--trace", action="store_true", help="print the order of each main loop: products, waits, copies"
    )
    parser.add_argument("--check", action="store_true", help="leave with 1 when a kernel spills, waits or does not fit")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from compile_launches import LAUNCHES
        from compiled_code import LIMITS
    except ImportError as error:
        sys.exit(
            f"{error.name or error}: expected torch and triton, because they compile the kernels; try the torch extra"
        )
    options.only = [name for name in options.only.split(",") if name] or list(LAUNCHES)
    for name in options.only:
        if name not in LAUNCHES:
            sys.exit(f"only = {name!r}: expected one of {', '.join(LAUNCHES)}, because these have launches here")
    if options.arch not in LIMITS:
        sys.exit(
            f"arch = {options.arch}: expected one of {', '.join(map(str, LIMITS))}, because their limits are known"
        )
    if options.sass and options.sass.exists() and not options.sass.is_dir():
        sys.exit(f"sass = {options.sass}: expected a folder, because each kernel is a file in it; try another name")
    if options.same_as and not any(options.same_as.glob("*.sass")):
        sys.exit(
            f"same_as = {options.same_as}: expected a folder that --sass wrote, because kernels are compared with those; "
            "try --sass on the commit before"
        )
    if options.config not in ("", "all") and not options.config.isdigit():
        sys.exit(f"config = {options.config!r}: expected a number or all, because it is a place in CONFIGS")
    return options


def _configs(asked: str, configs: Any) -> Iterator[Any]:
    if not asked:
        yield None
    elif asked == "all":
        yield from configs
    elif int(asked) < len(configs):
        yield configs[int(asked)]


def _compile(run: Any, config: Any) -> str:
    """Compile what one call launches; return what went wrong, in a line. "refused" is the op's own word on a configuration."""
    from triton.compiler.errors import CompilationError

    from tessera_shared.errors import TesseraError

    try:
        run(config)
    except TesseraError as error:
        return f"refused: {error}"
    except CompilationError as error:
        return f"does not compile: {_last(error)}"
    except (RuntimeError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {_last(error)}"
    return ""


def _last(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def _print_from(done: int, found: list[Any], sass: Path | None, *, trace: bool) -> int:
    """Print what is new since the last call; the shape stands above its kernels."""
    shape = ""
    for one in found[done:]:
        if one.shape != shape:
            shape = one.shape
            print(f"\n{one.op}  {shape}\n  " + "  ".join(f"{name:>{_width(name)}}" for name in COLUMNS))
        print("  " + "  ".join(f"{text:>{_width(name)}}" for name, text in zip(COLUMNS, _cells(one), strict=True)))
        print(f"      {one.constants}", flush=True)
        if trace:
            print(f"      {one.code.order}", flush=True)
        if sass:
            _write_sass(one, sass, found.index(one))
    return len(found)


def _cells(one: Any) -> list[str]:
    code = one.code
    numbers = [code.warps, one.stages, code.registers, code.stack, code.spill, code.shared, code.blocks, code.wgmma, code.waits,
               code.loop["MUFU"], code.float_work,
               sum(code.loop.values()), code.size]  # fmt: skip
    problems = "; ".join(code.problems) or "none"
    return [one.kernel, one.config, *map(str, numbers), code.load, code.store, problems]


def _width(name: str) -> int:
    return {"kernel": 18, "configuration": 30, "load": 7, "store": 7}.get(name, max(5, len(name)))


def _write_sass(one: Any, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:03d}_{one.kernel}.sass").write_text(_listing(one), encoding="utf-8")


def _listing(one: Any) -> str:
    """Return what a kernel is for, in two lines, and its disassembly."""
    from compile_launches import TOOLS
    from compiled_code import sass_of

    return f"{one.op} {one.shape} {one.config}\n{one.constants}\n{sass_of(one.sass(), TOOLS)}"


Listings = dict[tuple[str, str], list[list[str]]]
"""Instructions of kernels by what they are for: shape and configuration, constants."""


def _read_listings(folder: Path | None) -> Listings:
    """Return what --sass wrote into a folder. A file that it did not write is like no kernel."""
    found: Listings = {}
    for path in sorted(folder.glob("*.sass")) if folder else []:
        place, code = _parsed(path.read_text(encoding="utf-8", errors="replace"))
        found.setdefault(place, []).append(code)
    return found


def _parsed(listing: str) -> tuple[tuple[str, str], list[str]]:
    from compiled_code import encoded

    shape, constants, *lines = [*listing.splitlines(), "", ""]
    return (shape, constants), encoded(lines)


def _compare(found: list[Any], before: Listings, folder: Path) -> None:
    """Print how many kernels are, instruction for instruction, what another commit wrote; name the others."""
    other = []
    for one in found:
        place, code = _parsed(_listing(one))
        if code not in before.get(place, []):
            other.append("  " + "  ".join((one.kernel, *place)))
    print(f"{len(found) - len(other)} of {len(found)} kernels are what {folder} has", *other, sep="\n")


def _plain(config: Any) -> str:
    values = config if isinstance(config, tuple) else vars(config).values()
    return str(tuple(tuple(value) if isinstance(value, tuple) else value for value in values)).replace(" ", "")


def _say_versions(arch: int) -> None:
    import torch
    import triton

    print(f"sm_{arch}, triton {triton.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
