"""The emulator that runs CUDA kernels on the CPU: each kind of missing synchronization made visible, and what a GPU would hang
or fault at told in one line.
"""

import re
from pathlib import Path

import pytest
import torch

from tessera_kernels.cuda import _launch
from tessera_kernels.cuda._launch import Int64
from tessera_parity.loading import FreshModules
from tessera_shared.errors import KernelError, MissingDependency

from .cuda_probe import NEEDS_COMPILER, Probe, random

pytestmark = NEEDS_COMPILER

TWICE = """
    float* tile = reinterpret_cast<float*>(shared);
    tile[t] = x[t];
    {wait}
    y[t] = tile[127 - t];"""

COPY = """
    float* tile = reinterpret_cast<float*>(shared);
    for (int round = 0; round < 2; ++round) {{
        if (t < 32) copy_16(shared_address(tile + 4 * t), x + 128 * round + 4 * t, 16);
        copy_commit();
        {wait}
        sync_threads();
        y[128 * round + t] = tile[127 - t];
        {reuse}
    }}"""

BULK = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 2048);
    float* tile = reinterpret_cast<float*>(shared);
    if (t == 0) {{ barrier_init(full, 1); barrier_init_done(); }}
    sync_threads();
    for (int round = 0; round < 2; ++round) {{
        if (t == 0) {{ barrier_expect(full, 512); load_bulk(tile, x + 128 * round, full, 512); }}
        {wait}
        y[128 * round + t] = tile[127 - t];
        {reuse}
    }}"""

PRODUCT = """
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared);
    for (int i = t; i < 8192; i += 128) tile[i] = rounded<bf16>(1.0f).bits;
    {proxy}
    sync_threads();
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 0.0f;
    group_fence();
    group_product<bf16, 64>(d, tile_descriptor(shared_address(shared), 0), tile_descriptor(shared_address(shared) + 8192, 0), 0);
    group_commit();
    {wait}
    sync_threads();
    for (int i = t; i < 8192; i += 128) tile[i] = 0;
    {late}
    y[t] = d[0] - 16.0f + x[t];
    y[128 + t] = x[128 + t];"""

RIGHT = {
    "twice": (TWICE, {"wait": "sync_threads();"}),
    "copy": (COPY, {"wait": "copy_wait<0>();", "reuse": "sync_threads();"}),
    "bulk": (BULK, {"wait": "barrier_wait(full, round);", "reuse": "sync_threads();"}),
    "product": (PRODUCT, {"proxy": "fence_for_engine();", "wait": "group_wait<0>();", "late": ""}),
}

MISSING = [
    ("twice", "wait", "sync_warp();"),  # a barrier of a warp where one of the block is needed
    ("twice", "wait", ""),
    ("copy", "wait", ""),
    ("copy", "reuse", ""),  # the buffer is filled again while others read it
    ("bulk", "wait", "sync_threads();"),
    ("bulk", "reuse", ""),
    ("product", "proxy", ""),  # ordinary stores that the tensor cores were not told of
    ("product", "wait", ""),
]


def _outcome(probe: Probe, name: str, changes: dict[str, str]) -> str:
    """Run a sketch several times; return what is wrong, or nothing."""
    sketch, parts = RIGHT[name]
    x, wrong = random(256), ""
    for _ in range(4):  # each launch orders threads and copies in another way
        y = torch.full((256,), torch.nan)
        try:
            probe("const float* x, float* y", sketch.format(**(parts | changes)), [x, y])
        except KernelError as error:
            return str(error)
        flipped = x.view(2, 128).flip(1).reshape(-1)
        wanted = x if name == "product" else torch.cat([flipped[:128], y[128:]]) if name == "twice" else flipped
        wrong += "" if torch.equal(y.nan_to_num(), wanted.nan_to_num()) and not y[:128].isnan().any() else "numbers"
    return wrong


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_synchronized_is_right(probe: Probe, name: str) -> None:
    assert _outcome(probe, name, {}) == ""


@pytest.mark.parametrize(("name", "part", "instead"), MISSING)
def test_what_is_not_synchronized_shows(probe: Probe, name: str, part: str, instead: str) -> None:
    assert _outcome(probe, name, {part: instead}) != ""


def test_a_product_that_is_waited_for_too_late_shows(probe: Probe) -> None:
    """The tile is overwritten before the wait: a product reads when it likes until then."""
    assert _outcome(probe, "product", {"wait": "", "late": "fence_for_engine(); group_wait<0>();"}) == 4 * "numbers"


FAULTS = {
    "threads 0-31 wait for barrier 1 .32 of 64": "if (warp == 0) sync_some(1, 64);",
    "among .. threads, while others count": "if (warp < 2) sync_some(1, warp == 0 ? 64 : 96);",
    "whole warps of this block are counted": "sync_some(1, 100);",
    "a kernel names 1 to 15": "sync_some(0, 128);",
    "only some lanes of a warp arrived": "if (warp < 2 && lane < 16) arrive_some(1, 32);",
    "arrives twice in one round": "arrive_some(1, 64); arrive_some(1, 64);",
    "threads 0-15 ended; threads 16-31 wait for shuffle_xor": "if (lane > 15) x[t] = shuffle_xor(1.0f, 1);",
    "while other lanes of warp . are in": "if (lane > 15) sync_warp(); else x[t] = shuffle_xor(1.0f, 1);",
    "not initialized": "if (t == 0) barrier_arrive(b);",
    "initialized a second time": "barrier_init(b, 1);",
    "waits for parity 0 of the barrier at shared byte 2048 .in phase 0, 2 of 2": "if (t == 0) { barrier_init(b, 2); barrier_wait(b, 0); }",
    "more than 1 arrivals in one phase": "if (t == 0) { barrier_init(b, 1); barrier_expect(b, 16); barrier_arrive(b); }",
    "was overwritten": "if (t == 0) { barrier_init(b, 1); *b = 0; barrier_arrive(b); }",
    "no barrier_init_done followed": "if (t == 0) { barrier_init(b, 1); load_bulk(shared, x, b, 16); }",
    "1 boxes under way": "if (t == 0) { barrier_init(b, 1); barrier_init_done(); load_bulk(shared, x, b, 16); }",
    "a tensor map that tensor_map of _launch.py did not make": "TensorMap map{}; prefetch_map(&map);",
    "shared bytes 98304 to 98320, but the block has 98304": "copy_16(shared_address(shared) + 98304, x, 16);",
    "ldmatrix: shared byte 8, not a multiple of 16": "uint32_t to[4]; load_matrices(to, shared_address(shared) + 8);",
    "store_16: address .*, not a multiple of 16": "store_16(x + 1, Words{{0, 0, 0, 0}});",
    "load_once: address .*, not a multiple of 16": "x[t] = load_once(reinterpret_cast<const Words*>(x + 1)).word[0];",
    "17 valid bytes": "copy_16(shared_address(shared), x, 17);",
    "memory that is not the block's shared memory": "x[t] = shared_address(x);",
    "wrote beyond its 98304 bytes of shared memory": "if (t == 0) shared[98304] = 0;",
    "not memory of this process": "if (t == 5) *reinterpret_cast<float*>(uintptr_t(t)) = 0.0f;",
    "wgmma without a group_fence": "float d[32]; group_product<bf16, 64>(d, 1ull << 62, 1ull << 62, 0);",
    "products of warp 0 under way": "float d[32]; group_fence(); group_product<bf16, 64>(d, tile, tile, 0);",
    "different products": (
        "float d[32]; group_fence(); if (warp < 3) group_product<bf16, 64>(d, tile, tile, 0); group_commit(); "
        "group_wait<0>();"
    ),
    "without the 128-byte swizzle": (
        "float d[32]; group_fence(); group_product<bf16, 64>(d, 64, 64, 0); group_commit(); group_wait<0>();"
    ),
    "inside a group of 1,024 bytes": (
        "float d[32]; group_fence(); group_product<bf16, 64>(d, tile + 16, tile, 0); group_commit(); group_wait<0>();"
    ),
    "131072 registers asked for": "fewer_registers<256>();",
}  # fmt: skip
"""What the message says: what a thread does. `b` is a word for a barrier, `tile` a descriptor of the first bytes."""


@pytest.mark.parametrize("says", FAULTS)
def test_what_a_gpu_would_hang_or_fault_at_is_one_line(probe: Probe, says: str) -> None:
    setup = (
        "    uint64_t* b = reinterpret_cast<uint64_t*>(shared + 2048);\n"
        "    const uint64_t tile = tile_descriptor(shared_address(shared), 0);\n    (void)b; (void)tile;\n    "
    )
    threads = 512 if "registers asked" in says else 128
    said = []
    for _ in range(4):  # the emulator is as good as new after an error, and each launch differs from the one before
        try:
            probe("float* x", setup + FAULTS[says], [torch.zeros(512)], threads=threads)
        except KernelError as error:
            said.append(str(error))
    assert len(said) == 4 or (says == "1 boxes under way" and said)  # in some launches boxes land at once
    for line in said:
        assert re.search(says, line), line
        assert line.startswith("probe in the emulator = ")
        assert "\n" not in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arguments": [torch.zeros(4)]}, "takes 3 arguments, 1 were given"),
        ({"arguments": [torch.zeros(4), 3, 4]}, "argument 1 has 8 bytes in the kernel, 4 were given"),
        ({"threads": 100}, "a block of 100 threads: whole warps"),
        ({"threads": 2048}, "at most 1024 threads"),
        ({"shared_bytes": 228 * 1024}, "at most 232448"),
        ({"grid": 0}, "a grid of .0, 1, 1. blocks"),
        ({"arguments": [torch.zeros(4), Int64(3), 2**31]}, "expected 32-bit integers and floats"),
    ],
)
def test_a_launch_that_does_not_fit_the_kernel_is_one_line(probe: Probe, changes: dict, says: str) -> None:
    given = {"arguments": [torch.zeros(4), Int64(3), 4]} | changes
    with pytest.raises(KernelError, match=says) as caught:
        probe("float* x, int64_t y, int z", "x[0] = y + z;", **given)
    assert "\n" not in str(caught.value)


def test_shared_memory_is_nan_before_each_block(probe: Probe) -> None:
    y = torch.zeros(3, 128)
    body = "    float* tile = reinterpret_cast<float*>(shared);\n    y[128 * blockIdx.x + t] = tile[t];\n    tile[t] = 1.0f;"
    probe("float* y", body, [y], grid=3)
    assert y.isnan().all()


def test_a_register_that_was_never_written_is_a_wild_number(probe: Probe) -> None:
    y = torch.zeros(128)
    probe("float* y", "float sum[4]; y[t] = sum[t % 4];", [y])
    assert float(y.abs().min()) > 1e37


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts a process's pieces of memory there")
def test_kernels_share_their_threads_stacks(probe: Probe) -> None:
    """Two pieces of memory a thread: a process may have 65,530, and hundreds of kernels run in one."""

    def pieces() -> int:
        return len(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())

    y = torch.empty(1)
    probe("float* y", "if (t == 0) y[0] = FILL;", [y], threads=1024, FILL=1)
    before = pieces()
    probe("float* y", "if (t == 0) y[0] = FILL;", [y], threads=1024, FILL=2)
    assert pieces() - before < 100
    assert y.item() == 2.0


def test_a_kernel_that_is_loaded_anew_shares_them_too() -> None:
    """Parity loads a kernel's modules once for every planted bug."""
    anew = FreshModules("tessera_kernels").load("tessera_kernels.cuda._launch")
    assert anew is not _launch
    assert anew._STACKS is _launch._STACKS
    assert anew._ONE_AT_A_TIME is _launch._ONE_AT_A_TIME


def test_without_being_asked_nothing_is_emulated(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_CUDA_EMULATE", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MissingDependency, match="expected TESSERA_CUDA_EMULATE=1"):
        probe("float* y", "", [torch.zeros(1)])
