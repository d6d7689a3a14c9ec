"""The linear distillation loss on the CPU interpreter: conventions, digits near convergence, traps of its peers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera_kernels.reference import linear_distillation as plain
from tessera_kernels.triton import _divergence_tile_kernels
from tessera_kernels.triton import linear_distillation as fused
from tessera_kernels.triton._divergence_series import DIVERGENCES, ORDER, coefficients
from tessera_kernels.triton._loss_plans import LossConfig
from tessera_parity.budget import gamma, mathematics_limit
from tessera_parity.kernel_budget import FACTOR, noise_floor, roundoff
from tessera_shared.errors import KernelError
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import DistilOptions, Divergence, Objective, TemperatureScale
from tessera_torch.distil.losses import training_loss

X, D, F, V = 7, 24, 30, 150


def inputs(dtype: torch.dtype = torch.float32, *, near: float | None = None) -> tuple[Tensor, ...]:
    """Student, its head, teacher, its head, labels. A near teacher is the student and a little more width."""
    stream = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream)

    student, head = normal(X, D).to(dtype), normal(V, D).to(dtype)
    if near is None:
        teacher, teacher_head = normal(X, F).to(dtype), normal(V, F).to(dtype)
    else:
        teacher = torch.cat([student, (near * normal(X, F - D)).to(dtype)], 1)
        teacher_head = torch.cat([head, normal(V, F - D).to(dtype)], 1)
    labels = torch.randint(0, V, (X,), generator=stream)
    labels[3] = -100
    return student, head, teacher, teacher_head, labels


def gradients(op, student: Tensor, head: Tensor, *rest: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    student, head = student.clone().requires_grad_(), head.clone().requires_grad_()
    loss, count = op.linear_distillation(student, head, *rest, **options)
    (loss / count).backward()
    assert student.grad is not None
    assert head.grad is not None
    return loss.detach(), student.grad, head.grad


def doubled(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in given)


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_speaks_the_conventions_of_the_torch_half(divergence: str, squared: bool) -> None:
    student, head, teacher, teacher_head, labels = doubled(inputs())
    options = {"temperature": 1.7, "beta": 0.3, "alpha": 0.2}
    ours = plain.linear_distillation(
        student, head, teacher, teacher_head, labels, divergence=divergence, temperature_squared=squared,
        label_weight=0.4, z_loss=1e-2, vocab_size=V - 3, **options,
    )  # fmt: skip
    scale = TemperatureScale.SQUARED if squared else TemperatureScale.NONE
    distil = DistilOptions(
        divergence=Divergence(divergence), temperature_scale=scale, hard_weight=0.4, real_vocab_size=V - 3, **options
    )
    theirs = training_loss(
        (student @ head.T)[None], (teacher @ teacher_head.T)[None], torch.where(labels < V - 3, labels, -100)[None],
        objective=Objective(distil=distil, z_loss=1e-2), numerics=FLOAT64,
    )  # fmt: skip
    assert int(labels.max()) < V - 3, "the case has no label among the padding"
    assert error(ours[0], theirs[0]) <= mathematics_limit(4, length=V)
    assert int(ours[1]) == int(theirs[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_convergence_loss_and_gradients_keep_the_digits_of_float32_logits(divergence: str) -> None:
    given = inputs(torch.bfloat16, near=1e-2)
    student, head, teacher, teacher_head, labels = given
    truth = gradients(plain, *doubled(given), divergence=divergence)
    assert 1e-5 < float(truth[0]) / X < 1e-2
    ours = gradients(fused, *given, divergence=divergence, chunk_bytes=192 * 10 * 3)
    eye = torch.eye(V, dtype=torch.float64)
    logits = (student.float() @ head.float().T).double(), (teacher.float() @ teacher_head.float().T).double()
    best = gradients(plain, logits[0], eye, logits[1], eye, labels, divergence=divergence)
    floor = noise_floor(torch.float32, magnitude=1.0, length=V)
    assert error(ours[0], truth[0]) <= FACTOR * error(best[0], truth[0]) + floor
    slopes = best[1].bfloat16().double()
    rounded = (slopes @ head.double()).bfloat16(), (slopes.T @ student.double()).bfloat16()
    for found, ideal, true in zip(ours[1:], rounded, truth[1:], strict=True):
        assert error(found, true) <= FACTOR * error(ideal, true)
    older = gradients(plain, *given, divergence=divergence)
    assert error(older[1], truth[1]) > 10 * error(ours[1], truth[1])


@pytest.mark.parametrize("distance", [1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_given_logits_cost_no_digits_however_close_the_models_are(divergence: str, distance: float) -> None:
    stream = torch.Generator().manual_seed(12)
    logits = 2.0 * torch.randn(X, V, generator=stream)
    theirs = logits + distance * torch.randn(X, V, generator=stream)
    labels = torch.zeros(X, dtype=torch.int64)
    given = logits, torch.eye(V), theirs, torch.eye(V), labels
    truth = gradients(plain, *doubled(given), divergence=divergence)
    ours = gradients(fused, *given, divergence=divergence)
    floor = noise_floor(torch.float32, magnitude=1.0, length=V)
    assert error(ours[0], truth[0]) <= floor
    assert error(ours[1], truth[1]) <= floor


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_lose_nothing_and_learn_nothing_even_with_padded_heads(divergence: str) -> None:
    student, head, _, _, labels = inputs(torch.bfloat16)
    padded = torch.cat([head, torch.full((9, D), 3.0, dtype=head.dtype)])
    loss, d_student, d_head = gradients(
        fused, student, padded, student, padded[:-2], labels, divergence=divergence, temperature=2.0, vocab_size=V
    )
    assert float(loss) == 0.0
    assert not d_student.any()
    assert not d_head.any()


OWN, LIBRARY = LossConfig(product=2), LossConfig(product=1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sums_of_the_products_tiles_give_what_a_walk_of_its_own_gives(divergence: str) -> None:
    """600 ids are three tiles, the last cut off; slopes of both round to bfloat16, and ratios to float16 before."""
    stream = torch.Generator().manual_seed(13)
    sizes = ((X, D), (600, D), (X, D + 8), (600, D + 8))
    given = *(torch.randn(*size, generator=stream).bfloat16() for size in sizes), torch.arange(X) * 90
    options = {
        "divergence": divergence,
        "temperature": 1.7,
        "label_weight": 0.3,
        "z_loss": 1e-2,
        "chunk_bytes": 640 * 10 * 3,
    }
    truth = gradients(plain, *doubled(given), **{name: options[name] for name in options if name != "chunk_bytes"})
    own, library = (gradients(fused, *given, config=config, **options) for config in (OWN, LIBRARY))
    assert error(own[0], truth[0]) <= noise_floor(torch.float32, magnitude=1.0, length=600)
    for ours, theirs, true in zip(own[1:], library[1:], truth[1:], strict=True):
        assert error(ours, true) <= FACTOR * error(theirs, true)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_equal_sums_of_tiles(divergence: str) -> None:
    student, head, _, _, labels = inputs(torch.bfloat16)
    loss, d_student, d_head = gradients(
        fused, student, head, student, head, labels, divergence=divergence, temperature=2.0, config=OWN
    )
    assert float(loss) == 0.0
    assert not d_student.any()
    assert not d_head.any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "generalized_jsd"])
def test_an_id_with_all_of_the_students_mass_has_a_slope_of_its_distance_to_the_others(divergence: str) -> None:
    """Its G is the sum to 1 part in 1,000 of itself: rounded apart from the sum, its slope would be off by 4 to 7 %."""
    identity = torch.eye(16)
    student = torch.zeros(1, 16).index_fill(1, torch.tensor([3]), 10.0)
    teacher = torch.zeros(1, 16).index_fill(1, torch.tensor([3, 5]), 7.3125)
    given = *(x.bfloat16() for x in (student, identity, teacher, identity)), torch.zeros(1, dtype=torch.int64)
    truth = gradients(plain, *doubled(given), divergence=divergence)[1]
    ours = gradients(fused, *given, divergence=divergence, config=OWN)[1].double()
    assert float((ours / truth - 1.0).abs().max()) < 2.0**-8


def short(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A product that lacks as much of itself as tensor cores cut off 2,048 terms."""
    return out.copy_((a.float() @ b.float()) * (1.0 - 2.0**-19))


@pytest.mark.parametrize("mode", ["chunked", "no_logits"])
def test_a_label_has_a_product_of_its_own(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    student, head, teacher, teacher_head, labels = inputs(torch.bfloat16)
    counted = labels >= 0
    head *= 0.2
    head[labels[counted]] = (
        student[counted] * (14.0 / student[counted].float().square().sum(-1, keepdim=True))
    ).bfloat16()
    given = student, head, teacher, teacher_head, labels
    truth = gradients(plain, *doubled(given), label_weight=1.0)[0]
    monkeypatch.setattr(fused, "product", short)
    ours = gradients(fused, *given, label_weight=1.0, mode=mode)[0]
    logits = short(student, head.T, torch.empty(X, V)).double()
    older = gradients(plain, logits, torch.eye(V).double(), logits, torch.eye(V).double(), labels, label_weight=1.0)[0]
    assert error(older, truth) > 1e-5
    assert error(ours, truth) < 1e-6


@pytest.mark.parametrize(
    ("divergence", "row_bytes"),
    [("forward_kl", 400), ("reverse_kl", 1500), ("reverse_kl", 700)],
    ids=["stripes of 3072", "stripes of two tiles", "stripes of half a tile"],
)
def test_without_logits_each_labels_product_is_found(
    monkeypatch: pytest.MonkeyPatch, divergence: str, row_bytes: int
) -> None:
    """In every quarter of a tile; a label of the next stripe may lie where this one's last tile is empty.

    What is found only says how much products fall short, and an interpreter's do not: no loss on a CPU tells it apart.
    """
    rows, width, vocab, stream = 24, 16, 3400, torch.Generator().manual_seed(3)
    hidden, head = torch.randn(rows, width, generator=stream), torch.randn(vocab, width, generator=stream)
    student, teacher = (hidden.bfloat16(), head.bfloat16()), (hidden.bfloat16(), head.flip(0).bfloat16())
    labels = torch.randperm(vocab, generator=stream)[:rows]
    labels[:12] = torch.tensor([0, vocab - 1, 3071, 3072, 3105, 3137, 3169, 3264, 63, 64, 255, 256])
    finish, found = _divergence_tile_kernels.finish_state, []

    class Spy:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(state: Tensor, *rest: object, **options: object) -> None:
                found.append(state[7].clone())
                finish[grid](state, *rest, **options)

            return launch

    monkeypatch.setattr(_divergence_tile_kernels, "finish_state", Spy())
    options = {"divergence": divergence, "label_weight": 0.3, "mode": "no_logits", "config": OWN}
    fused.linear_distillation(*student, *teacher, labels, chunk_bytes=rows * row_bytes, **options)
    terms = student[0].double() * student[1][labels].double()
    assert len(found) == 1
    assert ((found[0] - terms.sum(1)).abs() <= gamma(width, "float32") * terms.abs().sum(1)).all()


@pytest.mark.parametrize("mode", ["chunked", "no_logits"])
def test_a_batch_without_labels_that_count_is_zero_and_not_a_division_by_zero(mode: str) -> None:
    student, head, teacher, teacher_head, labels = inputs()
    student, head = student.requires_grad_(), head.requires_grad_()
    loss, count = fused.linear_distillation(
        student, head, teacher, teacher_head, torch.full_like(labels, -100), mode=mode, label_weight=0.5
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert int(count) == 0
    assert not student.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_without_logits_the_answer_is_that_of_chunks(divergence: str) -> None:
    given = inputs()
    options = {"divergence": divergence, "temperature": 2.0, "label_weight": 0.3}
    truth = gradients(plain, *doubled(given), **options)
    usual = gradients(plain, *given, **options)
    chunked = gradients(fused, *given, chunk_bytes=192 * 12 * 2, **options)
    tiled = gradients(fused, *given, mode="no_logits", chunk_bytes=12 * 64 * X, **options)
    floor = noise_floor(torch.float32, magnitude=1.0, length=V)
    for ours in (chunked, tiled):
        for one, other, true in zip(ours, usual, truth, strict=True):
            assert error(one, true) <= FACTOR * error(other, true) + floor


def test_limits_of_the_mixture_are_what_they_are_by_definition() -> None:
    given = inputs()
    forward, reverse = (gradients(fused, *given, divergence=kind) for kind in ("forward_kl", "reverse_kl"))
    for options, expected in (
        ({"divergence": "generalized_jsd", "beta": 0.0}, forward),
        ({"divergence": "generalized_jsd", "beta": 1.0}, reverse),
        ({"divergence": "skew_kl", "alpha": 0.0}, forward),
        ({"divergence": "skew_reverse_kl", "alpha": 0.0}, reverse),
    ):
        for ours, theirs in zip(gradients(fused, *given, **options), expected, strict=True):
            assert torch.equal(ours, theirs)


def _written_out(divergence: str, weight: float, r: float) -> tuple[float, float]:
    """F and G from their definition, with p / q = e^r."""
    e = math.exp(r)

    def log_mixture(w: float) -> float:
        return math.log1p(w * math.expm1(r))

    if divergence == "forward_kl":
        return e * r - math.expm1(r), -math.expm1(r)
    if divergence == "reverse_kl":
        return math.expm1(r) - r, -r
    if divergence == "skew_kl":
        rho = r - log_mixture(weight)
        return e * rho - (1 - weight) * math.expm1(r), -(1 - weight) * math.expm1(rho)
    if divergence == "skew_reverse_kl":
        rho = -log_mixture(1 - weight)
        return rho + (1 - weight) * math.expm1(r), rho - weight * math.expm1(rho)
    mixture = log_mixture(weight)
    return weight * e * (r - mixture) - (1 - weight) * mixture, -(1 - weight) * mixture


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_series_join_the_formulas_within_the_rounding_of_their_own_terms(divergence: str, weight: float) -> None:
    terms, slopes = coefficients(divergence, weight)
    assert len(terms) == len(slopes) == ORDER - 1
    for r in (0.5, -0.5, 0.3, -0.2):
        f, g = _written_out(divergence, weight, r)
        by_series = r * r * sum(c * r**n for n, c in enumerate(terms)), r * sum(c * r**n for n, c in enumerate(slopes))
        assert abs(by_series[0] - f) <= gamma(ORDER, "float32") * abs(f)
        assert abs(by_series[1] - g) <= gamma(ORDER, "float32") * abs(r)  # G may cancel, its terms are of size r


def test_frozen_sides_get_no_gradient() -> None:
    student, head, teacher, teacher_head, labels = inputs()
    d_student = gradients(fused, student, head, teacher, teacher_head, labels)[1]
    loss, count = fused.linear_distillation(student.requires_grad_(), head, teacher, teacher_head, labels)
    assert torch.equal(torch.autograd.grad(loss / count, student)[0], d_student)


def test_a_label_that_is_no_id_matters_only_when_labels_are_mixed_in() -> None:
    given = inputs()
    given[-1][0] = V
    assert fused.linear_distillation(*given)[0].isfinite()
    loss, d_student, _ = gradients(fused, *given, label_weight=0.1)
    assert loss.isnan()
    assert d_student[0].isnan().all()
    assert d_student[1:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_XF": torch.zeros(X + 1, F)}, r"teacher_XF.shape = \[8, 30\]: expected \[7, any\]"),
        ({"teacher_XF": torch.zeros(X, F + 1)}, r"teacher_head_VF.shape = \[150, 30\]"),
        ({"teacher_head_VF": torch.zeros(V + 6, F)}, "try vocab_size=150 if the longer one is padding"),
        ({"teacher_head_VF": torch.zeros(V, F, requires_grad=True)}, "teacher_head_VF.requires_grad = True"),
        ({"divergence": "kl"}, "divergence = 'kl'"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"beta": 1.5}, "beta = 1.5: expected 0.0 to 1.0"),
        ({"label_weight": -0.1}, "label_weight = -0.1"),
        ({"mode": "no_logits", "divergence": "generalized_jsd"}, "a third pass over all logits"),
        ({"chunk_bytes": 10}, "chunk_bytes = 10: expected at least"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict, words: str) -> None:
    names = ("student_XD", "student_head_VD", "teacher_XF", "teacher_head_VF", "labels_X")
    given = dict(zip(names, inputs(), strict=True)) | change
    with pytest.raises(KernelError, match=words) as caught:
        fused.linear_distillation(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl"])
def test_a_mixture_that_is_one_of_the_models_loses_nothing(divergence: str) -> None:
    """alpha = 1: both sides of the divergence are the same model, and log(e^-r) would be -r but for its rounding."""
    student, teacher = (3.0 * torch.randn((9, 16), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    head = torch.randn((40, 16), generator=torch.Generator().manual_seed(2))
    loss, _ = fused.linear_distillation(
        student.requires_grad_(), head, teacher, head, torch.arange(9), divergence=divergence, alpha=1.0
    )
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_without_logits_an_odd_d_head_lends_its_memory_too(divergence: str) -> None:
    """Rows of 21 numbers in lines of 24, which TMA reads; d head has an odd number of them, and float32 logits lie there."""
    rows, vocab, stream = 3, 1101, torch.Generator().manual_seed(7)

    def sliced(count: int, width: int, line: int) -> Tensor:
        return (0.5 * torch.randn(count, line, generator=stream)).bfloat16()[:, :width]

    given = sliced(rows, 21, 24), sliced(vocab, 21, 24), sliced(rows, 29, 32), sliced(vocab, 29, 32)
    labels = torch.randint(0, vocab, (rows,), generator=stream)
    results = []
    for op, dtype in ((fused, torch.bfloat16), (plain, torch.float64), (plain, torch.bfloat16)):
        student, head, *teacher = (x.to(dtype).detach() for x in given)
        student, head = student.requires_grad_(), head.requires_grad_()
        options = {"mode": "no_logits", "chunk_bytes": rows * 700, "config": OWN} if op is fused else {}
        loss, count = op.linear_distillation(student, head, *teacher, labels, divergence=divergence, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss / count, (student, head))))
    for ours, true, usual in zip(*results, strict=True):
        assert error(ours, true) <= FACTOR * error(usual, true) + 2.0 * roundoff(torch.bfloat16)
