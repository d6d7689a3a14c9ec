"""The emulator that runs CUDA kernels on the CPU: each instruction against plain NumPy or torch. Layouts are those of the
PTX ISA, written down here a second time.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera_kernels.cuda._launch import Int64, Kernel, TensorMap, launch, tensor_map
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.errors import KernelError

from .cuda_probe import NEEDS_COMPILER, Probe, bits, random, swizzled_image

pytestmark = NEEDS_COMPILER

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
FORMS = ["shared", "registers", "flipped", "along"]
"""Where a product's operands lie, and how."""


def assert_close(found: Tensor, one: Tensor, other: Tensor) -> None:
    """Products of halves, summed in float32."""
    truth = one.double() @ other.double()
    size = float((one.double().abs() @ other.double().abs()).max())
    limit = kernel_limit(0.0, torch.float32, magnitude=size, length=one.shape[1])
    assert float((found.double() - truth).abs().max()) <= limit


# ---- numbers -----------------------------------------------------------------------------------------------------


@HALVES
def test_rounding_is_to_nearest_even_and_keeps_what_is_no_number(probe: Probe, dtype: torch.dtype) -> None:
    patterns = np.random.default_rng(0).integers(0, 2**32, 40000, dtype=np.uint32)
    halves = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(dtype).float()
    between = (halves + torch.nextafter(halves, torch.tensor(torch.inf))) / 2  # and what lies just beside a half
    special = torch.tensor(
        [0.0, -0.0, 65519.9, 65520.0, -65536.0, 3.4e38, 2**-24, 2**-25, 2**-26, torch.inf, torch.nan]
    )
    x = torch.cat([torch.from_numpy(patterns.view(np.float32)), halves, between, special])
    y, back = torch.empty(len(x), dtype=dtype), torch.empty_like(x)
    body = """
    for (int i = t; i < n; i += blockDim.x) {
        y[i] = rounded<HALF>(x[i]);
        back[i] = to_float(y[i]);
        if (packed<HALF>(x[i], 2.0f) != (y[i].bits | uint32_t(rounded<HALF>(2.0f).bits) << 16)) y[i].bits ^= 1;
    }"""
    probe("const float* x, HALF* y, float* back, int n", body, [x, y, back, len(x)], HALF=NAMES[dtype])
    wanted = x.to(dtype)
    number = ~wanted.isnan()
    assert torch.equal(y.isnan(), ~number)
    assert np.array_equal(bits(y)[number.numpy()], bits(wanted)[number.numpy()])
    assert torch.equal(back[number], wanted.float()[number])


def test_fast_powers_and_logarithms_flush_what_is_subnormal(probe: Probe) -> None:
    x, y = torch.tensor([0.0, -1.0, 3.0, -126.0, -127.0, -torch.inf]), torch.empty(12)
    probe("const float* x, float* y", "if (t < 6) { y[t] = exp2_fast(x[t]); y[6 + t] = log2_fast(y[t]); }", [x, y])
    assert y[:6].tolist() == [1.0, 0.5, 8.0, 2.0**-126, 0.0, 0.0]
    assert y[6:].tolist() == [0.0, -1.0, 3.0, -126.0, -torch.inf, -torch.inf]


def test_pairs_are_multiplied_and_subtracted_with_one_rounding_each(probe: Probe) -> None:
    """Subnormal numbers are factors like any other: codes of 8 bits are numbers of that kind."""
    a, b = random(256, dtype=torch.bfloat16), random(256, dtype=torch.bfloat16, seed=1)
    a[:2], b[:2] = torch.tensor([3.0 * 2.0**-133, -127.0 * 2.0**-133]), 2.0**127
    a[2:4], b[2:4] = torch.tensor([128.0 + 15.0, 128.0]), 128.0 + 15.0
    product, difference = torch.empty_like(a), torch.empty_like(a)
    body = "y[t] = multiply_pairs(a[t], b[t]); z[t] = subtract_pairs(a[t], b[t]);"
    probe("const uint32_t* a, const uint32_t* b, uint32_t* y, uint32_t* z", body, [a, b, product, difference])
    assert torch.equal(product, (a.double() * b.double()).to(torch.bfloat16))
    assert torch.equal(difference, (a.double() - b.double()).to(torch.bfloat16))
    assert product[:2].tolist() == [3.0 / 64, -127.0 / 64]


# ---- a warp ------------------------------------------------------------------------------------------------------


def test_shuffles_exchange_within_a_warp(probe: Probe) -> None:
    y = torch.empty(3, 128)
    body = """
    y[t] = shuffle_xor(100.0f * warp + lane, 5);
    y[128 + t] = same_in_warp(t + 7);
    y[256 + t] = any_in_warp(t == 70);
    sync_warp();"""
    probe("float* y", body, [y])
    t = np.arange(128)
    assert y[0].tolist() == (100 * (t // 32) + (t % 32 ^ 5)).tolist()
    assert y[1].tolist() == (t // 32 * 32 + 7).tolist()
    assert y[2].tolist() == (t // 32 == 2).tolist()


def test_words_are_exchanged_and_stored_as_they_are(probe: Probe) -> None:
    y = torch.zeros(2, 4 * 128, dtype=torch.int32)
    body = """
    const uint32_t word = 0x7f800001u + t;  // as a float no number
    const Words four = {{word, shuffle_xor(word, 3), 0, 7}};
    store_16(y + 4 * t, four);"""
    probe("uint32_t* y", body, [y])
    t, found = np.arange(128), y[0].numpy().reshape(128, 4)
    assert (found[:, 0] == 0x7F800001 + t).all()
    assert (found[:, 1] == 0x7F800001 + (t ^ 3)).all()
    assert (found[:, 2:] == [0, 7]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_dealt_out_to_the_lanes(probe: Probe, transposed: bool) -> None:
    matrices = torch.from_numpy(np.random.default_rng(1).integers(0, 2**15, (4, 8, 8), dtype=np.int16))
    found = torch.zeros(32, 4, dtype=torch.int32)
    body = """
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared);  // row r of matrix m at 48 (8 m + r) bytes
    for (int i = t; i < 256; i += 32) tile[i / 8 * 24 + i % 8] = x[i];
    sync_warp();
    uint32_t to[4];
    LOAD(to, shared_address(shared) + 48 * lane);
    for (int j = 0; j < 4; ++j) y[4 * lane + j] = to[j];"""
    name = "load_matrices_transposed" if transposed else "load_matrices"
    probe("const uint16_t* x, uint32_t* y", body, [matrices, found], threads=32, LOAD=name)
    m = matrices.numpy().view(np.uint16).astype(np.uint32)
    m = m.transpose(0, 2, 1) if transposed else m
    for lane in range(32):
        for j in range(4):
            row, column = lane // 4, 2 * (lane % 4)
            assert int(found[lane, j]) == int(m[j, row, column] | m[j, row, column + 1] << 16)


def test_a_matrix_is_turned_and_bytes_change_places(probe: Probe) -> None:
    matrix = torch.from_numpy(np.random.default_rng(1).integers(0, 2**15, (8, 8), dtype=np.int16))
    turned, swapped = torch.zeros_like(matrix), torch.zeros_like(matrix)
    body = "y[lane] = transposed(x[lane]); z[lane] = swapped_bytes(x[lane]);"
    probe("const uint32_t* x, uint32_t* y, uint32_t* z", body, [matrix, turned, swapped], threads=32)
    assert torch.equal(turned, matrix.t())
    assert np.array_equal(swapped.numpy(), matrix.numpy().byteswap())


def left_fragments(a: Tensor) -> Tensor:
    """The registers [lanes, 4] that hold a [16, 16]: PTX ISA, matrix fragments of m16n8k16."""
    m, found = bits(a).astype(np.uint32), np.zeros((32, 4), np.uint32)
    for lane in range(32):
        for j in range(4):
            row, column = lane // 4 + 8 * (j % 2), 2 * (lane % 4) + 8 * (j // 2)
            found[lane, j] = m[row, column] | m[row, column + 1] << 16
    return torch.from_numpy(found.view(np.int32))


@HALVES
def test_a_warp_multiplies_fragments(probe: Probe, dtype: torch.dtype) -> None:
    a, b, start = random(16, 16, dtype=dtype), random(16, 8, dtype=dtype, seed=1), random(16, 8, seed=2)
    right, numbers = np.zeros((32, 2), np.uint32), bits(b).astype(np.uint32)
    held = torch.zeros(32, 4)
    for lane in range(32):
        for j in range(2):
            k, n = 2 * (lane % 4) + 8 * j, lane // 4
            right[lane, j] = numbers[k, n] | numbers[k + 1, n] << 16
        for j in range(4):
            held[lane, j] = start[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2]
    body = """
    float d[4];
    uint32_t left[4];
    for (int j = 0; j < 4; ++j) { d[j] = sums[4 * lane + j]; left[j] = a[4 * lane + j]; }
    warp_product<HALF>(d, left, b[2 * lane], b[2 * lane + 1]);
    for (int j = 0; j < 4; ++j) sums[4 * lane + j] = d[j];"""
    arguments = [held, left_fragments(a), torch.from_numpy(right.view(np.int32))]
    probe("float* sums, const uint32_t* a, const uint32_t* b", body, arguments, threads=32, HALF=NAMES[dtype])
    found = torch.zeros(16, 8)
    for lane in range(32):
        for j in range(4):
            found[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2] = held[lane, j]
    whole = torch.cat([a.double(), torch.eye(16).double()], 1), torch.cat([b.double(), start.double()])
    assert_close(found, *whole)


# ---- a warpgroup -------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_a_warpgroup_multiplies_tiles(probe: Probe, form: str, columns: int, dtype: torch.dtype) -> None:
    """Two products of 16: the second adds to the first, which overwrites what the registers held."""
    a, b = random(64, 32, dtype=dtype), random(32, columns, dtype=dtype, seed=1)
    padding = torch.zeros(64, 32, dtype=dtype)
    left = swizzled_image(a.t().contiguous() if form == "flipped" else torch.cat([a, padding], 1))
    wide = torch.cat([b.t(), torch.zeros(columns, 32, dtype=dtype)], 1)
    right = swizzled_image(wide if form in ("shared", "along") else b)
    fragments = torch.stack([
        torch.cat([left_fragments(a[16 * w : 16 * w + 16, 16 * k : 16 * k + 16]) for w in range(4)]) for k in range(2)
    ])  # fmt: skip
    found = torch.full((64, columns), torch.nan)
    body = """
    uint16_t* tile = reinterpret_cast<uint16_t*>(shared);  // a, and b 16 KiB on
    for (int i = t; i < a_count; i += 128) tile[i] = a[i];
    for (int i = t; i < b_count; i += 128) tile[8192 + i] = b[i];
    fence_for_engine();
    sync_threads();
    float d[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; ++i) d[i] = 1e30f;
    uint32_t registers[2][4];
    for (int k = 0; k < 2; ++k)
        for (int j = 0; j < 4; ++j) registers[k][j] = fragments[(k * 128 + t) * 4 + j];
    group_fence();
    const uint32_t left = shared_address(shared), right = left + 16384;
    for (int k = 0; k < 2; ++k) {
        if (FORM == 0) group_product<HALF, COLUMNS>(d, tile_descriptor(left + 32 * k, 0), tile_descriptor(right + 32 * k, 0), k);
        if (FORM == 1) group_product<HALF, COLUMNS>(d, registers[k], tile_descriptor(right + 2048 * k, 4096), k);
        if (FORM == 2)
            group_product_flipped<HALF, COLUMNS>(
                d, tile_descriptor(left + 2048 * k, 4096), tile_descriptor(right + 2048 * k, 4096), k);
        if (FORM == 3) group_product_along<HALF, COLUMNS>(d, registers[k], tile_descriptor(right + 32 * k, 0), k);
    }
    group_commit();
    group_wait<0>();
    settled(d);
    for (int i = 0; i < COLUMNS / 2; ++i)
        y[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * COLUMNS + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];"""
    probe(
        "const uint16_t* a, int a_count, const uint16_t* b, int b_count, const uint32_t* fragments, float* y", body,
        [left, left.numel(), right, right.numel(), fragments, found],
        COLUMNS=columns, FORM=FORMS.index(form), HALF=NAMES[dtype],
    )  # fmt: skip
    assert_close(found, a, b)


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "corner", [(0, 0, 0, 0), (-8, -1, -2, 0), (40, 2, 4, 1), (8, 1, 1, -1), (0, 5, 0, 0), (-64, 0, 0, 0)]
)
def test_a_box_is_what_slicing_says_and_zero_outside(probe: Probe, corner: tuple[int, int, int, int]) -> None:
    shape, box = (2, 6, 5, 80), (1, 4, 3, 64)
    x = random(*shape, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    image = torch.zeros(4 * 3 * 64, dtype=torch.int16)
    body = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 32768);
    if (t == 0) {
        prefetch_map(&map);
        barrier_init(full, 1);
        barrier_init_done();
        barrier_expect(full, 1536);
        load_box(shared, &map, full, c0, c1, c2, c3);
    }
    sync_threads();
    barrier_wait(full, 0);
    for (int i = t; i < 768; i += blockDim.x) y[i] = reinterpret_cast<const uint16_t*>(shared)[i];"""
    parameters = "const TESSERA_GRID_CONSTANT TensorMap map, uint16_t* y, int c0, int c1, int c2, int c3"
    probe(parameters, body, [tensor_map(x, box), image, *corner])
    c0, c1, c2, c3 = corner
    padded = torch.nn.functional.pad(x, (64, 64, 8, 8, 8, 8, 8, 8))
    wanted = padded[8 + c3, 8 + c2 : 12 + c2, 8 + c1 : 11 + c1, 64 + c0 : 128 + c0].reshape(12, 64)
    assert torch.equal(image, swizzled_image(wanted))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.float(), "2-byte numbers"),
        (lambda x: x[..., 0], "4 dimensions"),
        (lambda x: x.transpose(2, 3), "stride 1"),
        (lambda x: x[..., 1:], "multiples of 16"),
        (lambda x: x[:, :, :, :70].contiguous(), "multiples of 16"),
    ],
)
def test_a_tensor_that_the_copy_engine_cannot_read_is_named(change: Callable[[Tensor], Tensor], says: str) -> None:
    x = torch.zeros(2, 3, 4, 72, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=f"tensor map, .*{says}"):
        tensor_map(change(x), (1, 1, 1, 64))


def test_a_box_of_another_row_or_too_many_rows_is_named() -> None:
    x = torch.zeros(1, 600, 1, 64, dtype=torch.bfloat16)
    for box in ((1, 8, 1, 32), (1, 257, 1, 64)):
        with pytest.raises(KernelError, match="tensor map, box = "):
            tensor_map(x, box)


def test_a_dimension_of_one_may_have_any_stride() -> None:
    x = torch.zeros(3 * 64, dtype=torch.bfloat16).as_strided((1, 3, 1, 64), (7, 64, 3, 1))
    assert len(tensor_map(x, (1, 3, 1, 64)).packed) == 128


def test_groups_of_copies_arrive_at_their_wait_and_not_before(probe: Probe) -> None:
    x, y = random(4, 8), torch.zeros(3, 2, 4)
    body = """
    if (t > 0) return;
    float* tile = reinterpret_cast<float*>(shared);
    for (int i = 0; i < 8; ++i) tile[i] = 1.0f;
    copy_16(shared_address(tile), x, 16);
    copy_commit();
    copy_16(shared_address(tile + 4), x + 8, 12);  // the last four bytes become zero
    copy_commit();
    for (int i = 0; i < 8; ++i) y[i] = tile[i];
    copy_wait<1>();
    for (int i = 0; i < 8; ++i) y[8 + i] = tile[i];
    copy_wait<0>();
    for (int i = 0; i < 8; ++i) y[16 + i] = tile[i];"""
    probe("const float* x, float* y", body, [x, y])
    assert y[0].isnan().all()
    assert torch.equal(y[1, 0], x[0, :4])
    assert y[1, 1].isnan().all()
    assert torch.equal(y[2, 1], torch.cat([x[1, :3], torch.zeros(1)]))


def test_rows_come_in_and_are_added_out_in_bulk(probe: Probe) -> None:
    x, y = random(8), torch.ones(8)
    body = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 1024);
    float* row = reinterpret_cast<float*>(shared);
    if (t == 0) {
        barrier_init(full, 1);
        barrier_init_done();
        barrier_expect(full, 32);
        load_bulk(row, x, full, 32);
    }
    sync_threads();
    barrier_wait(full, 0);
    if (t < 8) row[t] *= 2.0f;
    fence_for_engine();
    sync_threads();
    if (t == 0) {
        add_bulk(y, row, 32);
        bulk_commit();
        bulk_wait_read<0>();
    }"""
    probe("const float* x, float* y", body, [x, y])
    assert torch.equal(y, 1 + 2 * x)


# ---- barriers ----------------------------------------------------------------------------------------------------


def test_named_barriers_hand_over_between_warps(probe: Probe) -> None:
    """Warp 0 fills a slot and goes on; warp 1 empties it; a third barrier has its own count."""
    y = torch.zeros(5)
    body = """
    int* slot = reinterpret_cast<int*>(shared);
    if (warp == 0) {
        for (int i = 0; i < 5; ++i) {
            if (i > 0) sync_some(2, 64);
            if (lane == 0) *slot = 10 * i;
            arrive_some(1, 64);
        }
    } else if (warp == 1) {
        for (int i = 0; i < 5; ++i) {
            sync_some(1, 64);
            if (lane == 0) y[i] = *slot;
            if (i < 4) arrive_some(2, 64);
        }
    }
    sync_some(3, 128);"""
    probe("float* y", body, [y])
    assert y.tolist() == [0, 10, 20, 30, 40]


def test_phases_of_a_barrier_count_arrivals_and_bytes(probe: Probe) -> None:
    """A ring of two slots: a producer that runs ahead, consumers that hand slots back, parities that wrap around."""
    x, y = random(7, 4), torch.zeros(7, 4)
    body = """
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + 1024);
    uint64_t* empty = full + 2;
    float* ring = reinterpret_cast<float*>(shared);
    if (t == 0) {
        for (int i = 0; i < 2; ++i) { barrier_init(full + i, 1); barrier_init(empty + i, 4); }
        barrier_init_done();
    }
    sync_threads();
    if (t == 32) {
        for (int i = 0; i < 7; ++i) {
            barrier_wait(empty + i % 2, i / 2 % 2 ^ 1);  // of a new barrier the phase before the first is over
            barrier_expect(full + i % 2, 16);
            load_bulk(ring + 4 * (i % 2), x + 4 * i, full + i % 2, 16);
        }
    } else if (t < 4) {
        for (int i = 0; i < 7; ++i) {
            barrier_wait(full + i % 2, i / 2 % 2);
            y[4 * i + t] = ring[4 * (i % 2) + t];
            barrier_arrive(empty + i % 2);
        }
    }"""
    probe("const float* x, float* y", body, [x, y], threads=64)
    assert torch.equal(x, y)


def test_blocks_and_threads_are_numbered_as_on_a_gpu(probe: Probe, tmp_path: Path) -> None:
    y = torch.zeros(2, 3, 4, 32, dtype=torch.int32)
    path = tmp_path / "numbers.cu"
    path.write_text(
        '#include "device.cuh"\nTESSERA_KERNEL(64) numbers(int* y, int64_t base, float scale) {\n'
        "    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;\n"
        "    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;\n"
        "    y[block * 32 + thread] = int(scale * (base / 1000000000000 + block * 32 + thread));\n}\n"
        "TESSERA_ENTRY(numbers)\n",
        encoding="utf-8",
    )
    launch(Kernel(str(path), "numbers"), grid=(4, 3, 2), block=(4, 2, 4), arguments=[y, Int64(5 * 10**12), 2.0], like=y)
    assert y.flatten().tolist() == [2 * (5 + i) for i in range(768)]


def test_a_map_is_as_large_as_on_a_gpu() -> None:
    made = tensor_map(torch.zeros(1, 2, 3, 64, dtype=torch.float16), (1, 2, 1, 64))
    assert isinstance(made, TensorMap)
    assert len(made.packed) == 128
