"""Attention as a person meets it: what is masked, packed, strided, refused; the fuzzed comparison is in test_kernel_fuzz."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tessera_kernels.attention_rule import CACHE_BYTES, Rule, heads_at_once
from tessera_kernels.reference import flash_attention as reference
from tessera_kernels.triton import flash_attention as module
from tessera_kernels.triton.flash_attention import (
    CONFIGS,
    AttentionConfig,
    choose_config,
    flash_attention,
    flash_attention_varlen,
)
from tessera_kernels.triton.flash_attention_configs import SHARED_BYTES, SUMS_AND_SCORES
from tessera_parity.kernel_budget import kernel_limit
from tessera_parity.kernel_cases.flash_attention import OP, SMALL_FUSED, SMALL_SPLIT, Case
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows: int = 1, queries: int = 20, keys: int = 20, heads: int = 2, kv_heads: int = 1, width: int = 16):
    q = random(rows, queries, heads, width, seed=1)
    return q, random(rows, keys, kv_heads, width, seed=2), random(rows, keys, kv_heads, width, seed=3)


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_queries_that_see_nothing_give_zero_and_take_no_part_in_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(queries=20, keys=7))
    out, lse = flash_attention(q, k, v)
    assert bool((out[:, :13] == 0.0).all())
    assert bool((lse[:, :, :13] == -torch.inf).all())
    assert bool(torch.isfinite(lse[:, :, 13:]).all())
    assert bool((out[:, 13:] != 0.0).any(-1).all())
    grads = torch.autograd.grad([out, lse], [q, k, v], [random(*out.shape), random(*lse.shape)])
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert bool((grads[0][:, :13] == 0.0).all())
    assert bool((grads[0][:, 13:] != 0.0).any())


def test_a_later_key_changes_no_earlier_query() -> None:
    q, k, v = inputs()
    before, _ = flash_attention(q, k, v)
    k[:, 11], v[:, 11] = 5.0, -5.0
    after, _ = flash_attention(q, k, v)
    assert same_bits(before[:, :11].contiguous(), after[:, :11].contiguous())
    assert not bool((before[:, 11:] == after[:, 11:]).all(-1).any())


def test_a_window_hides_what_is_as_far_as_it_is_wide() -> None:
    q, k, v = inputs()
    before, _ = flash_attention(q, k, v, window=4)
    k[:, 5], v[:, 5] = 5.0, -5.0
    after, _ = flash_attention(q, k, v, window=4)
    changed_T = (before != after).flatten(2).any(-1)[0]
    assert changed_T.nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("window", [40, 2**31 - 1, 2**40])
def test_a_window_wider_than_the_keys_changes_no_bit(window: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    for causal in (True, False):
        answers = []
        for width in (None, window):
            outputs = flash_attention(q, k, v, causal=causal, window=width, config=SMALL_SPLIT)
            answers.append((*outputs, *torch.autograd.grad(outputs, (q, k, v), [torch.ones_like(x) for x in outputs])))
        assert all(same_bits(a, b) for a, b in zip(*answers, strict=True))


def test_packed_sequences_of_one_length_equal_the_batch_bit_for_bit() -> None:
    q, k, v = inputs(rows=3, queries=9, keys=12)
    out, lse = flash_attention(q, k, v)
    packed, packed_lse = flash_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), starts(9, 9, 9), starts(12, 12, 12), longest_query=9, longest_key=12
    )
    assert same_bits(packed.unflatten(0, (3, 9)), out)
    assert same_bits(packed_lse.unflatten(1, (3, 9)).transpose(0, 1).contiguous(), lse)


def test_starts_beyond_the_tensor_read_and_write_nothing_outside() -> None:
    """The host never reads them, so the kernel holds them inside: wrong numbers, no fault."""
    q, k, v = (x[0] for x in inputs())
    out, lse = flash_attention_varlen(
        q, k, v, torch.tensor([0, 900, 30], dtype=torch.int32), torch.tensor([-5, 700, 20], dtype=torch.int32),
        longest_query=20, longest_key=20,
    )  # fmt: skip
    assert bool(torch.isfinite(out).all())
    assert same_bits(out, flash_attention(q[None], k[None], v[None])[0][0])
    assert lse.shape == (2, 20)


def test_many_short_sequences_fit_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 65,535 programs in a grid's second dimension; the interpreter takes any number."""
    grids = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(module.backward_kernels, "delta_kernel", Launched())
    out, row = torch.zeros(9, 2, 16), torch.zeros(2, 9)
    module._statistics(out, out, None, row, row, torch.zeros(70_001, dtype=torch.int32), 1, Rule(1.0, 0.0, 0))
    assert grids == [(140_000,)]


def test_heads_that_run_at_one_time_fill_the_cache_and_are_no_more_than_there_are() -> None:
    assert heads_at_once(CACHE_BYTES // 3, most=100) == 3
    assert heads_at_once(CACHE_BYTES // 3, group=4, most=100) == 12
    assert heads_at_once(CACHE_BYTES + 1, most=100) == 1
    assert heads_at_once(1, most=12) == 12


def test_no_sequence_at_all_gives_zeros() -> None:
    q, k, v = (x[0].requires_grad_() for x in inputs())
    none = starts()
    out, lse = flash_attention_varlen(q, k, v, none, none, longest_query=0, longest_key=0)
    assert bool((out == 0.0).all())
    assert bool((lse == -torch.inf).all())
    assert all(bool((grad == 0.0).all()) for grad in torch.autograd.grad(out.sum(), [q, k, v]))


@pytest.mark.parametrize("config", [None, SMALL_SPLIT, SMALL_FUSED])
def test_heads_before_positions_in_memory_change_no_bit(config) -> None:
    q, k, v = inputs(rows=2, heads=4, kv_heads=2)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert all(x.stride() != y.stride() for x, y in zip(turned, (q, k, v), strict=True))
    plain = flash_attention(q, k, v, config=config)
    assert all(
        same_bits(a.contiguous(), b) for a, b in zip(flash_attention(*turned, config=config), plain, strict=True)
    )


def test_an_expanded_gradient_is_taken() -> None:
    leaves = [x.requires_grad_() for x in inputs(queries=5, keys=5)]
    grads = torch.autograd.grad(flash_attention(*leaves)[0].sum(), leaves)
    ones = torch.autograd.grad(flash_attention(*leaves)[0], leaves, torch.ones_like(leaves[0]))
    assert all(same_bits(a, b) for a, b in zip(grads, ones, strict=True))


def test_the_gradient_of_the_log_sum_exp_alone() -> None:
    leaves = [x.requires_grad_() for x in inputs(queries=9, keys=9)]
    grads = torch.autograd.grad(flash_attention(*leaves)[1].sum(), leaves[:2])
    double = [x.detach().double().requires_grad_() for x in leaves]
    truth, plain = (
        torch.autograd.grad(reference.flash_attention(*x)[1].sum(), x[:2]) for x in (double, leaves)
    )  # fmt: skip
    for grad, exact, usual in zip(grads, truth, plain, strict=True):
        own = float((usual - exact).abs().max())
        limit = kernel_limit(own, torch.float32, magnitude=float(exact.abs().max()), length=9)
        assert float((grad - exact).abs().max()) <= limit


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=37, keys=50, group=2, dtype="bfloat16", config=SMALL_FUSED),
        Case(queries=35, keys=35, dtype="float16", softcap=2.0, window=5, causal=False, config=SMALL_FUSED),
        Case(rows=3, queries=20, keys=35, packed=True, dtype="bfloat16", seed=1, config=SMALL_FUSED),
        Case(queries=20, keys=40, values="extreme", dtype="bfloat16", config=SMALL_FUSED),
    ],
)
def test_the_fused_backward_keeps_the_rule(case: Case) -> None:
    """Its additions come one after the other here; on a GPU their order is not fixed and its own lane asks."""
    assert judge(OP, case).compared > 0
    assert OP.unordered(case) == frozenset({"grad q"})
    assert OP.unordered(replace(case, config=SMALL_SPLIT)) == frozenset()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("config", [SMALL_SPLIT, SMALL_FUSED])
def test_what_is_wrong_in_one_packed_sequence_reaches_no_other(config: AttentionConfig) -> None:
    """Tiles of a sequence's last queries reach past its end, into memory that belongs to the next."""
    lengths = (5, 19, 3, 16)
    q, k, v = (x[0].requires_grad_() for x in inputs(queries=43, keys=43))
    with torch.no_grad():
        q[5:24] = torch.nan
    edges = starts(*lengths)
    out, _ = flash_attention_varlen(q, k, v, edges, edges, longest_query=19, longest_key=19, config=config)
    grads = torch.autograd.grad(out, [q, k, v], random(*out.shape, seed=5))
    clean = torch.ones(43, dtype=torch.bool)
    clean[5:24] = False
    assert all(bool(torch.isfinite(x[clean]).all()) and bool(torch.isnan(x[~clean]).all()) for x in (out, *grads))


@pytest.mark.parametrize("config", [SMALL_SPLIT, SMALL_FUSED])
def test_scores_of_1e10_pick_their_value_and_its_gradient(config: AttentionConfig) -> None:
    """Where one rounding of a score is worth thousands, neither overflow nor nothing must come of it."""
    q = torch.full((1, 3, 1, 16), 6e4)
    k = torch.tensor([1.0, 3.0, 2.0, 3.0])[None, :, None, None] * torch.full((1, 4, 1, 16), 2e4)
    q, k, v = (x.requires_grad_() for x in (q, k, random(1, 4, 1, 16)))
    out, lse = flash_attention(q, k, v, causal=False, config=config)
    dout = random(1, 3, 1, 16, seed=7)
    grad = torch.autograd.grad(out, v, dout)[0]
    assert torch.equal(out, (0.5 * (v[:, 1] + v[:, 3]))[:, None].expand_as(out))
    score = 6e4 * 6e4 * 16 / 4
    assert float((lse.detach() - score).abs().max()) <= kernel_limit(0.0, torch.float32, magnitude=score, length=16)
    assert bool((grad[0, [0, 2]] == 0.0).all())
    shares = grad[0, [1, 3]] / dout.sum(1)  # two equal keys: a half each, or the bound of one
    assert bool(((shares >= 0.49) & (shares <= 1.01)).all())


def test_every_configuration_fits_some_head_width_and_the_chosen_ones_fit_theirs() -> None:
    for config in CONFIGS:
        assert all(part.shared_bytes(64, 2) <= SHARED_BYTES for part in config)
        assert all(part.registers(64) <= SUMS_AND_SCORES for part in config)
    for width in range(16, 257, 16):
        padded = 1 << (width - 1).bit_length()
        for dtype in (torch.float32, torch.bfloat16):
            config = choose_config(width, dtype)
            assert config.deterministic
            assert all(part.shared_bytes(padded, dtype.itemsize) <= SHARED_BYTES for part in config)
            assert dtype == torch.float32 or all(part.registers(padded) <= SUMS_AND_SCORES for part in config)


@pytest.mark.unfenced
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_into_one_graph() -> None:
    leaves = [x.requires_grad_() for x in inputs(queries=5, keys=5)]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = flash_attention(q, k, v)
        return out.sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"q": random(1, 5, 2, 24)}, "head width"),
        ({"k": random(1, 5, 1, 32)}, "k_BSKH.shape"),
        ({"v": random(1, 6, 1, 16)}, "v_BSKH.shape"),
        ({"q": random(5, 2, 16)}, "4 dimensions"),
        ({"q": random(1, 5, 3, 16), "k": random(1, 5, 2, 16), "v": random(1, 5, 2, 16)}, "query heads = 3"),
        ({name: random(1, 5, 1, 272) for name in "qkv"}, "head width = 272"),
        ({"q": random(1, 5, 2, 16).double()}, "dtype"),
        ({"v": random(1, 5, 1, 16).half()}, "v_BSKH.dtype"),
        ({"v": random(1, 5, 1, 16).to("meta")}, "device"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"softcap": -1.0}, "softcap = -1.0"),
        ({"window": 0}, "window = 0"),
        ({"deterministic": True, "config": SMALL_FUSED}, "config.keys.fused = 2"),
        ({"config": CONFIGS[0]}, "float32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, what) -> None:
    given = dict(zip("qkv", inputs(queries=5, keys=5), strict=True)) | change
    q, k, v = (given.pop(name) for name in "qkv")
    with pytest.raises(KernelError) as caught:
        flash_attention(q, k, v, **given)
    message = str(caught.value)
    assert what in message
    assert "\n" not in message
    assert "expected" in message
    assert "try" in message


def test_starts_of_another_dtype_are_refused() -> None:
    q, k, v = (x[0] for x in inputs())
    with pytest.raises(KernelError, match="int32"):
        flash_attention_varlen(q, k, v, starts(20).long(), starts(20), longest_query=20, longest_key=20)
