"""Compile the FlashInfer modules that the benches call, without a GPU, and pack them as the wheel that FlashInfer looks for.

    FLASHINFER_CUDA_ARCH_LIST=9.0a CUDA_HOME=... python benchmarks/kernels/prebuild_flashinfer.py .whl

Compiling them takes about half an hour of one core, on a lent machine of sixteen some minutes before anything can be timed.
Needs flashinfer-python of `peers.txt` with its needs, ninja, a C++ compiler and CUDA 13.0's nvcc (README.md says which wheels
hold it); MAX_JOBS says how many compilers run at a time. What is built already is not built again. The wheel is
`flashinfer_jit_cache`, FlashInfer's own name for such a package; a library that does not load is compiled there as usual.
"""

import argparse
import base64
import hashlib
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = "flashinfer_jit_cache"
XQA = ((16, 4, 128), (64, 4, 128), (128, 4, 128), (16, 8, 128), (16, 1, 128), (16, 2, 64))
"""Page size, query heads of a key/value head, head width: `bench_paged_attention.DECODE`."""


def specs() -> Iterator[Any]:
    """Yield what FlashInfer would compile at the first call of each wrapper in `bench_paged_attention` and `bench_sample`."""
    import torch
    from flashinfer.jit.attention.modules import (
        gen_batch_attention_module,
        gen_batch_decode_module,
        gen_batch_prefill_module,
    )
    from flashinfer.jit.sampling import gen_sampling_module
    from flashinfer.jit.xqa import gen_xqa_module

    types = (torch.bfloat16,) * 3 + (torch.int32,)
    yield gen_sampling_module()
    for width in (128, 64):
        yield gen_batch_decode_module(*types, width, width, 0, False, False)
        yield gen_batch_attention_module(*types, width, width, 0, False, False)
        for path in ("fa2", "fa3"):
            yield gen_batch_prefill_module(path, *types, width, width, 0, False, False, False)
    for page, group, width in XQA:
        yield gen_xqa_module(torch.bfloat16, torch.bfloat16, page, width, group, False, torch.bfloat16, 1)


def main() -> int:
    """Build, then pack; 1 if a module does not compile (the others are packed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    options = parser.parse_args()
    libraries, failed = [], 0
    for spec in specs():
        clock = time.perf_counter()
        try:
            spec.build(False)
        except RuntimeError as error:
            print(f"{spec.name}: {str(error).strip().splitlines()[-1][:200]}", file=sys.stderr, flush=True)
            failed = 1
            continue
        libraries.append(spec.jit_library_path)
        size = spec.jit_library_path.stat().st_size / 2**20
        print(f"{spec.name[:70]:70} {size:6.1f} MiB {time.perf_counter() - clock:5.0f} s", flush=True)
    wheel = pack(libraries, options.folder, version("flashinfer-python"))
    print(f"{wheel.name}: {len(libraries)} libraries, {wheel.stat().st_size / 2**20:.1f} MiB")
    return failed


def pack(libraries: list[Path], folder: Path, number: str) -> Path:
    """Write a wheel that holds name/name.so for each library."""
    init = (
        "from pathlib import Path\n\n"
        f'__version__ = "{number}"\n\n\n'
        "def get_jit_cache_dir():\n    return str(Path(__file__).parent / 'jit_cache')\n"
    )
    info = f"{PACKAGE}-{number}.dist-info"
    entries = {f"{PACKAGE}/__init__.py": init.encode()}
    entries |= {f"{PACKAGE}/jit_cache/{path.stem}/{path.name}": path.read_bytes() for path in libraries}
    entries[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {number}\n".encode()
    entries[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tessera\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in entries.items()]
    entries[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{PACKAGE}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
