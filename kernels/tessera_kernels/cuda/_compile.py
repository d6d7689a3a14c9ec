"""From a kernel's source to a file that can be loaded: a cubin by NVRTC, or the emulator's library by a C++ compiler.

Both lie in the user's cache, named by the hash of all that decides them: source, headers, defines, target, compiler. A
file appears whole or not at all, and goes when nobody used it for a month; where nothing can be kept they live in a
directory that ends with the process.
"""

import atexit
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tessera_shared.atomic import replace_file
from tessera_shared.errors import KernelError, MissingDependency
from tessera_shared.user_cache import cache_folder, forget_unused, mark_used

HERE = Path(__file__).parent

ARCHS = ("sm_90a", "sm_80")
"""What `build` compiles for. A cubin of sm_80 runs on 8.x, one of sm_90a on 9.0 alone."""

EMULATOR_FLAGS = (
    "-std=c++17", "-fPIC", "-w", "-DTESSERA_EMULATED",
    "-fvisibility=hidden",  # many kernels, and versions of one, live in one process
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off",  # shared memory is read as any type, as on a GPU
    "-ftrivial-auto-var-init=pattern",  # a register that was never written is -1.7e38 and not what it was by luck
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One specialization of one kernel: a file of this folder (or a path), the entry's name, and what is #defined."""

    file: str
    entry: str
    defines: tuple[tuple[str, str | int], ...] = ()
    needs: str = "sm_80"  # or "sm_90a": runs there alone

    @property
    def path(self) -> Path:
        """Return where the source is."""
        return HERE / self.file

    @property
    def title(self) -> str:
        """Return what a person calls it."""
        return " ".join([self.entry, *(f"{name}={value}" for name, value in self.defines)])

    def archs(self) -> tuple[str, ...]:
        """Return those of `ARCHS` that it can be compiled for."""
        return tuple(arch for arch in ARCHS if self.needs in ("sm_80", arch))


@dataclass(frozen=True, kw_only=True)
class Built:
    """A cubin and what the assembler said of it."""

    path: Path
    registers: int  # of one thread
    stack_bytes: int  # of one thread; 0 = everything lies in registers
    spill_bytes: int  # stored and loaded again because registers ran out
    seconds: float  # 0 = it was there
    slow: str = ""  # what keeps the assembler from overlapping warpgroup products; empty = nothing


def build(kernel: Kernel, arch: str) -> Built:
    """Return the cubin of `kernel` for `arch`, compiled unless the cache has it. Needs no GPU.

    Raises `KernelError` with file, line and message for source that does not compile, `MissingDependency` without NVRTC.
    """
    nvrtc = _nvrtc()
    options = _options(kernel, arch)
    sources = [kernel.path, *HERE.glob("*.cuh")]
    path = _folder() / f"{kernel.entry}-{_key(sources, [*options, _nvrtc_version()])}.cubin"
    known = _told(path)
    if known is not None:
        return known
    _forget(path.parent)
    clock = time.perf_counter()
    cubin, log = _compile(nvrtc, kernel, options)
    told = _resources(log)
    replace_file(path.with_suffix(".json"), json.dumps(told).encode())
    replace_file(path, cubin)
    return Built(path=path, seconds=time.perf_counter() - clock, **told)


def build_emulated(kernel: Kernel) -> Path:
    """Return the library that runs `kernel` on the CPU, compiled unless the cache has it.

    Raises `KernelError` for source that does not compile, `MissingDependency` without a C++ compiler.
    """
    emulator, defines = _emulator(), _defines(kernel)
    sources = [kernel.path, *HERE.glob("*.cuh")]  # other headers decide the emulator's name
    path = _folder() / f"{kernel.entry}-{_key(sources, [emulator.name, *defines])}.so"
    if path.exists():
        mark_used(path)
    else:
        _forget(path.parent)
        inputs = ["-O1", *defines, "-shared", f"-I{HERE}", "-xc++", str(kernel.path), "-xnone", str(emulator)]
        _compile_on_host(path, inputs, kernel.title, kernel.file)
    return path


@functools.cache
def _emulator() -> Path:
    """Return the emulator's object file, which every emulated kernel is linked with."""
    version = [_host_compiler()[1], platform.machine()]
    sources = [HERE / "emulator.cpp", *HERE.glob("*.hpp")]
    path = _folder() / f"emulator-{_key(sources, [*EMULATOR_FLAGS, *version])}.o"
    if path.exists():
        mark_used(path)
    else:
        _compile_on_host(path, ["-O2", "-c", str(HERE / "emulator.cpp")], "the emulator", "emulator.cpp")
    return path


def _compile_on_host(path: Path, inputs: list[str], title: str, file: str) -> None:
    with tempfile.TemporaryDirectory(prefix="tessera-cuda-") as folder:
        made = Path(folder) / path.name
        command = [_host_compiler()[0], *EMULATOR_FLAGS, *inputs, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pattern = r"^(?P<file>[^:\n]+):(?P<line>\d+):.*?error: (?P<text>.*)$"
            raise _refused(title, file, "the emulator", done.stderr, pattern)
        replace_file(path, made.read_bytes())


def _defines(kernel: Kernel) -> list[str]:
    return [f"-D{name}={value}" for name, value in kernel.defines]


def _options(kernel: Kernel, arch: str) -> list[str]:
    return [
        f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--generate-line-info", "--ptxas-options=-v",
        *_defines(kernel),
    ]  # fmt: skip


def _key(sources: Iterable[Path], rest: list[str]) -> str:
    digest = hashlib.sha256("\0".join(rest).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def _folder() -> Path:
    """Return where compiled files lie; a folder of this process alone where the user's cache cannot be written."""
    folder = cache_folder("cuda")
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    temporary = tempfile.mkdtemp(prefix="tessera-cuda-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


@functools.cache
def _forget(folder: Path) -> None:
    """Once in a process that compiles: remove what nobody used."""
    forget_unused(folder)


def _nvrtc() -> Any:
    try:
        return import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise MissingDependency(
            "cuda.bindings = not installed: expected the package cuda-bindings, because kernels are compiled by the NVRTC "
            "that it wraps; try installing tessera-testbed[torch] on Linux, or kernels='triton'"
        ) from error


@functools.cache
def _nvrtc_version() -> str:
    try:
        _, major, minor = _nvrtc().nvrtcVersion()
    except RuntimeError as error:  # what cuda-bindings raises when it finds no library
        raise MissingDependency(
            "libnvrtc = not found: expected NVRTC of CUDA 12 or 13, because kernels are compiled by it; "
            "try installing nvidia-cuda-nvrtc"
        ) from error
    return f"nvrtc {major}.{minor}"


def _compile(nvrtc: Any, kernel: Kernel, options: list[str]) -> tuple[bytes, str]:
    """Return the cubin and the compiler's log."""
    status, program = nvrtc.nvrtcCreateProgram(kernel.path.read_bytes(), kernel.file.encode(), 0, [], [])
    given = [option.encode() for option in [*options, f"-I{HERE}"]]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, text)
        log = text.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            pattern = r"^(?P<file>.+)\((?P<line>\d+)\): .*?error.*?: (?P<text>.*)$"
            raise _refused(kernel.title, kernel.file, options[0].rpartition("=")[2], log or str(status), pattern)
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _refused(title: str, file: str, target: str, log: str, pattern: str) -> KernelError:
    found = re.search(pattern, log, re.MULTILINE)
    if found:
        where, what = f"{Path(found['file']).name}:{found['line']}", found["text"]
    else:
        where, what = file, next((line for line in log.splitlines() if "rror" in line), log[:300])
    return KernelError(
        f"{where} = {' '.join(what.split())}: expected source that compiles for {target}, because {title} is built from "
        "it; try the line that is named"
    )


def _resources(log: str) -> dict[str, Any]:
    """Read what ptxas says of the kernel; of several functions the largest numbers."""
    slow = re.search(r"\(C75\d\d\) (.*)", log)

    def most(pattern: str) -> int:
        return max((sum(int(n) for n in found.groups()) for found in re.finditer(pattern, log)), default=0)

    return {
        "registers": most(r"Used (\d+) registers"),
        "stack_bytes": most(r"(\d+) bytes stack frame"),
        "spill_bytes": most(r"(\d+) bytes spill stores, (\d+) bytes spill loads"),
        "slow": slow[1].strip() if slow else "",
    }


def _told(path: Path) -> Built | None:
    """Return what was built before, or None."""
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for used in (path, path.with_suffix(".json")):
            mark_used(used)
        return Built(path=path, seconds=0.0, **told) if path.exists() else None
    except (OSError, ValueError, TypeError):
        return None


@functools.cache
def _host_compiler() -> tuple[str, str]:
    """Return the C++ compiler and the line it says of itself."""
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        raise MissingDependency(
            "c++ = not found: expected a C++ compiler, because a CUDA kernel on the CPU runs in an emulator that is compiled "
            "with it; try installing g++ 12 or newer, or kernels='reference'"
        )
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return found, said.partition("\n")[0]
