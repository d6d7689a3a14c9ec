"""Drawing a token as a person meets it: what is kept, who wins a tie, what is refused; the fuzzed comparison is in test_kernel_fuzz."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from tessera_kernels.reference.sample import sample as reference
from tessera_kernels.triton import sample as kernel
from tessera_kernels.triton.sample import CONFIGS, SampleConfig, choose_config, passes_of, sample
from tessera_parity.kernel_budget import noise_floor
from tessera_parity.kernel_cases.sample import JUST_BELOW_ONE, OP, SMALL, WIDE, Case, _outside
from tessera_parity.kernel_memory import same_bits
from tessera_shared.errors import KernelError
from tessera_torch.serve import sampling

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)

GRID = (torch.arange(20) + 0.5) / 20.0


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(logits: torch.Tensor, **how: object) -> list[int]:
    """Ids that one row of logits gives over evenly spaced uniforms."""
    return sample(logits.expand(len(GRID), -1), GRID, config=WIDE, **how).tolist()  # type: ignore[arg-type]


def test_ids_come_as_often_as_their_probability_says_and_the_likeliest_first() -> None:
    probs = torch.tensor([0.1, 0.6, 0.05, 0.25])
    assert drawn(probs.log()) == [1] * 12 + [3] * 5 + [0] * 2 + [2]


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.61}, {1, 3}),
        ({"top_p": 0.59}, {1}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.4}, {1, 3}),
        ({"min_p": 0.1}, {0, 1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.9}, {1, 3, 0}),  # 0.85 of 0.95 is not yet 0.9
        ({"top_k": 3, "top_p": 0.88, "min_p": 0.5}, {1}),
        ({"temperature": 0.0}, {1}),
        ({"temperature": 1e-38}, {1}),
    ],
)
def test_what_is_kept(how, kept) -> None:
    assert set(drawn(torch.tensor([0.1, 0.6, 0.05, 0.25]).log(), **how)) == kept


def test_ties_go_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0])
    first, second = drawn(logits, top_k=3), drawn(logits, top_k=4)
    assert list(dict.fromkeys(first)) == [1, 3, 0]  # -0 is 0
    assert list(dict.fromkeys(second)) == [1, 3, 0, 2]
    assert drawn(torch.zeros(50), top_k=20) == list(range(20))


def test_both_ends_of_the_uniform() -> None:
    logits = random(2, 300, seed=1)
    uniforms = torch.tensor([0.0, JUST_BELOW_ONE])
    order = logits.argsort(dim=-1, descending=True, stable=True)
    assert sample(logits, uniforms, top_k=7, config=WIDE).tolist() == [int(order[0, 0]), int(order[1, 6])]


def test_rows_that_no_law_covers() -> None:
    logits = torch.zeros(5, 40)
    logits[0] = -torch.inf
    logits[1, [7, 9]] = torch.nan
    logits[2, [3, 30]] = torch.inf
    logits[3, :39] = -torch.inf
    uniforms = torch.full((5,), 0.999)
    assert sample(logits, uniforms, config=SMALL).tolist() == [0, 7, 3, 39, 39]
    assert sample(logits, uniforms, temperature=0.0, config=SMALL).tolist() == [0, 7, 3, 39, 0]
    negative = logits.clone()
    negative[1, 7] = -negative[1, 7]  # a NaN with its sign set is a NaN
    assert sample(negative, uniforms, config=SMALL).tolist() == [0, 7, 3, 39, 39]


@pytest.mark.parametrize("how", [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.7, "min_p": 0.0}, {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.5},
])  # fmt: skip
def test_the_reference_is_the_torch_half_s_law(how) -> None:
    logits = random(50, 130, seed=3) * 2.0
    logits[5] = 1.0
    logits[6, 4] = torch.nan
    logits[7, ::2] = -torch.inf
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(4))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert same_bits(
            reference(logits.to(dtype), uniforms, **how), sampling.sample(logits.to(dtype), uniforms, **how)
        )


def test_each_row_may_have_its_own_parameters() -> None:
    logits, uniforms = random(4, 60, seed=5), torch.tensor([0.3, 0.9, 0.5, 0.99])
    how = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0]),
        "top_k": torch.tensor([0, 3, 5, 40], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 0.8]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.2]),
    }
    both = sample(logits, uniforms, config=SMALL, **how)
    for row in range(4):
        alone = {name: value[row].item() for name, value in how.items()}
        assert sample(logits[row : row + 1], uniforms[row : row + 1], config=SMALL, **alone).tolist() == [
            int(both[row])
        ]


def test_how_often_a_row_is_read() -> None:
    """Two passes while the edges lie in the first list, one more for each that does not; then pivots cut the row itself."""
    logits, uniforms = random(2, 3000, seed=6), torch.tensor([0.3, 0.9])
    config = SampleConfig(4, 64, 4, 32, 8, 4, 2, 64, 4)
    assert passes_of(logits, uniforms, temperature=0.0, config=config).tolist() == [1, 1]
    assert passes_of(logits, uniforms, top_k=64, top_p=0.9, min_p=0.1, config=config).tolist() == [2, 2]
    assert passes_of(logits * 10.0, uniforms, top_p=0.9, config=config).tolist() == [2, 2]
    assert max(passes_of(logits, uniforms, config=config).tolist()) == 2
    assert max(passes_of(logits, uniforms, top_k=2500, top_p=0.9, config=config).tolist()) <= 4
    assert passes_of(logits * 0.0, uniforms, config=config).tolist() == [3, 3]  # equals are no list, but end the search
    few = torch.where(torch.arange(3000) % 300 == 7, logits, -torch.inf)
    assert passes_of(few, uniforms, top_k=50, config=config).tolist() == [2, 2]  # fewer have mass than top-k would keep


def test_the_judge_takes_an_id_s_own_interval_and_no_other() -> None:
    logits = torch.tensor([0.1, 0.6, 0.05, 0.25]).log().double().numpy()
    assert _outside(logits, 0.7, 3, 1.0, 0, 1.0, 0.0) == 0.0
    rounding = noise_floor(torch.float32, magnitude=1.0, length=4)  # the logits are float32
    assert math.isclose(_outside(logits, 0.7, 1, 1.0, 0, 1.0, 0.0), 0.1, abs_tol=rounding)
    assert math.isclose(_outside(logits, 0.7, 0, 1.0, 0, 1.0, 0.0), 0.15, abs_tol=rounding)
    assert _outside(logits, 0.7, 0, 1.0, 2, 1.0, 0.0) == 1.0  # not kept


def test_the_judge_lets_nothing_pass_but_rounding() -> None:
    case = Case(rows=2, ids=50, values="ties", seed=11)
    given = OP.tensors(case)
    ids = reference(given["logits"].double(), given["uniforms"].double())
    right = OP.reference(case, given)
    assert not right["outside"].any()
    assert ids.shape == (2,)


def test_filters_and_tensors_share_one_compilation(monkeypatch) -> None:
    """What the compiler tells apart: constants, and the types of what is given; the first token waits for each."""
    seen = set()

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **constants: seen.add((
                tuple(value.dtype if isinstance(value, torch.Tensor) else type(value) for value in given),
                tuple(constants.items()),
            ))  # fmt: skip

    monkeypatch.setattr(kernel, "sample_kernel", Recorder())
    logits, uniforms, each = random(2, 40), torch.tensor([0.1, 0.8]), torch.tensor([0.5, 0.9])
    many = torch.tensor([3, 4], dtype=torch.int32)
    for how in (
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 0},
        {"top_p": each, "min_p": each, "top_k": many},
    ):
        sample(logits, uniforms, **how)
        sample(
            logits, uniforms, temperature=each, **{name: value for name, value in how.items() if name != "temperature"}
        )
    assert len(seen) == 1


def test_chosen_configurations_are_in_the_list() -> None:
    assert all(choose_config(ids) in CONFIGS for ids in (1, 1000, 131072, 2**20))


def test_strides_and_halves() -> None:
    logits, uniforms = random(4, 80, seed=7, dtype=torch.bfloat16), torch.tensor([0.1, 0.4, 0.7, 0.95])
    turned = logits.t().contiguous().t()
    wide = torch.full((4, 100), 99.0, dtype=torch.bfloat16)
    wide[:, 3:83] = logits
    expected = sample(logits, uniforms, top_p=0.9, config=WIDE)
    assert same_bits(sample(turned, uniforms, top_p=0.9, config=WIDE), expected)
    assert same_bits(sample(wide[:, 3:83], uniforms, top_p=0.9, config=WIDE), expected)
    assert sample(logits[:0], uniforms[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_neighbors_of_a_dtype_are_told_apart(dtype) -> None:
    ones = torch.ones(1, dtype=dtype)
    near = torch.cat([ones * (1.0 + sign * step * torch.finfo(dtype).eps) for step in range(4) for sign in (1.0, -1.0)])
    for logits in (near, -near):
        expected = logits.double().argsort(descending=True, stable=True).tolist()
        assert list(dict.fromkeys(drawn(logits))) == expected


@pytest.mark.unfenced
def test_compiles_into_one_graph() -> None:
    logits, uniforms = random(2, 40, seed=8), torch.tensor([0.1, 0.8])
    compiled = torch.compile(lambda x, u: sample(x, u, top_k=5, config=SMALL) + 1, backend="eager", fullgraph=True)
    assert same_bits(compiled(logits, uniforms), sample(logits, uniforms, top_k=5, config=SMALL) + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits_BV": torch.zeros(4)}, "logits_BV.shape = .*expected 2 dimensions"),
        ({"logits_BV": torch.zeros(2, 9).double()}, "logits_BV.dtype = float64"),
        ({"logits_BV": torch.zeros(2, 0)}, "vocabulary = 0: expected 1 to"),
        ({"uniforms_B": torch.zeros(3)}, r"uniforms_B.shape = \[3\]: expected \[2\]"),
        ({"uniforms_B": torch.zeros(2).double()}, "uniforms_B.dtype = float64"),
        ({"temperature": -1.0}, "temperature = -1.0: expected 0 to inf"),
        ({"temperature": math.inf}, "temperature = inf: expected a finite number"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1: expected 0"),
        ({"top_p": 1.5}, "top_p = 1.5: expected 0 to 1.0"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"top_p": torch.zeros(3)}, r"top_p.shape = \[3\]"),
        ({"top_k": torch.zeros(2)}, "top_k.dtype = float32: expected int32"),
        ({"min_p": torch.zeros(2, device="meta")}, "min_p.device = meta"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, words) -> None:
    given = {"logits_BV": torch.zeros(2, 9), "uniforms_B": torch.zeros(2)} | changes
    with pytest.raises(KernelError, match=words) as caught:
        sample(**given)
    assert len(str(caught.value).splitlines()) == 1
    assert "try" in str(caught.value)
