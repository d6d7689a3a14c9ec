"""Clusters in the emulator: what blocks do to each other's shared memory, and each missing synchronization made visible."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera_kernels.cuda._launch import Kernel, launch, tensor_map
from tessera_shared.errors import KernelError

from .cuda_probe import NEEDS_COMPILER, Probe, random, swizzled_image

pytestmark = NEEDS_COMPILER

MAP = "const TESSERA_GRID_CONSTANT TensorMap map, "


def rows_of_boxes(rows: int) -> Tensor:
    return random(1, 1, rows, 64, dtype=torch.bfloat16)


# ---- each instruction --------------------------------------------------------------------------------------------


def test_blocks_know_their_rank_and_keep_what_is_their_own(probe: Probe) -> None:
    """Named barriers, lanes and rows of a warpgroup count within the block, and five warps are no whole warpgroups."""
    y, sums = torch.zeros(6, 160), torch.zeros(6, 64)
    body = """
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared);  // a [64, 16] whose rows are their numbers; b is ones, 8 KiB on
    if (t < 64) for (int k = 0; k < 64; ++k) tile[64 * t + k] = rounded<bf16>(float(t + blockIdx.x)).bits;
    if (t < 64) for (int k = 0; k < 64; ++k) tile[4096 + 64 * t + k] = rounded<bf16>(1.0f).bits;
    if (t < 64)  // a once more, 16 KiB on, its rows along the columns
        for (int k = 0; k < 16; ++k) tile[8192 + 64 * k + (t / 8 ^ k % 8) * 8 + t % 8] = rounded<bf16>(float(t)).bits;
    float* slot = reinterpret_cast<float*>(shared + 32768);
    if (t == 159) *slot = 1000.0f * rank_in_cluster();
    if (warp == 4) arrive_some(1, 64);
    if (warp == 0) sync_some(1, 64);
    if (warp == 0) y[160 * blockIdx.x + t] = *slot + shuffle_xor(float(t), 1);
    fence_for_engine();
    sync_threads();
    if (warp == 4) return;
    float d[32];
    const uint32_t start = shared_address(shared);
    group_fence();
    group_product<bf16, 64>(d, tile_descriptor(start, 0), tile_descriptor(start + 8192, 0), 0);
    group_product_flipped<bf16, 64>(d, tile_descriptor(start + 16384, 0), tile_descriptor(start + 8192, 0), 1);
    group_commit();
    group_wait<0>();
    for (int i = 0; i < 4; i += 2)
        if (lane % 4 == 0) sums[64 * blockIdx.x + 16 * warp + lane / 4 + 4 * i] = d[i];"""
    for _ in range(4):
        probe("float* y, float* sums", body, [y, sums], threads=160, grid=6, cluster=2)
        for block in range(6):
            assert y[block, :32].tolist() == [1000 * (block % 2) + (t ^ 1) for t in range(32)]
            assert sums[block].tolist() == [16 * (2 * row + block) for row in range(64)]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_each_block_brings_its_part_to_all(probe: Probe, blocks: int) -> None:
    """Two clusters; the second one's rows end within its boxes."""
    x = rows_of_boxes(16 * blocks - 3)
    body = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32768);
    if (t == 0) {
        barrier_init(full, 1);
        barrier_init_done();
        barrier_expect(full, 1024 * BLOCKS);
    }
    sync_cluster();
    if (t == 0) load_box_for((1 << BLOCKS) - 1, shared + 1024 * rank_in_cluster(), &map, full, 0, 8 * blockIdx.x, 0, 0);
    barrier_wait(full, 0);
    for (int i = t; i < 512 * BLOCKS; i += blockDim.x)
        y[512 * BLOCKS * blockIdx.x + i] = reinterpret_cast<const uint16_t*>(shared)[i];"""
    wanted = torch.nn.functional.pad(x[0, 0], (0, 0, 0, 3)).view(2, 8 * blocks, 64)
    for _ in range(4):
        y = torch.zeros(2, blocks, 512 * blocks, dtype=torch.int16)
        arguments = [tensor_map(x, (1, 1, 8, 64)), y]
        probe(MAP + "uint16_t* y", body, arguments, grid=2 * blocks, cluster=blocks, BLOCKS=blocks)
        for cluster in range(2):
            for block in range(blocks):
                assert torch.equal(y[cluster, block], swizzled_image(wanted[cluster]))


def test_a_box_goes_to_the_blocks_that_are_named_alone(probe: Probe) -> None:
    x, y = rows_of_boxes(8), torch.zeros(4, dtype=torch.int16)
    body = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32768);
    const bool gets = (0b1010 >> rank_in_cluster() & 1) != 0;
    if (t == 0) {
        barrier_init(full, 1);
        barrier_init_done();
        if (gets) barrier_expect(full, 1024);
    }
    sync_cluster();
    if (t == 0 && rank_in_cluster() == 2) load_box_for(0b1010, shared, &map, full, 0, 0, 0, 0);
    if (gets) barrier_wait(full, 0);
    if (t == 0) y[blockIdx.x] = reinterpret_cast<const uint16_t*>(shared)[0];"""
    for _ in range(4):
        probe(MAP + "uint16_t* y", body, [tensor_map(x, (1, 1, 8, 64)), y], grid=4, cluster=4)
        first = x.view(torch.int16).flatten()[0].item()
        assert y.tolist() == [-1, first, -1, first]


def test_kernels_of_one_file_have_their_own_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_CUDA_EMULATE", "1")
    path, y = tmp_path / "three.cu", torch.zeros(3)
    kernels = {"plain": "TESSERA_KERNEL(32)", "pairs": "TESSERA_CLUSTER_KERNEL(2, 32)", "after": "TESSERA_KERNEL(32)"}
    path.write_text('#include "device.cuh"\n' + "".join(
        f"{kind} {name}(float* y) {{\n    y[blockIdx.x] += 1.0f + rank_in_cluster();\n}}\nTESSERA_ENTRY({name})\n"
        for name, kind in kernels.items()
    ), encoding="utf-8")  # fmt: skip
    for name in ("plain", "after"):
        launch(Kernel(str(path), name), grid=(3, 1, 1), block=32, arguments=[y], like=y)
    launch(Kernel(str(path), "pairs"), grid=(2, 1, 1), block=32, arguments=[y], like=y)
    assert y.tolist() == [96.0, 128.0, 64.0]


# ---- together ----------------------------------------------------------------------------------------------------

RING = """
    const int rank = rank_in_cluster();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32768);
    uint64_t* empty = full + STAGES;
    if (t == 0) {{
        for (int i = 0; i < STAGES; ++i) {{ barrier_init(full + i, 1); barrier_init(empty + i, {count}); }}
        barrier_init_done();
    }}
    {begin}
    Turn<STAGES> turn;
    for (int round = 0; round < ROUNDS; ++round, turn.next()) {{
        unsigned char* stage = shared + 2048 * turn.stage;
        if (t == 64) {{  // the two blocks' halves of a stage, each to both
            barrier_wait(empty + turn.stage, turn.parity ^ 1);
            barrier_expect(full + turn.stage, {bytes});
            load_box_for(3, stage + 1024 * rank, &map, full + turn.stage, 0, 16 * round + 8 * rank, 0, 0);
        }} else if (t < 64) {{
            {wait}
            {early}
            for (int i = t; i < 1024; i += 64)
                y[1024 * (ROUNDS * blockIdx.x + round) + i] = reinterpret_cast<const uint16_t*>(stage)[i];
            sync_warp();
            {arrive}
        }}
    }}
    {end}"""

EXCHANGE = """
    Words* slots = reinterpret_cast<Words*>(shared);
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32768);
    if (t == 0) {{ barrier_init(full, 2); barrier_init_done(); }}
    sync_cluster();
    if (t < 2) {{
        const uint32_t x = 1000 * blockIdx.x + t;
        store_16_at(t, slots + rank_in_cluster(), Words{{{{x, x + 10, x + 20, x + 30}}}});
        {tell}
    }}
    {wait}
    if (t < 8) y[8 * blockIdx.x + t] = reinterpret_cast<const uint32_t*>(shared)[t];
    {end}"""

ARRIVE = "if (lane < 2) barrier_arrive_at(empty + turn.stage, lane);"

RIGHT = {
    "ring": (RING, {
        "count": "4", "begin": "sync_cluster();", "bytes": "2048", "wait": "barrier_wait(full + turn.stage, turn.parity);",
        "early": "", "arrive": ARRIVE, "end": "sync_cluster();",
    }),
    "exchange": (EXCHANGE, {"tell": "", "wait": "sync_cluster();", "end": "sync_cluster();"}),
}  # fmt: skip

MISSING = [
    ("ring", {"arrive": "if (lane == 0) barrier_arrive(empty + turn.stage);"}, "2 of 4 arrivals"),  # own block alone
    ("ring", {"arrive": "if (lane == 0) barrier_arrive_at(empty + turn.stage, 1 - rank);"}, "2 of 4 arrivals"),
    ("ring", {"arrive": ""}, "4 of 4 arrivals"),
    ("ring", {"count": "2"}, ""),  # a stage is filled again while the other block still reads it
    ("ring", {"count": "6"}, "2 of 6 arrivals"),
    ("ring", {"bytes": "1024"}, ""),  # the other block's half is not waited for
    ("ring", {"bytes": "3072"}, "1024 bytes missing"),
    ("ring", {"wait": ""}, ""),
    ("ring", {"arrive": "", "early": ARRIVE}, ""),  # the stage is handed back before it is read
    ("ring", {"begin": "sync_threads();"}, "no barrier at shared byte .* of block . of the cluster"),
    ("ring", {"end": ""}, "barrier_arrive_at: all threads of block . of the cluster have ended"),
    ("exchange", {"wait": "sync_threads();"}, "^numbers"),
    ("exchange", {"wait": ""}, "^numbers"),
    (
        "exchange",
        {"tell": "barrier_arrive_at(full, t);", "wait": "barrier_wait(full, 0);"},
        "^numbers",
    ),  # orders nothing
    ("exchange", {"wait": "sync_threads();", "end": ""}, "all threads of block . of the cluster have ended"),
]


def _outcome(probe: Probe, name: str, changes: dict[str, str]) -> str:
    """Run a sketch in two clusters of two blocks, several times; return what is wrong, or nothing."""
    sketch, parts = RIGHT[name]
    stages, rounds, wrong = 3, 8, ""
    x = rows_of_boxes(16 * rounds)
    if name == "ring":
        wanted = torch.stack([swizzled_image(part) for part in x.view(rounds, 16, 64)]).expand(4, -1, -1).contiguous()
    else:
        values = [
            [[1000 * (block // 2 * 2 + slot) + block % 2 + 10 * i for i in range(4)] for slot in range(2)]
            for block in range(4)
        ]
        wanted = torch.tensor(values, dtype=torch.int32)
    for _ in range(4):  # each launch orders threads, blocks, copies and stores in another way
        y = torch.zeros_like(wanted)
        try:
            arguments = [tensor_map(x, (1, 1, 8, 64)), y]
            word = "uint16_t" if name == "ring" else "uint32_t"
            body = sketch.format(**(parts | changes))
            probe(MAP + f"{word}* y", body, arguments, threads=96, grid=4, cluster=2, STAGES=stages, ROUNDS=rounds)
        except KernelError as error:
            return str(error)
        wrong += "" if torch.equal(y, wanted) else "numbers"
    return wrong


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_synchronized_is_right(probe: Probe, name: str) -> None:
    assert _outcome(probe, name, {}) == ""


@pytest.mark.parametrize(("name", "changes", "says"), MISSING)
def test_what_is_not_synchronized_shows(probe: Probe, name: str, changes: dict[str, str], says: str) -> None:
    outcome = _outcome(probe, name, changes)
    assert outcome != ""
    assert re.search(says, outcome), outcome


FAULTS = {
    "store_16_at: all threads of block . of the cluster have ended": "store_16_at(1 - rank, shared, Words{});",
    "barrier_arrive_at: all threads of block . of the cluster have ended": (
        "INIT if (t == 0) barrier_arrive_at(b, 1 - rank);"
    ),
    "load_box_for: all threads of block . of the cluster have ended|1 boxes under way to it": (
        "INIT if (t == 0) load_box_for(2 >> rank, shared, &map, b, 0, 0, 0, 0);"
    ),
    "block .1, 0, 0. ended with 1 boxes under way to it": (
        "INIT if (t == 0 && rank == 0) load_box_for(2, shared, &map, b, 0, 0, 0, 0); sync_cluster();"
    ),
    "block .0, 0, 0. ended with a store_16_at under way to it": (
        "INIT if (t == 0 && rank == 1) { store_16_at(0, shared, Words{}); barrier_arrive_at(b, 0); } "
        "if (rank == 0) barrier_wait(b, 0);"
    ),
    "block .0, 0, 0. cannot go on: threads 0-127 wait for sync_cluster .128 of 256 threads are there.; "
    "block .1, 0, 0.: threads 0-127 ended": "if (rank == 0) sync_cluster();",
    "block .0, 0, 0. cannot go on: thread 0 waits for barrier 1 .*; threads 32-127 wait for sync_cluster .96 of 256": (
        "if (rank == 0 && warp == 0 && lane == 0) sync_some(1, 128); if (rank == 0 && warp > 0) sync_cluster();"
    ),
    "barrier_arrive_at: block 2 of a cluster of 2": "INIT barrier_arrive_at(b, 2);",
    "barrier_arrive_at: block -1 of a cluster of 2": "INIT barrier_arrive_at(b, -1);",
    "store_16_at: block 2 of a cluster of 2": "store_16_at(2, shared, Words{});",
    "bits 0x4 of a cluster of 2": "INIT if (t == 0) load_box_for(4, shared, &map, b, 0, 0, 0, 0);",
    "bits 0x7 of a cluster of 2": "INIT if (t == 0) load_box_for(7, shared, &map, b, 0, 0, 0, 0);",
    "bits 0x0 of a cluster of 2": "INIT if (t == 0) load_box_for(0, shared, &map, b, 0, 0, 0, 0);",
    "store_16_at: shared byte 8, not a multiple of 16": "store_16_at(rank, shared + 8, Words{});",
    "store_16_at: shared bytes 98304 to 98320, but the block has 98304": "store_16_at(rank, shared + 98304, Words{});",
    "memory that is not the block's shared memory": "store_16_at(rank, y, Words{});",
    "no barrier at shared byte 2048 of block . of the cluster": (
        "if (rank == 0 && t == 0) { barrier_init(b, 1); barrier_init_done(); } sync_cluster(); "
        "if (t == 0) barrier_arrive_at(b, 1);"
    ),
    "barrier_arrive_at: its barrier was initialized, but no barrier_init_done": (
        "if (t == 0) barrier_init(b, 1); sync_cluster(); if (t == 0) barrier_arrive_at(b, 1 - rank);"
    ),
    "more than 1 arrivals in one phase": (
        "if (t == 0) { barrier_init(b, 1); barrier_init_done(); if (rank == 0) barrier_expect(b, 16); } sync_cluster(); "
        "if (t == 0 && rank == 1) barrier_arrive_at(b, 0); sync_cluster();"
    ),
    "block .1, 0, 0. wrote beyond its 98304 bytes of shared memory": "if (t == 0 && rank == 1) shared[98304] = 0;",
    "block .1, 0, 0., thread 5: touched address": "if (t == 5 && rank == 1) *reinterpret_cast<float*>(uintptr_t(t)) = 0.0f;",
}  # fmt: skip
"""What the message says: what a thread does in a cluster of two. INIT: a barrier in each block, known to both."""

SOMETIMES = ("boxes under way", "a store_16_at under way", "block . of the cluster have ended")
"""Red in some of the launches: in the others boxes and stores land at once, or the other block is slower."""


@pytest.mark.parametrize("says", FAULTS)
def test_what_a_gpu_would_hang_or_fault_at_is_one_line(probe: Probe, says: str) -> None:
    setup = (
        "const int rank = rank_in_cluster(); uint64_t* b = reinterpret_cast<uint64_t*>(shared + 2048); (void)b;\n    "
    )
    init = "if (t == 0) { barrier_init(b, 1); barrier_init_done(); } sync_cluster();"
    body, said = setup + FAULTS[says].replace("INIT", init), []
    for _ in range(4):
        try:
            probe(
                MAP + "float* y",
                body,
                [tensor_map(rows_of_boxes(8), (1, 1, 8, 64)), torch.zeros(512)],
                grid=2,
                cluster=2,
            )
        except KernelError as error:
            said.append(str(error))
    assert len(said) == 4 or (said and any(word in says for word in SOMETIMES))
    for line in said:
        assert re.search(says, line), line
        assert line.startswith("probe in the emulator = ")
        assert "\n" not in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cluster": 2, "grid": 3}, "a grid of .3, 1, 1. blocks in clusters of 2: x is a multiple of that"),
        ({"cluster": 4, "grid": 2}, "in clusters of 4"),
        ({"cluster": 9, "grid": 9}, "a cluster of 9 blocks of 128 threads: at most 8 blocks"),
        ({"cluster": 0}, "a cluster of 0 blocks"),
        ({"cluster": 4, "grid": 4, "threads": 544}, "a cluster of 4 blocks of 544 threads: .* 2048 threads"),
        ({"cluster": 2, "grid": 2, "threads": 1056}, "a block of 1056 threads"),
    ],
)
def test_a_launch_that_does_not_fit_the_cluster_is_one_line(probe: Probe, changes: dict, says: str) -> None:
    with pytest.raises(KernelError, match=says) as caught:
        probe("float* y", "sync_cluster();", [torch.zeros(4)], **changes)
    assert "\n" not in str(caught.value)


def test_the_largest_cluster_runs(probe: Probe) -> None:
    y = torch.zeros(2048)
    body = "y[blockIdx.x * blockDim.x + t] = 1.0f + rank_in_cluster(); sync_cluster();"
    for blocks in (2, 8):
        probe("float* y", body, [y], grid=blocks, cluster=blocks, threads=2048 // blocks)
        assert torch.equal(y.view(blocks, -1), torch.arange(1.0, blocks + 1).view(-1, 1).expand(-1, 2048 // blocks))
