"""The linear cross-entropy on the CPU interpreter: digits near convergence, plans, autograd's corners, bad input."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tessera_kernels.reference import linear_cross_entropy as plain
from tessera_kernels.triton import linear_cross_entropy as fused
from tessera_kernels.triton._logit_tiles import partial_bytes
from tessera_kernels.triton._loss_plans import (
    LossConfig,
    choose_splits,
    padded_columns,
    plan_chunks,
    plan_columns,
    plan_rows,
    plan_stripes,
)
from tessera_parity.kernel_budget import FACTOR, noise_floor, roundoff
from tessera_shared.errors import KernelError

X, D, V = 9, 24, 199


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(X, D, generator=stream), torch.randn(V, D, generator=stream)
    labels = torch.randint(0, V, (X,), generator=stream)
    labels[[4, 7]] = -100  # 7 are left: no power of two
    return hidden.to(dtype), head.to(dtype), labels


def converged(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose row of the right label points along the hidden state: no loss is above 1e-3."""
    stream = torch.Generator().manual_seed(5)
    hidden = torch.randn(X, D, generator=stream)
    head = 0.1 * torch.randn(V, D, generator=stream)
    labels = torch.randperm(V, generator=stream)[:X]
    gain = torch.linspace(1.2, 1.6, X)[:, None]
    head[labels] += gain * hidden * (12.0 / hidden.square().sum(-1, keepdim=True))
    return hidden.to(dtype), head.to(dtype), labels


def gradients(op, hidden: Tensor, head: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss, count = op.linear_cross_entropy(hidden, head, labels, **options)
    (loss / count).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss.detach(), hidden.grad, head.grad


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_bytes": 6 * 256 * 2},
        {"mode": "no_logits", "chunk_bytes": 6 * 64 * X},
        {"mode": "no_logits", "chunk_bytes": 6 * 64 * X, "config": LossConfig(product=2)},
    ],
)
def test_near_convergence_loss_and_gradients_keep_the_digits_of_float32_logits(options: dict) -> None:
    hidden, head, labels = converged(torch.bfloat16)
    truth = gradients(plain, hidden.double(), head.double(), labels)
    assert float(truth[0]) / X < 1e-3
    ours = gradients(fused, hidden, head, labels, **options)
    logits = hidden.float() @ head.float().T
    eye = torch.eye(V, dtype=torch.float64)
    best = plain.linear_cross_entropy(logits.double(), eye, labels)[0]
    floor = noise_floor(torch.float32, magnitude=1.0, length=V)
    assert error(ours[0], truth[0]) <= FACTOR * error(best, truth[0]) + floor
    slopes = gradients(plain, logits.double(), eye, labels)[1].bfloat16().double()
    rounded = (slopes @ head.double()).bfloat16(), (slopes.T @ hidden.double()).bfloat16()
    for found, ideal, true in zip(ours[1:], rounded, truth[1:], strict=True):
        assert error(found, true) <= FACTOR * error(ideal, true)
    older = gradients(plain, hidden, head, labels)
    assert error(older[1], truth[1]) > 2 * FACTOR * error(ours[1], truth[1])


def test_given_logits_cost_no_digits_however_small_the_loss_is() -> None:
    logits = 0.5 * torch.randn(X, V, generator=torch.Generator().manual_seed(6))
    logits[:, 0] = torch.linspace(8.0, 24.0, X)
    given_ = logits, torch.eye(V), torch.zeros(X, dtype=torch.int64)
    truth = gradients(plain, logits.double(), torch.eye(V).double(), given_[2])
    floor = noise_floor(torch.float32, magnitude=1.0, length=V)
    for row in range(X):
        ours = gradients(fused, logits[row : row + 1], *given_[1:2], given_[2][:1])
        true = gradients(plain, logits[row : row + 1].double(), torch.eye(V).double(), given_[2][:1])
        assert error(ours[0], true[0]) <= floor
        assert error(ours[1], true[1]) <= floor
    assert error(gradients(fused, *given_)[0], truth[0]) <= floor


@given(
    rows=st.integers(1, 20000),
    vocab=st.integers(1, 300000),
    models=st.sampled_from([1, 2]),
    slope_bytes=st.sampled_from([0, 2, 4]),
    budget=st.integers(2**10, 2**31),
)
def test_chunks_fit_the_budget_and_are_as_few_as_their_size_allows(
    rows: int, vocab: int, models: int, slope_bytes: int, budget: int
) -> None:
    line = padded_columns(vocab)
    if budget < line * (4 * models + slope_bytes):
        with pytest.raises(KernelError, match="chunk_bytes = "):
            plan_chunks(rows, vocab, models=models, slope_bytes=slope_bytes, budget=budget)
        return
    plan = plan_chunks(rows, vocab, models=models, slope_bytes=slope_bytes, budget=budget)
    assert 1 <= plan.logit_rows <= plan.rows
    assert line * (plan.logit_rows * 4 * models + plan.rows * slope_bytes) <= budget
    assert plan.rows <= rows + 127


@given(
    vocab=st.integers(1, 200000),
    columns=st.integers(1, 5000),
    id_bytes=st.integers(2, 100000),
    row_bytes=st.sampled_from([0, 16, 2048, 8192]),
)
@example(vocab=300, columns=1, id_bytes=2, row_bytes=8192)
def test_stripes_cover_the_vocabulary_and_lie_in_rows_of_d_head_behind_them(
    vocab: int, columns: int, id_bytes: int, row_bytes: int
) -> None:
    columns = max(columns, vocab // 500)  # or there are too many to look at
    stripes = list(plan_stripes(vocab, columns, id_bytes=id_bytes, row_bytes=row_bytes))
    assert [one.ids.start for one in stripes] == [0, *(one.ids.stop for one in stripes[:-1])]
    assert stripes[-1].ids.stop == vocab
    for ids, in_head in stripes:
        assert ids.start < ids.stop
        if in_head:
            assert (ids.stop - ids.start) * id_bytes <= (vocab - ids.stop) * row_bytes
        assert in_head == (ids.stop - ids.start > columns)


def test_the_promised_memory_of_the_issues_shapes() -> None:
    rows, width, vocab = 8192, 2048, 128256
    plan = plan_chunks(rows, vocab, models=1, slope_bytes=2, budget=fused.CHUNK_BYTES["chunked"])
    assert plan.rows >= 1024
    assert plan.logit_rows >= 512
    pieces_of_hidden = 4 * plan.rows * width * (1 + choose_splits(plan.rows, width, vocab))
    assert fused.CHUNK_BYTES["chunked"] + pieces_of_hidden <= 0.6 * 2**30
    row_bytes = 2 * padded_columns(vocab) + partial_bytes(vocab)
    powers = plan_rows(rows, row_bytes, fused.CHUNK_BYTES["chunked"])
    assert powers == 2048
    assert powers * row_bytes <= fused.CHUNK_BYTES["chunked"]
    assert choose_splits(powers, width, vocab) == 1  # and no pieces of d hidden
    budget = fused.CHUNK_BYTES["no_logits"]
    columns = plan_columns(rows, vocab, id_bytes=2, state=fused.STATE_BYTES, budget=budget)
    assert columns >= 2016
    assert rows * (2 * columns + fused.STATE_BYTES) <= budget
    stripes = list(plan_stripes(vocab, columns, id_bytes=2 * rows, row_bytes=2 * width))
    assert len(stripes) == 17  # of them 12 within d head; without it 64
    hidden_extra = rows * width * (4 - 2)  # d hidden is summed in float32 and returned in bfloat16
    assert budget + hidden_extra < 64 * 2**20 - 2**17  # scalars, and what the allocator rounds up


@pytest.mark.parametrize(
    ("rows", "width", "splits"), [(1024, 2048, 2), (2048, 2048, 1), (1280, 2048, 3), (8192, 4096, 1)]
)
def test_a_product_over_the_vocabulary_is_cut_until_its_tiles_fill_the_device(
    rows: int, width: int, splits: int
) -> None:
    assert choose_splits(rows, width, 128256) == splits
    assert choose_splits(rows, width, 128257) == 1


def truncating(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A product as tensor cores add it up: 16 terms at a time, what does not fit cut off."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for terms in range(0, a.shape[1], 16):
        exact = total.double() + a[:, terms : terms + 16].double() @ b[terms : terms + 16].double()
        total = exact.float()
        total = torch.where(total.double().abs() > exact.abs(), torch.nextafter(total, torch.zeros(())), total)
    return out.copy_(total)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 40.0}, {"mode": "no_logits", "chunk_bytes": 16 * (64 * 4 + fused.STATE_BYTES)}]
)
def test_products_that_cut_off_what_does_not_fit_cost_a_converged_loss_no_digits(
    monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    rows, width, vocab = 16, 1024, 300
    stream = torch.Generator().manual_seed(8)
    hidden = torch.randn(rows, width, generator=stream).bfloat16()
    head = 0.03 * torch.randn(vocab, width, generator=stream)
    labels = torch.randperm(vocab, generator=stream)[:rows]
    head[labels] += hidden.float() * (14.0 / hidden.float().square().sum(-1, keepdim=True))
    head = head.bfloat16()
    wanted = {"softcap": options.get("softcap")}
    truth = gradients(plain, hidden.double(), head.double(), labels, **wanted)
    assert float(truth[0]) / rows < 1e-3
    monkeypatch.setattr(fused, "product", truncating)
    ours = gradients(fused, hidden, head, labels, **options)
    logits = truncating(hidden, head.T, torch.empty(rows, vocab))
    older = plain.linear_cross_entropy(logits.double(), torch.eye(vocab).double(), labels, **wanted)[0]
    assert error(older, truth[0]) > 1e-5
    assert error(ours[0], truth[0]) < 1e-6  # what the issue asks for
    usual = gradients(plain, hidden, head, labels, **wanted)
    assert all(error(a, b) <= error(c, b) for a, b, c in zip(ours[1:], truth[1:], usual[1:], strict=True))


def test_a_label_with_a_product_of_its_own_is_not_compared_with_products_that_lack_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Far from convergence large logits lack alike, and the loss hardly; with one of them made right alone it would."""
    hidden, head, labels = inputs(torch.bfloat16)
    truth = gradients(plain, hidden.double(), head.double(), labels)[0]
    monkeypatch.setattr(fused, "product", lambda a, b, out: out.copy_((a.float() @ b.float()) * (1.0 - 2.0**-18)))
    ours = gradients(fused, hidden, head, labels)[0]
    logits = (hidden.double() @ head.double().T) * (1.0 - 2.0**-18)
    older = plain.linear_cross_entropy(logits, torch.eye(V).double(), labels)[0]
    assert error(ours, truth) < 0.1 * error(older, truth)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_the_other_keeps_its_bits(frozen: str) -> None:
    hidden, head, labels = inputs(torch.bfloat16)
    _, d_hidden, d_head = gradients(fused, hidden, head, labels)
    hidden, head = hidden.requires_grad_(frozen != "hidden"), head.requires_grad_(frozen != "head")
    loss, count = fused.linear_cross_entropy(hidden, head, labels)
    (loss / count).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert torch.equal(head.grad if frozen == "hidden" else hidden.grad, d_head if frozen == "hidden" else d_hidden)


def test_without_gradients_only_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = inputs()
    expected = gradients(fused, hidden, head, labels)[0]
    monkeypatch.setattr(fused.GradientSums, "add_rows", None)
    assert torch.equal(fused.linear_cross_entropy(hidden, head, labels)[0], expected)


def test_a_leaf_that_wants_float32_gets_the_running_sum_itself() -> None:
    hidden, head, labels = inputs(torch.bfloat16)
    rounded = gradients(fused, hidden, head, labels, chunk_bytes=6 * 256 * 2)[2]
    head.requires_grad_().grad_dtype = torch.float32
    loss, count = fused.linear_cross_entropy(hidden, head, labels, chunk_bytes=6 * 256 * 2)
    (loss / count).backward()
    assert head.grad.dtype == torch.float32
    assert torch.equal(head.grad.bfloat16(), rounded)
    assert not torch.equal(head.grad, rounded.float())


def test_a_mean_over_tokens_multiplies_nothing_and_rounds_once() -> None:
    hidden, head, labels = inputs(torch.bfloat16)
    by_mean = gradients(fused, hidden, head, labels, accumulate="head")[2]
    head.requires_grad_()
    loss, count = fused.linear_cross_entropy(hidden, head, labels, accumulate="head")
    by_sum = torch.autograd.grad(loss, head)[0]
    truth = gradients(plain, hidden.double(), head.detach().double(), labels)[2]
    assert error(by_mean, truth) <= error(by_sum.double() / count, truth)


def test_a_second_backward_raises_instead_of_scaling_twice() -> None:
    hidden, head, labels = inputs()
    loss, _ = fused.linear_cross_entropy(hidden.requires_grad_(), head, labels)
    torch.autograd.grad(3.0 * loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


def test_an_incoming_nan_is_passed_on() -> None:
    leaves = [x.requires_grad_() for x in inputs()[:2]]
    loss, _ = fused.linear_cross_entropy(*leaves, inputs()[2], accumulate="head")
    assert all(x.isnan().all() for x in torch.autograd.grad(loss, leaves, torch.tensor(float("nan"))))


def test_a_label_that_is_no_id_makes_loss_and_gradient_nan() -> None:
    hidden, head, labels = inputs()
    for wrong in (V, -1):
        labels[0] = wrong
        loss, d_hidden, _ = gradients(fused, hidden, head, labels)
        assert loss.isnan()
        assert d_hidden[0].isnan().all()
        assert d_hidden[1:].isfinite().all()


def test_nan_in_one_row_stays_in_that_row() -> None:
    hidden, head, labels = inputs()
    hidden[2, 1] = torch.nan
    loss, d_hidden, _ = gradients(fused, hidden, head, labels)
    assert loss.isnan()
    assert d_hidden[2].isnan().all()
    assert d_hidden[torch.arange(X) != 2].isfinite().all()


# torch's own tracer makes an instance of every autograd.Function, which torch deprecates
@pytest.mark.unfenced
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_gives_what_an_eager_call_gives() -> None:
    hidden, head, labels = inputs()

    def mean(hidden: Tensor, head: Tensor) -> Tensor:
        loss, count = fused.linear_cross_entropy(hidden, head, labels, softcap=5.0)
        return loss / count

    expected = torch.autograd.grad(mean(hidden.requires_grad_(), head.requires_grad_()), (hidden, head))
    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(hidden, head), (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs.double()) <= FACTOR * roundoff(torch.float32)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 0.01}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_tiles_lose_no_more_than_logits_in_float32(dtype: torch.dtype, options: dict) -> None:
    """Both near convergence, where the label alone is large in its tile and its slope is not, and far from it."""
    rows, width, vocab = 12, 64, 600
    most = 1.1 * (2**0.5 if dtype == torch.float16 else 1.0)  # powers in float16 round as much as slopes in float16
    stream = torch.Generator().manual_seed(11)
    hidden = torch.randn(rows, width, generator=stream).to(dtype)
    head = torch.randn(vocab, width, generator=stream) / width**0.5
    labels = torch.randperm(vocab, generator=stream)[:rows]
    for gain in (0.0, 14.0):
        near = head * (0.1 if gain else 1.0)
        near[labels] += hidden.float() * (gain / hidden.float().square().sum(-1, keepdim=True))
        given_ = hidden, near.to(dtype), labels
        truth = gradients(plain, given_[0].double(), given_[1].double(), labels, **options)
        powers = gradients(fused, *given_, config=LossConfig(product=2, rows=7), **options)
        logits = gradients(fused, *given_, config=LossConfig(product=1), **options)
        assert error(powers[0], truth[0]) <= error(logits[0], truth[0]) + noise_floor(
            torch.float32, magnitude=1.0, length=vocab
        )
        for ours, theirs, true in zip(powers[1:], logits[1:], truth[1:], strict=True):
            assert error(ours, true) <= most * error(theirs, true)


def test_a_small_logit_of_the_label_says_nothing_about_large_ones_in_float32() -> None:
    """390 beside 10.6: what the label's product rounds by would change the other's share of the loss by 8e-5."""
    hidden = torch.tensor([[47.271, -98.0327, -207.9904]])
    head = torch.tensor([[1.3494, -1.1958, -1.0074], [-0.3839, 0.0559, -0.1645]])
    labels = torch.tensor([1])
    truth = gradients(plain, hidden.double(), head.double(), labels, z_loss=0.01)
    usual = gradients(plain, hidden, head, labels, z_loss=0.01)
    ours = gradients(fused, hidden, head, labels, z_loss=0.01)
    for found, theirs, true in zip(ours, usual, truth, strict=True):
        assert error(found, true) <= FACTOR * error(theirs, true) + FACTOR * roundoff(torch.float32)


def test_configurations_of_the_row_kernel_agree() -> None:
    hidden, head, labels = inputs()
    losses = {
        float(fused.linear_cross_entropy(hidden, head, labels, config=config)[0])
        for config in (*fused.CONFIGS[2:4], LossConfig(rows=4, logit_rows=2, block=16, num_warps=1, stages=1))
    }
    assert max(losses) - min(losses) <= noise_floor(torch.float32, magnitude=max(losses), length=V)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_XD": torch.zeros(2, 3, D)}, "expected 2 dimensions"),
        ({"hidden_XD": torch.zeros(X, D, dtype=torch.float64)}, "hidden_XD.dtype = float64"),
        ({"hidden_XD": torch.zeros(X, D + 1)}, r"head_VD.shape = \[199, 24\]: expected \[any, 25\]"),
        ({"head_VD": torch.zeros(V, D, dtype=torch.bfloat16)}, "head_VD.dtype = bfloat16"),
        ({"head_VD": torch.zeros(0, D)}, "a vocabulary and a width of at least 1"),
        ({"head_VD": torch.zeros(2 * V, 2 * D)[::2, ::2]}, "expected 1 in one dimension"),
        ({"labels_X": torch.zeros(X + 1, dtype=torch.int64)}, r"labels_X.shape = \[10\]"),
        ({"labels_X": torch.zeros(X)}, "labels_X.dtype = float32"),
        ({"mode": "vocab"}, "mode = 'vocab'"),
        ({"accumulate": "half"}, "accumulate = 'half'"),
        ({"chunk_bytes": 100}, "chunk_bytes = 100: expected at least"),
        ({"chunk_bytes": 0}, "chunk_bytes = 0"),
        ({"chunk_bytes": 100, "mode": "no_logits"}, "a stripe has 9 rows"),
        ({"vocab_size": V + 1}, "vocab_size = 200: expected 1 to 199"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict, words: str) -> None:
    hidden, head, labels = inputs()
    given_ = {"hidden_XD": hidden, "head_VD": head, "labels_X": labels} | change
    with pytest.raises(KernelError, match=words) as caught:
        fused.linear_cross_entropy(**given_)
    assert "\n" not in str(caught.value)


def test_float16_is_not_summed_in_float16() -> None:
    hidden, head, labels = inputs(torch.float16)
    with pytest.raises(KernelError, match="accumulate = 'head' with float16"):
        fused.linear_cross_entropy(hidden, head, labels, accumulate="head")
