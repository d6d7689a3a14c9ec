"""`--kernels`: what each choice means, what it says, and that a choice that cannot run is one line."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

import torch

from tessera_parity.budget import trajectory_limit
from tessera_parity.compare import relative_difference
from tessera_shared.batch import Batch
from tessera_shared.errors import KernelError, MissingDependency
from tessera_shared.init import initial_weights
from tessera_shared.kernel_choice import KERNELS, check_kernels
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64
from tessera_shared.objectives import AdamWOptions, DistilOptions, Divergence, Objective, TopKForm
from tessera_shared.presets import preset
from tessera_shared.schedule import Schedule
from tessera_shared.spec import ModelSpec
from tessera_torch import kernels
from tessera_torch.fast import loop as fast_loop
from tessera_torch.kernels import choose, reference_ops
from tessera_torch.model.module import TesseraModel
from tessera_torch.model.params import params_from_numpy
from tessera_torch.train import loop
from tessera_torch.train.step import init_state

SPEC = ModelSpec(
    vocab_size=37, num_layers=2, width=24, ffn_width=40, num_heads=4, num_kv_heads=2, head_width=16, max_positions=64
)


@pytest.fixture
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_reference_is_the_plain_model_and_says_so() -> None:
    choice = choose("reference", device="cpu", numerics=FLOAT64, spec=SPEC)
    assert choice.ops is None
    assert "reference" in choice.why


@pytest.mark.parametrize(
    ("device", "numerics", "spec", "because"),
    [
        ("cpu", BFLOAT16, SPEC, "expected cuda"),
        ("cuda", FLOAT64, SPEC, "expected"),
        ("cpu", FLOAT32, replace(SPEC, head_width=24), "expected"),
    ],
)
def test_auto_never_raises_and_says_what_it_took_and_why(device, numerics, spec, because) -> None:
    choice = choose("auto", device=device, numerics=numerics, spec=spec)
    if not torch.cuda.is_available():
        assert choice.ops is None
    assert choice.why.startswith("kernels: auto took reference")
    assert because in choice.why
    assert "\n" not in choice.why


@pytest.mark.usefixtures("_no_interpreter")
def test_a_kernel_asked_for_where_none_can_run_is_a_missing_dependency() -> None:
    for asked in ("triton", "cuda"):
        with pytest.raises(
            MissingDependency, match=r"device = 'cpu': expected cuda, because .*; try kernels='reference'"
        ):
            choose(asked, device="cpu", numerics=BFLOAT16, spec=SPEC)


@pytest.mark.parametrize(
    ("says", "given"),
    [
        (r"dtype = float64: expected bfloat16 or float32", {"numerics": FLOAT64}),
        (r"head_width = 24: expected a multiple of 16 up to 256", {"spec": replace(SPEC, head_width=24)}),
        (r"head_width = 512", {"spec": replace(SPEC, head_width=512)}),
        (r"the teacher's head_width = 6", {"teacher": replace(SPEC, head_width=6)}),
        (r"compile = True", {"compiled": True}),
        (
            r"divergence = total_variation",
            {"objective": Objective(distil=DistilOptions(divergence=Divergence.TOTAL_VARIATION))},
        ),
        (
            r"top_k = 3: expected None",
            {"objective": Objective(distil=DistilOptions(top_k=3, top_k_form=TopKForm.TAIL))},
        ),
        (
            r"logit_softcap = 30",
            {"objective": Objective(distil=DistilOptions()), "spec": replace(SPEC, logit_softcap=30.0)},
        ),
    ],
)
def test_a_model_or_objective_that_the_kernels_do_not_cover_is_refused_by_name(says, given, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = {"device": "cpu", "numerics": FLOAT32, "spec": SPEC} | given
    with pytest.raises(KernelError, match=says) as caught:
        choose("triton", **asked)
    assert "\n" not in str(caught.value)
    assert "; try " in str(caught.value)


def test_cuda_takes_its_own_kernels_and_tritons_for_the_rest(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = choose("cuda", device="cpu", numerics=BFLOAT16, spec=SPEC)
    assert choice.why == "kernels: cuda, as asked"
    names = ("flash_attention", "linear_distillation", "rms_norm", "swiglu")
    rooms = [getattr(choice.ops, name).__module__.split(".")[1] for name in names]
    assert rooms == ["cuda", "cuda", "cuda", "triton"]
    with pytest.raises(KernelError, match=r"dtype = float32 with kernels = 'cuda': expected bfloat16"):
        choose("cuda", device="cpu", numerics=FLOAT32, spec=SPEC)


FASTER = "flash_attention, linear_distillation, quant_matmul and the backward of rms_norm"


@pytest.mark.parametrize(
    ("capability", "numerics", "room", "says"),
    [
        ((9, 0), BFLOAT16, "cuda", f"; CUDA C++ for {FASTER}, because that is faster on a Hopper GPU"),
        ((9, 0), FLOAT32, "triton", f"; without CUDA C++ for {FASTER}, because dtype = float32"),
        ((8, 0), BFLOAT16, "triton", "because cuda and bfloat16 suit it"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster_there(capability, numerics, room, says, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    choice = choose("auto", device="cuda", numerics=numerics, spec=SPEC)
    assert choice.why.startswith("kernels: auto took triton, because cuda and ")
    assert says in choice.why
    assert "\n" not in choice.why
    names = ("flash_attention", "linear_distillation", "rms_norm", "swiglu")
    found = [getattr(choice.ops, name).__module__.split(".")[1] for name in names]
    assert found == [room, room, "fastest_rms_norm" if room == "cuda" else "triton", "triton"]


def test_an_unknown_choice_and_kernels_for_jax_are_refused() -> None:
    with pytest.raises(KernelError, match="kernels = 'fast': expected one of auto, triton, cuda, reference"):
        check_kernels("fast", backend="torch")
    for asked in ("triton", "cuda"):
        with pytest.raises(KernelError, match="backend jax: expected auto or reference"):
            check_kernels(asked, backend="jax")
    for asked in KERNELS:
        check_kernels(asked, backend="torch")


@pytest.mark.usefixtures("_no_interpreter")
def test_the_commands_leave_with_one_line_and_the_right_exit_code(tmp_path) -> None:
    from tessera_shared.cli.main import app

    text = tmp_path / "text.txt"
    text.write_text("a few words, and some more of them. " * 400)
    given = ["train", str(tmp_path / "run"), "--data", str(text), "--steps", "1", "--seq-len", "16"]
    for extra, code, says in (
        (["--kernels", "triton"], 4, "expected cuda"),
        (["--kernels", "wrong"], 2, "expected one of auto"),
        (["--kernels", "triton", "--backend", "jax"], 2, "belong to the torch half"),
    ):
        done = CliRunner().invoke(app, [*given, *extra])
        assert isinstance(done.exception, KernelError | MissingDependency)
        assert done.exception.exit_code == code
        assert says in str(done.exception)
        assert not (tmp_path / "run").exists()


def test_the_native_module_is_plain_unless_told_otherwise() -> None:
    params = params_from_numpy(initial_weights(SPEC, seed=1), dtype="float32")
    assert TesseraModel(SPEC, FLOAT32, params).kernels.ops is None
    with pytest.raises(KernelError, match="head_width"):
        TesseraModel(
            replace(SPEC, head_width=24), FLOAT32,
            params_from_numpy(initial_weights(replace(SPEC, head_width=24), seed=1), dtype="float32"), kernels="triton",
        )  # fmt: skip


def a_batch(step: int) -> Batch:
    rng = np.random.default_rng((7, step))
    ids_BT = rng.integers(0, SPEC.vocab_size, (4, 13)).astype(np.int32)
    segments_BT = np.repeat((np.arange(13) >= 5).astype(np.int32)[None], 4, axis=0)
    positions_BT = np.where(segments_BT == 0, np.arange(13), np.arange(13) - 5).astype(np.int32)
    return Batch(ids_BT, np.roll(ids_BT, -1, axis=1), positions_BT, segments_BT)


def test_the_fast_loop_trains_what_the_plain_loop_trains_and_leaves_a_plain_state() -> None:
    params = params_from_numpy(initial_weights(SPEC, seed=1), dtype="float64")
    options = AdamWOptions(clip_norm=0.3)
    given = {
        "num_steps": 3, "spec": SPEC, "numerics": FLOAT64, "objective": Objective(z_loss=1e-3), "options": options,
        "schedule": Schedule(kind="constant", peak=1e-2, total_steps=3), "accumulation": 2,
    }  # fmt: skip
    plain, fast = (init_state(params, options=options) for _ in range(2))
    plain = loop.train(plain, a_batch, **given)
    fast = fast_loop.train(fast, a_batch, ops=reference_ops(), **given)
    assert fast.step == plain.step == fast.optimizer.step == 3
    for ours, theirs in (
        (fast.params, plain.params),
        (fast.optimizer.first, plain.optimizer.first),
        (fast.optimizer.second, plain.optimizer.second),
    ):
        assert list(ours) and set(ours) == set(theirs)  # noqa: PT018
        worst = max(relative_difference(ours[n].numpy(), theirs[n].numpy()).value for n in theirs)
        assert worst <= trajectory_limit(3)
    batches = [a_batch(9), a_batch(10)]
    ours, count = fast_loop.held_out_loss(fast.params, batches, spec=SPEC, numerics=FLOAT64, ops=reference_ops())
    theirs, expected = loop.held_out_loss(plain.params, batches, spec=SPEC, numerics=FLOAT64)
    assert count == expected
    assert ours == pytest.approx(theirs, rel=trajectory_limit(3))


def test_positions_that_the_attention_kernels_cannot_see_are_refused() -> None:
    from tessera_torch.fast.layout import layout_of

    with pytest.raises(KernelError, match="expected consecutive positions"):
        layout_of(np.array([[0, 1, 3]]), np.zeros((1, 3), np.int32), device="cpu")


def test_flat_views_are_aligned_and_the_gaps_stay_zero() -> None:
    from tessera_torch.fast.flat import ALIGNMENT, flat_copy

    tensors = {"a": torch.ones(3), "b": torch.ones(5, 7), "c": torch.ones(())}
    flat = flat_copy(tensors, dtype=torch.bfloat16)
    assert all(view.storage_offset() % ALIGNMENT == 0 for view in flat.views.values())
    assert float(flat.buffer.sum()) == sum(tensor.numel() for tensor in tensors.values())
    assert {name: view.shape for name, view in flat.views.items()} == {n: t.shape for n, t in tensors.items()}


def test_the_presets_that_are_meant_for_gpus_have_heads_that_the_kernels_take() -> None:
    for name in ("small", "llama-1b", "llama-8b", "qwen3-0.6b"):
        assert preset(name).head_width % 16 == 0
