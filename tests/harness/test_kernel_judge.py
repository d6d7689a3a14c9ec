"""The judge of kernels: what it lets pass, and that each broken promise is seen. The kernel here is plain torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tessera_parity.kernel_budget import kernel_limit, noise_floor, roundoff  # noqa: E402
from tessera_parity.kernel_cases import case as draws  # noqa: E402
from tessera_parity.kernel_cases.case import DTYPES, GUARD, LAYOUTS, VALUES, KernelOp, lay_out  # noqa: E402
from tessera_parity.kernel_fuzz import Effort, fuzz  # noqa: E402
from tessera_parity.kernel_judge import KernelFault, compare, judge  # noqa: E402
from tessera_parity.kernel_memory import disturbed, fenced_memory, moved, same_bits, whole_storage  # noqa: E402
from tessera_parity.kernel_repro import repro_lines  # noqa: E402

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Softmax:
    rows: int = 5
    width: int = 33
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    config: str | None = None


def reference(case: Softmax, tensors: Tensors) -> Tensors:
    x = tensors["x"]
    up = x if x.dtype == torch.float64 else x.float()
    return {"y": up.softmax(-1).to(x.dtype)}


def clean(case: Softmax, tensors: Tensors) -> Tensors:
    x = tensors["x"]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for row, answer in zip(x.float().contiguous(), y, strict=True):  # one by one: torch sums a batch in another order
        shifted = (row - row.amax()).exp()
        answer.copy_(shifted / shifted.sum())
    return {"y": y}


def op_of(kernel: Callable[..., Tensors], **changes: Any) -> KernelOp:
    whole = KernelOp(
        name="softmax",
        cases=lambda gpu: st.builds(
            Softmax, rows=draws.sizes(tile=8, most=20, least=0), width=draws.sizes(tile=16, most=64),
            dtype=draws.dtypes(), layout=draws.layouts(), values=draws.value_kinds(), seed=draws.seeds(),
        ),
        tensors=lambda case: {"x": draws.draw(case, "x", (case.rows, case.width))},
        kernel=kernel, reference=reference, bugs=(), examples=(Softmax(),),
        row_independent=("y",), row_inputs=("x",),
    )  # fmt: skip
    return replace(whole, **changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_kernel_passes_in_every_dtype_layout_and_kind_of_values(dtype: str, layout: str) -> None:
    for values in VALUES:
        judged = judge(op_of(clean), Softmax(dtype=dtype, layout=layout, values=values), repeats=2, rows=3)
        assert judged.observed <= 1.0
        assert judged.compared > 0 or values == "inf_rows"


def test_a_right_kernel_passes_what_hypothesis_draws() -> None:
    fuzzed = fuzz(
        op_of(clean),
        device="cpu",
        seed=3,
        effort=Effort(cases=30, seconds=20.0, example_seconds=20.0, repeats=1, rows=2),
    )
    assert fuzzed.failure == ""
    assert fuzzed.cases > 25


def wrong(change: Callable[[Softmax, Tensors, Tensors], None]) -> Callable[..., Tensors]:
    def kernel(case: Softmax, tensors: Tensors) -> Tensors:
        answer = clean(case, tensors)
        change(case, tensors, answer)
        return answer

    return kernel


def _drop_last(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    answer["y"] = torch.empty_like(answer["y"])
    answer["y"][:-1] = clean(case, tensors)["y"][:-1]


def _write_past(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    whole_storage(answer["y"])[answer["y"].storage_offset() + answer["y"].numel()] = 1.0


def _write_between(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    whole_storage(tensors["x"])[GUARD + case.width] = 1.0


def _write_input(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    tensors["x"][0, 0] += 1.0


def _biased(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    answer["y"] *= 1.0 + 64.0 * roundoff(answer["y"].dtype)


def _infinite(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    answer["y"][1, 2] = torch.inf


def _batched(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    if answer["y"].shape[0] > 1:
        answer["y"][0, 0] = torch.nextafter(answer["y"][0, 0], torch.tensor(9.0))


def _renamed(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    answer["z"] = answer.pop("y")


def _widened(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
    answer["y"] = answer["y"].double()


@pytest.mark.parametrize(
    ("change", "says", "case"),
    [
        (_drop_last, "NaN or infinite", Softmax()),
        (_write_past, "fences = 1 of 1 broken", Softmax()),
        (_write_between, "input x", Softmax(layout="sliced")),
        (_write_input, "input x", Softmax()),
        (_biased, "largest error", Softmax()),
        (_biased, "error", Softmax(dtype="bfloat16")),
        (_infinite, "NaN or infinite", Softmax()),
        (_batched, "row alone", Softmax()),
        (_renamed, "outputs", Softmax()),
        (_widened, "float64", Softmax()),
    ],
)
def test_each_broken_promise_is_seen(change: Callable[..., None], says: str, case: Softmax) -> None:
    with pytest.raises(KernelFault, match=says):
        judge(op_of(wrong(change)), case, repeats=1, rows=3)


def _held(ours: float, plain: float, truth: float, dtype: torch.dtype = torch.float16) -> None:
    """Hold the second of two numbers against the rule."""
    numbers = [torch.tensor([1.0, x], dtype=dtype) for x in (ours, plain)]
    exact = torch.tensor([1.0, truth], dtype=torch.float64)
    compare(op_of(clean), Softmax(), {}, *({"y": x} for x in (*numbers, exact)))


@pytest.mark.parametrize("ours", [torch.inf, -torch.inf, torch.nan, 65000.0])
@pytest.mark.parametrize("truth", [21855.0, -70000.0])
def test_where_the_plain_one_breaks_down_anything_will_do(ours: float, truth: float) -> None:
    """It overflowed inside (inf - inf) where float64 has a number: what a sum ends in depends on its order."""
    _held(ours, torch.nan, truth)


def test_bfloat16_has_no_such_excuse() -> None:
    with pytest.raises(KernelFault, match=r"y\[1\] = inf"):
        _held(torch.inf, torch.nan, 21855.0, torch.bfloat16)


@pytest.mark.parametrize(
    ("ours", "plain", "truth"),
    [
        (torch.nan, 1.0, 1.0), (torch.inf, 1.0, 1.0), (torch.nan, torch.inf, 70000.0), (-torch.inf, torch.inf, 70000.0),
        (1.0, torch.inf, 70000.0), (1.0, torch.nan, torch.nan), (torch.inf, torch.nan, torch.nan),
    ],
)  # fmt: skip
def test_elsewhere_a_number_an_infinity_and_nan_are_what_they_should_be(
    ours: float, plain: float, truth: float
) -> None:
    with pytest.raises(KernelFault, match=r"y\[1\] = .* infinite in one and not in the other"):
        _held(ours, plain, truth)


EDGE = float(torch.finfo(torch.float16).max)
ULP = 32.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinity_within_the_limit_of_the_largest_number_is_no_fault(sign: float) -> None:
    """The limit there: one rounding of the result and one of an operand, 2^-11 of 65504 each."""
    _held(sign * torch.inf, sign * EDGE, sign * (EDGE - ULP))
    _held(sign * EDGE, sign * torch.inf, sign * (EDGE + ULP))
    for ours, plain, truth in (
        (torch.inf, EDGE - 4 * ULP, EDGE - 4 * ULP),
        (EDGE - 4 * ULP, torch.inf, EDGE + ULP),
        (-torch.inf, EDGE, EDGE - ULP),
        (torch.nan, EDGE, EDGE - ULP),
        (EDGE, torch.inf, torch.inf),
    ):
        with pytest.raises(KernelFault, match="infinite in one and not in the other"):
            _held(sign * ours, sign * plain, sign * truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_float32_cannot_resolve_of_a_sum_s_terms_is_no_fault(dtype: torch.dtype) -> None:
    """The largest and the mean error each: of all numbers, of their largest terms and of their mean ones."""
    truth = torch.full((1000,), 100.0, dtype=torch.float64)
    told = torch.full_like(truth, 1e6)
    told[0] = 1e9
    unit = noise_floor(dtype, magnitude=0.0, length=64, terms=1e6)

    def held(ours: torch.Tensor, terms: torch.Tensor | None) -> None:
        op = op_of(
            clean, terms=None if terms is None else lambda case, tensors: {"y": terms}, lengths=lambda *_: {"y": 64}
        )
        answers = (ours.to(dtype), truth.to(dtype), truth)
        compare(op, Softmax(), {}, *({"y": x} for x in answers))

    one, all_of_them = truth.clone(), truth + 0.9 * unit
    one[0] += 900.0 * unit  # within the largest terms
    for ours in (one, all_of_them):
        held(ours, told)
        with pytest.raises(KernelFault, match="largest error"):
            held(ours, None)
    with pytest.raises(
        KernelFault, match="mean error"
    ):  # each within the largest terms, all together above the mean ones
        held(truth + 100.0 * unit, told)
    with pytest.raises(KernelFault, match="largest error"):
        held(one + 200.0 * unit, told)


def test_an_answer_that_changes_from_run_to_run_is_seen_unless_the_case_says_that_its_order_is_free() -> None:
    runs = iter(range(1000))

    def drift(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
        if next(runs) % 2:
            answer["y"][0, 0] = torch.nextafter(answer["y"][0, 0], torch.tensor(9.0))

    with pytest.raises(KernelFault, match="differs in its bits from run 1"):
        judge(op_of(wrong(drift)), Softmax(), repeats=3)
    judge(op_of(wrong(drift), unordered=lambda case: frozenset({"y"})), Softmax(), repeats=3)


def test_an_exact_output_may_not_differ_at_all() -> None:
    def ids(case: Softmax, tensors: Tensors) -> Tensors:
        return {"ids": tensors["x"].argmax(-1)}

    def off(case: Softmax, tensors: Tensors) -> Tensors:
        return {"ids": (tensors["x"].argmax(-1) + (torch.arange(tensors["x"].shape[0]) == 3))}

    judge(op_of(ids, reference=ids, exact=frozenset({"ids"}), row_independent=(), row_inputs=()), Softmax())
    with pytest.raises(KernelFault, match="exactly; 1 of 5 differ"):
        judge(op_of(off, reference=ids, exact=frozenset({"ids"}), row_independent=(), row_inputs=()), Softmax())


def test_hypothesis_shrinks_a_failing_case_and_its_repro_runs() -> None:
    def late(case: Softmax, tensors: Tensors, answer: Tensors) -> None:
        if case.width > 16:
            answer["y"][..., 16:] = 0.0

    effort = Effort(cases=60, seconds=20.0, example_seconds=20.0, repeats=0, rows=0)
    fuzzed = fuzz(op_of(wrong(late), examples=()), device="cpu", seed=1, effort=effort)
    assert "width=17" in fuzzed.failing_case
    assert "rows=1" in fuzzed.failing_case
    assert "contiguous" in fuzzed.failing_case
    compile("\n".join(repro_lines("softmax", fuzzed.failing_case)), "repro", "exec")


def test_every_configuration_runs_and_one_that_fits_nothing_is_seen() -> None:
    def by_config(case: Softmax, tensors: Tensors) -> Tensors:
        answer = clean(case, tensors)
        if case.config == "bad":
            answer["y"] *= 2.0
        return answer

    effort = Effort(cases=0, seconds=5.0, example_seconds=5.0, repeats=0, rows=0, config_seconds=5.0)
    fuzzed = fuzz(op_of(by_config, configs=lambda: ("a", "b")), device="cpu", seed=0, effort=effort)
    assert fuzzed.configs_run == {"'a'": 1, "'b'": 1}
    fuzzed = fuzz(op_of(by_config, configs=lambda: ("a", "bad")), device="cpu", seed=0, effort=effort)
    assert "config='bad'" in fuzzed.failing_case

    def refuses(case: Softmax, tensors: Tensors) -> Tensors:
        from tessera_shared.errors import KernelError

        if case.config == "b":
            raise KernelError("config = b: expected another, because of this test; try a")
        return clean(case, tensors)

    fuzzed = fuzz(op_of(refuses, configs=lambda: ("a", "b")), device="cpu", seed=0, effort=effort)
    assert "1 configurations fit no example" in fuzzed.failure


@given(
    layout=st.sampled_from(LAYOUTS), shape=st.lists(st.integers(0, 5), max_size=4), dtype=st.sampled_from(DTYPES)
)  # fmt: skip
def test_layouts_keep_the_values_and_surround_them_with_poison(layout: str, shape: list[int], dtype: str) -> None:
    x = torch.randn(shape).to(getattr(torch, dtype))
    laid = lay_out(x, layout)
    assert same_bits(laid.contiguous(), x)
    again = moved(laid, "cpu")
    assert again.stride() == laid.stride()
    assert again.storage_offset() == laid.storage_offset()
    assert not disturbed(laid, again, may_write=False)
    around = int(whole_storage(laid).isnan().sum())
    assert around == whole_storage(laid).numel() - x.numel()


def test_fresh_memory_is_poison_between_fences() -> None:
    with fenced_memory() as fences:
        made = [
            torch.empty(3, 4),
            torch.empty((3, 4), dtype=torch.bfloat16),
            torch.empty_like(torch.zeros(2, 5).t()),
            torch.zeros(2).new_empty((4,)),
            torch.empty_strided((2, 3), (8, 1)),
        ]
        ints = torch.empty(5, dtype=torch.int32)
    assert all(bool(tensor.isnan().all()) for tensor in made)
    assert bool((ints == torch.iinfo(torch.int32).min).all())
    assert made[2].stride() == (1, 5)
    assert len(fences.allocations) == 6
    assert fences.broken() == 0
    whole_storage(made[3])[made[3].storage_offset() - 1] = 0.0
    assert fences.broken() == 1
    assert not bool(torch.empty(0).is_meta)


@given(
    plain=st.floats(0.0, 1.0), magnitude=st.floats(0.0, 1e4), length=st.integers(0, 10**6), terms=st.floats(0.0, 1e9)
)
def test_the_limit_grows_with_the_plain_error_the_magnitude_the_length_and_the_terms(
    plain: float, magnitude: float, length: int, terms: float
) -> None:
    for name in DTYPES:
        dtype = getattr(torch, name)
        limit = kernel_limit(plain, dtype, magnitude=magnitude, length=length)
        assert limit >= 2.0 * plain
        assert limit <= kernel_limit(plain, dtype, magnitude=magnitude, length=length, terms=terms)
        assert limit == kernel_limit(plain, dtype, magnitude=magnitude, length=length, terms=magnitude)
        assert limit <= kernel_limit(plain, dtype, magnitude=2.0 * magnitude, length=length + 1)
        assert noise_floor(dtype, magnitude=magnitude, length=length) > 0.0
