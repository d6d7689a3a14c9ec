"""Attention over pages as a person meets it: which keys are read, how they are divided, what is refused; fuzz is in test_kernel_fuzz."""

import os

import pytest
import torch

pytest.importorskip("triton")

from tessera_kernels.reference import paged_attention as reference
from tessera_kernels.triton.paged_attention import (
    CONFIGS,
    SHARED_BYTES,
    choose_config,
    choose_splits,
    paged_attention,
    paged_prefill,
)
from tessera_parity.kernel_budget import kernel_limit
from tessera_parity.kernel_cases.paged_attention import SMALL
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(rows: int = 3, pages: int = 6, page_size: int = 8, kv_heads: int = 2, width: int = 16, dtype=torch.float32):
    """q of 4 heads, pages, a table of 4 pages a row, lengths."""
    order = torch.randperm(rows * 4, generator=torch.Generator().manual_seed(1)).view(rows, 4)
    cache = [random(rows * 4, page_size, kv_heads, width, seed=seed, dtype=dtype) for seed in (2, 3)]
    lengths = torch.tensor([27, 1, 32, 9, 16][:rows], dtype=torch.int32)
    return [random(rows, 4, width, dtype=dtype), *cache, order.to(torch.int32), lengths]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.double() - expected.double()).abs().max())
    assert error <= kernel_limit(0.0, found.dtype, magnitude=float(expected.abs().max()), length=32) * 8.0


def test_decode_and_prefill_of_one_query_are_the_reference() -> None:
    inputs = given()
    expected = reference.paged_attention(*(x.double() if x.is_floating_point() else x for x in inputs))
    close(paged_attention(*inputs, config=SMALL), expected)
    starts = torch.arange(4, dtype=torch.int32)
    close(paged_prefill(*inputs, starts, longest_query=1, config=SMALL), expected)


def test_a_chunk_of_a_prompt_gives_what_the_whole_prompt_gives() -> None:
    _, keys, values, table, _ = given(rows=1)
    q = random(20, 4, 16, seed=7)
    lengths = torch.tensor([20], dtype=torch.int32)
    whole = paged_prefill(q, keys, values, table, lengths, starts_of(20), longest_query=20, config=SMALL)
    for first, last in ((0, 7), (7, 8), (8, 20)):
        chunk = paged_prefill(
            q[first:last],
            keys,
            values,
            table,
            lengths - 20 + last,
            starts_of(last - first),
            longest_query=20,
            config=SMALL,
        )
        close(chunk, whole[first:last])


def starts_of(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def test_only_a_sequence_s_own_slots_are_read() -> None:
    inputs = given()
    before = paged_attention(*inputs, config=SMALL, splits=2)
    _, keys, values, table, _ = inputs
    last = int(table[0, 3])  # row 0 has 27 keys: slots 0 to 2 of its fourth page
    keys[last, 3:], values[last, 3:] = torch.nan, torch.nan
    keys[table[1, 1:].long()], values[table[1, 1:].long()] = torch.nan, torch.nan
    table[1, 1:] = -7
    assert same_bits(paged_attention(*inputs, config=SMALL, splits=2), before)
    values[last, 2] = 9.0
    changed = (paged_attention(*inputs, config=SMALL, splits=2) != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]


def test_a_window_is_the_last_keys() -> None:
    inputs = given()
    before = paged_attention(*inputs, window=5, config=SMALL)
    close(before, reference.paged_attention(*inputs, window=5))
    inputs[1][inputs[3][0, 2], 5], inputs[2][inputs[3][0, 2], 5] = 50.0, -50.0  # key 21 of 27: six back
    assert same_bits(paged_attention(*inputs, window=5, config=SMALL), before)
    inputs[2][inputs[3][0, 2], 6] = -50.0
    assert not same_bits(paged_attention(*inputs, window=5, config=SMALL)[0], before[0])


def test_a_window_wider_than_any_sequence_hides_nothing() -> None:
    """The first queries stand before all keys, where a position less the widest window would leave 32 bits."""
    q, (_, keys, values, table, _) = random(20, 4, 16, seed=7), given(rows=1)
    inputs = q, keys, values, table, torch.tensor([15], dtype=torch.int32), starts_of(20)
    plain = paged_prefill(*inputs, longest_query=20, config=SMALL)
    for window in (2**31 - 1, 2**40):
        assert same_bits(paged_prefill(*inputs, longest_query=20, window=window, config=SMALL), plain)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_with_a_split_size_a_row_s_bits_depend_on_nothing_but_the_row(size) -> None:
    q, keys, values, table, lengths = given(rows=5)
    batch = paged_attention(q, keys, values, table, lengths, split_size=size, config=SMALL)
    wide = torch.cat([table, table.new_full((5, 9), -1)], 1)
    for row in range(5):
        one = slice(row, row + 1)
        for shown in (table, wide):
            alone = paged_attention(q[one], keys, values, shown[one], lengths[one], split_size=size, config=SMALL)
            assert same_bits(alone, batch[one])


def test_more_splits_than_tiles_change_no_more_than_rounding() -> None:
    inputs = given()
    one = paged_attention(*inputs, splits=1, config=SMALL)
    for splits in (2, 3, 17):
        close(paged_attention(*inputs, splits=splits, config=SMALL), one)


def test_no_keys_and_rows_of_no_sequence_give_zeros() -> None:
    q, keys, values, table, lengths = given()
    lengths[1] = 0
    for splits in (1, 3):
        out = paged_attention(q, keys, values, table, lengths, splits=splits, config=SMALL)
        assert out.flatten(1).any(1).tolist() == [True, False, True]
        packed = torch.cat([q, q.new_full((2, 4, 16), torch.nan)])
        found = paged_prefill(
            packed, keys, values, table, lengths, starts_of(1, 0, 2), longest_query=2, splits=splits, config=SMALL
        )
        assert found.flatten(1).any(1).tolist() == [True, True, True, False, False]
    empty = paged_attention(q[:0], keys, values, table[:0], lengths[:0])
    assert empty.shape == (0, 4, 16)
    assert not paged_attention(q, keys[:0], values[:0], table, lengths).any()


def test_pages_may_lie_as_other_caches_lay_them() -> None:
    q, keys, values, table, lengths = given()
    expected = paged_attention(q, keys, values, table, lengths, config=SMALL)
    joint = torch.stack([keys, values], 1)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    assert same_bits(paged_attention(q, joint[:, 0], joint[:, 1], table, lengths, config=SMALL), expected)
    assert same_bits(paged_attention(q, *heads_first, table, lengths, config=SMALL), expected)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(paged_attention(turned, keys, values, table, lengths, config=SMALL), expected)


def test_what_lies_further_on_than_32_bits_count_is_found(far_memory: torch.Tensor) -> None:
    q, table, lengths = random(1, 3, 16, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64])
    for page_size in (3, 64):  # a tile in several pages; in one
        pages = random(1, page_size, 1, 16, seed=1, dtype=torch.float16)
        far = far_memory.as_strided(pages.shape, (16, 2**31 // (page_size - 1) + 16, 16, 1), 2**31)
        far.copy_(pages)
        answers = (paged_attention(q, x, x, table, lengths.to(torch.int32).clamp(max=page_size)) for x in (pages, far))
        assert same_bits(*answers)
    far = far_memory.as_strided(q.shape, (16, 2**30, 1), 2**31)
    far.copy_(q)
    assert same_bits(*(paged_attention(x, pages, pages, table, lengths.to(torch.int32)) for x in (q, far)))


def test_a_wrong_table_is_named_when_asked_for_and_else_held_inside_the_pages() -> None:
    q, keys, values, table, lengths = given()
    table[2, 1] = 12
    last = table.clamp(max=11)
    with pytest.raises(KernelError, match=r"page_table_BM\[2, 1\] = 12: expected 0 to 11"):
        paged_attention(q, keys, values, table, lengths, check_pages=True)
    held = paged_attention(q, keys, values, last, lengths, config=SMALL)
    assert same_bits(paged_attention(q, keys, values, table, lengths, config=SMALL), held)
    lengths[0] = 32
    whole = paged_attention(q, keys, values, last, lengths, config=SMALL)
    lengths[0] = 1000
    with pytest.raises(KernelError, match="lengths_B = 1 to 1000: expected 0 to 32"):
        paged_attention(q, keys, values, last, lengths, check_pages=True)
    assert same_bits(paged_attention(q, keys, values, last, lengths, config=SMALL), whole)


def test_chosen_configurations_are_in_the_list_and_fit() -> None:
    for rows in (1, 4, 16, 17, 33, 65, 4096):
        for width in (16, 64, 128, 256):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                config = choose_config(rows, width, dtype)
                assert config in CONFIGS
                assert config.shared_bytes(width, dtype.itemsize) <= SHARED_BYTES


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert choose_splits(1024, 64, 132, 2) == 1  # 8 programs for each multiprocessor already
    assert choose_splits(256, 64, 132, 2) == 1
    assert 2 <= choose_splits(128, 64, 132, 2) <= 4
    assert 16 <= choose_splits(8, 512, 132, 2) <= 66  # one row of 32 Ki keys
    assert choose_splits(1, 1, 132, 2) == 1
    known = choose_splits.cache_info().hits
    choose_splits(1, 1, 132, 2)  # a decode step asks in every layer
    assert choose_splits.cache_info().hits == known + 1


@pytest.mark.unfenced
def test_compiles_into_one_graph() -> None:
    inputs = given()
    compiled = torch.compile(lambda *x: paged_attention(*x, config=SMALL) * 2, backend="eager", fullgraph=True)
    assert same_bits(compiled(*inputs), paged_attention(*inputs, config=SMALL) * 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_BNH": torch.zeros(3, 4, 24)}, "key_pages_PZKH.shape"),
        ({"q_BNH": torch.zeros(3, 3, 16)}, "query heads = 3, key/value heads = 2"),
        ({"q_BNH": torch.zeros(2, 4, 16)}, "lengths_B.shape"),
        ({"q_BNH": torch.zeros(3, 4, 16).double()}, "q.dtype = float64"),
        ({"q_BNH": torch.zeros(3, 4, 16).half()}, "key_pages_PZKH.dtype = float32: expected float16"),
        ({"value_pages_PZKH": torch.zeros(12, 8, 1, 16)}, "value_pages_PZKH.shape"),
        ({"key_pages_PZKH": torch.zeros(12, 8, 16, 2).transpose(2, 3)}, r"key_pages_PZKH.stride\(-1\) = 2: expected 1"),
        ({"page_table_BM": torch.zeros(3, 4)}, "page_table_BM.dtype = float32: expected int32"),
        ({"page_table_BM": torch.zeros(3, 4, 1, dtype=torch.int32)}, "page_table_BM.shape"),
        ({"lengths_B": torch.zeros(3, dtype=torch.int64)}, "lengths_B.dtype = int64: expected int32"),
        ({"lengths_B": torch.zeros(3, dtype=torch.int32, device="meta")}, "lengths_B.device = meta"),
        ({"window": 0}, "window = 0: expected at least 1"),
        ({"scale": -1.0}, "scale = -1.0: expected a positive finite number"),
        ({"softcap": float("nan")}, "softcap = nan"),
        ({"splits": 0}, "splits = 0: expected 1 to"),
        ({"splits": 2, "split_size": 64}, "splits = 2, split_size = 64: expected one of the two"),
        ({"split_size": 100}, "split_size = 100: expected a positive multiple of"),
        ({"config": CONFIGS[-1]}, "expected tiles of at most 2048 scores for float32"),
        ({"q_BNH": torch.zeros(3, 4, 16, requires_grad=True)}, "requires_grad = True: expected False"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, words) -> None:
    names = ("q_BNH", "key_pages_PZKH", "value_pages_PZKH", "page_table_BM", "lengths_B")
    with pytest.raises(KernelError, match=words) as caught:
        paged_attention(**(dict(zip(names, given(), strict=True)) | changes))
    assert len(str(caught.value).splitlines()) == 1
    assert "try" in str(caught.value)
