"""Attention in CUDA C++ as a person meets it, run by the emulator; the fuzzed comparison is in test_kernel_fuzz."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from tessera_kernels import cuda
from tessera_kernels.cuda import flash_attention as kernels
from tessera_kernels.cuda._attention_configs import CONFIGS, CudaConfig, choose_config, padded_width
from tessera_kernels.cuda._attention_waves import backward_turns, turns
from tessera_kernels.cuda._compile import build
from tessera_kernels.cuda.flash_attention import (
    BACKWARD_ENTRIES,
    ampere,
    backward,
    flash_attention,
    flash_attention_varlen,
    has_backward,
    hopper,
)
from tessera_kernels.reference import flash_attention as plain
from tessera_parity.kernel_budget import kernel_limit
from tessera_parity.kernel_cases.cuda_flash_attention import AMPERE, HOPPER
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)

BOTH = pytest.mark.parametrize("config", [AMPERE, HOPPER], ids=["sm80", "sm90"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows: int = 1, queries: int = 20, keys: int = 20, heads: int = 2, kv_heads: int = 1, width: int = 16):
    q = random(rows, queries, heads, width, seed=1)
    return q, random(rows, keys, kv_heads, width, seed=2), random(rows, keys, kv_heads, width, seed=3)


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@BOTH
def test_queries_that_see_nothing_give_zero_and_take_no_part_in_gradients(config: CudaConfig) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(queries=20, keys=7))
    out, lse = flash_attention(q, k, v, config=config)
    assert bool((out[:, :13] == 0.0).all())
    assert bool((lse[:, :, :13] == -torch.inf).all())
    assert bool((out[:, 13:] != 0.0).any(-1).all())
    grads = torch.autograd.grad([out, lse], [q, k, v], [random(*out.shape), random(*lse.shape).float()])
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert bool((grads[0][:, :13] == 0.0).all())


@BOTH
def test_a_later_key_changes_no_earlier_query(config: CudaConfig) -> None:
    q, k, v = inputs(queries=90, keys=90)
    before, _ = flash_attention(q, k, v, config=config)
    k[:, 71], v[:, 71] = 5.0, -5.0
    after, _ = flash_attention(q, k, v, config=config)
    assert same_bits(before[:, :71].contiguous(), after[:, :71].contiguous())
    assert not bool((before[:, 71:] == after[:, 71:]).all(-1).any())


@BOTH
def test_a_window_hides_what_is_as_far_as_it_is_wide(config: CudaConfig) -> None:
    q, k, v = inputs(queries=90, keys=90)
    before, _ = flash_attention(q, k, v, window=4, config=config)
    k[:, 65], v[:, 65] = 5.0, -5.0
    after, _ = flash_attention(q, k, v, window=4, config=config)
    changed_T = (before != after).flatten(2).any(-1)[0]
    assert changed_T.nonzero().flatten().tolist() == [65, 66, 67, 68]


@BOTH
@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_a_window_wider_than_any_sequence_hides_nothing(config: CudaConfig, window: int) -> None:
    q, k, v = inputs(queries=90, keys=70)
    for causal in (True, False):
        plainly, windowed = (flash_attention(q, k, v, causal=causal, window=w, config=config) for w in (None, window))
        assert all(same_bits(a, b) for a, b in zip(plainly, windowed, strict=True))


@BOTH
def test_packed_sequences_of_one_length_equal_the_batch_bit_for_bit(config: CudaConfig) -> None:
    q, k, v = inputs(rows=3, queries=9, keys=70)
    out, lse = flash_attention(q, k, v, config=config)
    tail = torch.full((2, 2, 16), torch.nan, dtype=q.dtype)  # rows of no sequence
    packed, packed_lse = flash_attention_varlen(
        torch.cat([q.flatten(0, 1), tail]), *(torch.cat([x.flatten(0, 1), tail[:, :1]]) for x in (k, v)),
        starts(9, 9, 9), starts(70, 70, 70), longest_query=9, longest_key=70, config=config,
    )  # fmt: skip
    assert same_bits(packed[:27].unflatten(0, (3, 9)), out)
    assert same_bits(packed_lse[:, :27].unflatten(1, (3, 9)).transpose(0, 1).contiguous(), lse)
    assert not packed[27:].any()


@BOTH
def test_the_same_call_gives_the_same_bits_in_every_order_of_threads(config: CudaConfig) -> None:
    q, k, v = inputs(queries=40, keys=150, width=64)
    calls = [flash_attention(q, k, v, config=config) for _ in range(4)]  # the emulator turns the order each time
    assert all(same_bits(a, b) for call in calls[1:] for a, b in zip(call, calls[0], strict=True))


def test_it_is_as_exact_as_the_plain_implementation_on_chosen_configurations() -> None:
    for width in (64, 128, 256):
        q, k, v = inputs(queries=70, keys=200, width=width)
        for arch in (80, 90):
            found, _ = flash_attention(q, k, v, config=choose_config(width, arch))
            truth, _ = plain.flash_attention(q.double(), k.double(), v.double())
            usual, _ = plain.flash_attention(q, k, v)
            limit = kernel_limit(
                float((usual - truth).abs().max()), found.dtype, magnitude=float(truth.abs().max()), length=200
            )
            assert float((found - truth).abs().max()) <= limit


@pytest.mark.unfenced
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_into_one_graph() -> None:
    leaves = [x.requires_grad_() for x in inputs(queries=5, keys=5)]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = flash_attention(q, k, v, config=AMPERE)
        return out.float().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_on_hopper_nothing_spills(width: int) -> None:
    built = build(hopper(torch.bfloat16, width, choose_config(width, 90)), "sm_90a")
    assert (built.spill_bytes, built.stack_bytes, built.slow) == (0, 0, "")


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_backward_overlaps_as_much_as_registers_allow(overlap: int) -> None:
    built = build(backward(torch.bfloat16, overlap, BACKWARD_ENTRIES[1]), "sm_90a")
    assert (built.spill_bytes, built.stack_bytes, built.slow) == (0, 0, "")


def test_an_overlap_that_does_not_fit_into_registers_is_told(tmp_path: Path) -> None:
    """What the test above would miss if the assembler's words changed."""
    folder = Path(str(cuda.__file__)).parent
    source = (folder / "flash_attention_backward_sm90.cu").read_text(encoding="utf-8")
    greedy = tmp_path / "greedy.cu"
    greedy.write_text(source.replace("group_wait<OVERLAP == 1>();", "group_wait<1>();"), encoding="utf-8")
    kernel = replace(backward(torch.bfloat16, 2, BACKWARD_ENTRIES[1]), file=str(greedy))
    assert "insufficient register resources" in build(kernel, "sm_90a").slow


def test_on_ampere_nothing_spills() -> None:
    for width in (64, 128, 256):
        built = build(ampere(torch.float16, width, choose_config(width, 80)), "sm_80")
        assert (built.spill_bytes, built.stack_bytes) == (0, 0)


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_fused_backward_is_as_exact_as_the_plain_one(overlap: int) -> None:
    leaves = [x.requires_grad_() for x in inputs(rows=2, queries=130, keys=150, heads=4, kv_heads=2, width=96)]
    upstream = [random(2, 130, 4, 96, seed=4), random(2, 4, 130, seed=5).float()]
    config = HOPPER._replace(overlap=overlap)
    assert has_backward(96, None, False, config)
    found = torch.autograd.grad(flash_attention(*leaves, config=config), leaves, upstream)
    lifted = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(plain.flash_attention(*lifted), lifted, [x.double() for x in upstream])
    usual = torch.autograd.grad(plain.flash_attention(*leaves), leaves, upstream)
    for ours, exact, other in zip(found, truth, usual, strict=True):
        error = float((other - exact).abs().max())
        limit = kernel_limit(error, ours.dtype, magnitude=float(exact.abs().max()), length=150)
        assert float((ours - exact).abs().max()) <= limit


@pytest.mark.parametrize(
    ("width", "softcap", "deterministic", "config"),
    [(64, None, False, HOPPER), (128, 2.0, False, HOPPER), (128, None, True, HOPPER), (128, None, False, AMPERE)],
)
def test_elsewhere_the_backward_is_tritons(
    width: int, softcap: float | None, deterministic: bool, config: CudaConfig
) -> None:
    assert not has_backward(width, softcap, deterministic, config)


@pytest.mark.parametrize(
    ("lanes", "section", "length", "causal", "turned"),
    [
        (128, 24, 4096, True, True),  # a section is four whole waves: without turning, block 0 has each wave's heaviest
        (128, 12, 4096, True, True),
        (64, 32, 4096, False, False),
        (3, 3, 192, True, False),
    ],
)
def test_waves_turn_where_blocks_then_end_sooner(
    lanes: int, section: int, length: int, causal: bool, turned: bool
) -> None:
    """Against a walk over every tile and query, tiles of 192 by 128, 132 blocks."""
    blocks, far = -(-length // 192), 2**29
    ends = {}
    for turning in (False, True):
        ends[turning] = [0] * 132
        tiles = [
            block
            for first in range(0, lanes, section)
            for block in reversed(range(blocks))
            for _ in range(first, min(first + section, lanes))
        ]
        for number, block in enumerate(tiles):
            wave, place = divmod(number, 132)
            keys = min(192 * (block + 1), length) if causal else length
            ends[turning][131 - place if turning and wave % 2 else place] += -(-keys // 128) + 1
    assert (max(ends[True]) < max(ends[False])) is turned
    sizes = (1, length, length, lanes, 1, section, blocks, far, 0 if causal else far)
    assert turns(sizes, 192, 128, 132) is turned


def test_the_backward_turns_by_the_queries_that_see_its_keys() -> None:
    far = 2**29
    assert backward_turns((8, 4096, 4096, 16, 1, 33, 64, far, 0), 132)  # a section is eight whole waves
    assert not backward_turns((8, 4096, 4096, 16, 1, 33, 64, far, far), 132)


def test_grids_of_very_many_heads_are_grids_that_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA: at most 2^31 - 1 blocks along x, 65,535 along y and z."""
    grids: list[tuple[int, int, int]] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *, grid, **rest: grids.append(grid))
    q, k, v = (torch.zeros(1, 1, 65_537, 80, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    out, _ = flash_attention(q, k, v, config=choose_config(80, 90))
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    assert len(grids) == 4
    assert all(x < 2**31 and max(y, z) <= 65_535 for x, y, z in grids)


def test_chosen_configurations_are_in_the_list() -> None:
    for width in range(16, 257, 16):
        assert choose_config(width, 90) in CONFIGS
        assert choose_config(width, 90).width == padded_width(width)
        assert choose_config(width, 80) in CONFIGS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"q": random(1, 5, 2, 24)}, "head width"),
        ({"k": random(1, 5, 1, 32)}, "k_BSKH.shape"),
        ({"q": random(1, 5, 2, 16).float()}, "dtype"),
        ({"v": random(1, 5, 1, 16).half()}, "v_BSKH.dtype"),
        ({"window": 0}, "window = 0"),
        ({"config": CONFIGS[0], **{name: random(1, 5, 1, 128) for name in "qkv"}}, "config.width = 64: expected 128"),
        ({"config": CudaConfig(70, 4, 64, 2)}, "config.arch = 70"),
        ({"config": CudaConfig(90, 2, 256, 8)}, "shared memory"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, what: str) -> None:
    q, k, v = (change.pop(name, x) for name, x in zip("qkv", inputs(queries=5, keys=5), strict=True))
    with pytest.raises(KernelError, match=re.escape(what)) as caught:
        flash_attention(q, k, v, **change)
    assert "\n" not in str(caught.value)
