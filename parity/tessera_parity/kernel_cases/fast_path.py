"""The whole fast path of the torch half as one op: forward, gradients and an update, beside the plain model.

The reference is the plain, paired model: in float64 it is the truth, in the working dtype the plain implementation.
Outputs are rounded to the compute dtype and put together by class of tensor, so that one small tensor's luck decides
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tessera_parity.families import family_spec, random_weights
from tessera_parity.kernel_cases import case as draws
from tessera_parity.kernel_cases.case import KernelOp, Tensors
from tessera_parity.kernel_fast import LENGTH, OBJECTIVES, OPTIONS, packed_batch
from tessera_parity.loading import Patch
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64, Numerics, numerics_for
from tessera_shared.objectives import Objective
from tessera_shared.spec import ARCHITECTURES, ModelSpec
from tessera_torch.distil.teacher import Teacher
from tessera_torch.fast import step as fast_step
from tessera_torch.fast.transformer import forward as fast_forward
from tessera_torch.kernels import Ops, cuda_ops, fastest_ops, triton_ops
from tessera_torch.model.transformer import forward
from tessera_torch.train.optim import AdamWState
from tessera_torch.train.step import TrainState, loss_and_grads, train_step

LR = 0.01


@dataclass(frozen=True)
class FastCase:
    """A small model of one family with a packed batch. The seed makes spec, weights, moments and batch."""

    family: str = "llama"
    objective: int = 0  # of OBJECTIVES
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    kernels: str = "triton"  # or "cuda", or "fastest"
    config: None = None


def spec_of(case: FastCase) -> ModelSpec:
    """Return the case's model: a generated member of its family with heads that the kernels take."""
    spec = family_spec(case.family, np.random.default_rng((case.seed, 71)))
    return replace(spec, head_width=16, num_layers=min(spec.num_layers, 2))


def batch_of(case: FastCase) -> Batch:
    """Return the case's packed batch."""
    return packed_batch(spec_of(case), np.random.default_rng((case.seed, 73)))


def tensors(case: FastCase) -> Tensors:
    """Return weights, moments and the teacher's weights, float32 whatever the compute dtype."""
    rng = np.random.default_rng((case.seed, 79))
    weights = random_weights(spec_of(case), rng)
    drawn: dict[str, np.ndarray[Any, Any]] = {f"weight {name}": value for name, value in weights.items()}
    for name, value in weights.items():
        drawn[f"first {name}"] = 0.01 * rng.standard_normal(value.shape)
        drawn[f"second {name}"] = rng.uniform(0.01, 0.1, value.shape)
        drawn[f"teacher {name}"] = value + 0.1 * rng.standard_normal(value.shape)
    return {name: draws.lay_out(torch.tensor(value).float(), "contiguous") for name, value in drawn.items()}


def _ops_of(kernels: str, device: str) -> Ops:
    if kernels == "cuda":
        return cuda_ops(device)
    return fastest_ops() if kernels == "fastest" else triton_ops()


def kernel(case: FastCase, given: Tensors) -> Tensors:
    """Return what the fast path answers, through the case's kernels."""
    spec, batch, numerics = spec_of(case), batch_of(case), numerics_for(case.dtype)
    params, optimizer, teacher = _parts(case, given, numerics)
    device = next(iter(params.values())).device
    ops = _ops_of(case.kernels, str(device))
    logits_BTV = fast_forward(
        params, torch.as_tensor(batch.token_ids_BT, device=device), spec=spec, numerics=numerics, ops=ops,
        positions_BT=torch.as_tensor(batch.positions_BT), segments_BT=torch.as_tensor(batch.segments_BT),
    )  # fmt: skip
    state = fast_step.fast_state(params, optimizer, spec=spec, numerics=numerics)
    state, metrics = fast_step.train_step(
        state, [batch], lr=LR, spec=spec, numerics=numerics, objective=_objective(case), options=OPTIONS, ops=ops,
        teacher=teacher,
    )  # fmt: skip
    views = {name: view for group in state.groups for name, view in group.grads.views.items()}
    return _outputs(case, batch, logits_BTV, metrics, views, state.params)


def reference(case: FastCase, given: Tensors) -> Tensors:
    """Return what the plain model answers, in float64 where the weights are."""
    is_truth = next(iter(given.values())).dtype == torch.float64
    spec, batch, numerics = spec_of(case), batch_of(case), FLOAT64 if is_truth else numerics_for(case.dtype)
    params, optimizer, teacher = _parts(case, given, numerics)
    device = next(iter(params.values())).device
    ids_BT, _, positions_BT, segments_BT = (torch.as_tensor(field, device=device) for field in batch)
    options: dict[str, Any] = {"spec": spec, "numerics": numerics, "objective": _objective(case), "teacher": teacher}
    logits_BTV = forward(
        params, ids_BT, spec=spec, numerics=numerics, positions_BT=positions_BT, segments_BT=segments_BT
    )
    grads = loss_and_grads(params, batch, **options)[2]
    state, metrics = train_step(
        TrainState(params, optimizer, optimizer.step), [batch], lr=LR, options=OPTIONS, **options
    )
    return _outputs(case, batch, logits_BTV, metrics, grads, state.params, wide=is_truth)


def _parts(case: FastCase, given: Tensors, numerics: Numerics) -> tuple[Tensors, AdamWState, Teacher | None]:
    sides: dict[str, Tensors] = {"weight": {}, "first": {}, "second": {}, "teacher": {}}
    for key, tensor in given.items():
        side, _, name = key.partition(" ")
        sides[side][name] = tensor
    compute = getattr(torch, numerics.compute)
    theirs = {name: value.to(compute) for name, value in sides["teacher"].items()}
    teacher = Teacher(theirs, spec_of(case), numerics) if _objective(case).distil else None
    return sides["weight"], AdamWState(sides["first"], sides["second"], 3), teacher


def _objective(case: FastCase) -> Objective:
    return OBJECTIVES[case.objective]


def _outputs(
    case: FastCase,
    batch: Batch,
    logits_BTV: Tensor,
    metrics: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    wide: bool = False,
) -> Tensors:
    dtype = torch.float64 if wide else getattr(torch, case.dtype)
    real = torch.as_tensor(batch.segments_BT >= 0, device=logits_BTV.device)
    found = {"logits": logits_BTV[real], "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
    for name in sorted(grads):
        kind = name.split(".")[-2]
        for what, side in (("grad", grads), ("weight", weights)):
            found[f"{what} {kind}"] = torch.cat(
                [found.get(f"{what} {kind}", logits_BTV.new_zeros(0)), side[name].flatten()]
            )
    return {name: value.detach().to(dtype) for name, value in found.items()}


def _cases(gpu: bool) -> st.SearchStrategy[FastCase]:
    del gpu  # the model is small everywhere: sizes are the other ops' business
    return st.builds(
        FastCase,
        family=st.sampled_from(ARCHITECTURES),
        objective=st.integers(0, len(OBJECTIVES) - 1),
        dtype=draws.dtypes("float32", "bfloat16"),
        seed=draws.seeds(),
    )


def _lengths(case: FastCase, given: Tensors) -> Mapping[str, int]:
    """The longest way to any output: every sum of the model, there and back."""
    spec = spec_of(case)
    longest = max(spec.width, spec.ffn_width, spec.vocab_size, spec.num_heads * spec.head_width, 2 * LENGTH)
    return dict.fromkeys(_names(given), longest * (8 * spec.num_layers + 4))


def _names(given: Tensors) -> list[str]:
    kinds = sorted({name.split(".")[-2] for name in given if name.startswith("weight ")})
    return ["logits", "loss", "grad_norm", *(f"{what} {kind}" for what in ("grad", "weight") for kind in kinds)]


OP = KernelOp(
    name="fast_path",
    cases=_cases,
    tensors=tensors,
    kernel=kernel,
    reference=reference,
    examples=(
        FastCase(seed=10),  # one layer, three documents: the bugs' case too
        FastCase(family="qwen3", objective=1, dtype="bfloat16", seed=7, kernels="cuda"),
        FastCase(family="qwen3", objective=1, dtype="bfloat16", seed=1, kernels="fastest"),
        FastCase(family="mistral", objective=2, seed=2),
        FastCase(family="qwen2", objective=3, dtype="bfloat16", seed=3),
    ),
    unordered=lambda case: frozenset(_names(tensors(case))),  # attention's backward adds up in no fixed order
    lengths=_lengths,
    bugs=(
        Patch(
            file="tessera_torch/fast/transformer.py",
            find="layout.starts, layout.starts,",
            replace="layout.starts[[0, -1]], layout.starts[[0, -1]],",
        ),
        Patch(
            file="tessera_torch/fast/step.py",
            find="weight_decay=options.weight_decay if decay else 0.0",
            replace="weight_decay=options.weight_decay",
        ),
        Patch(
            file="tessera_torch/fast/step.py",
            find="scale = scale * (options.clip_norm / norm.clamp(min=options.clip_norm))",
            replace="scale = scale * 1.0",
        ),
    ),
)
"""The fast path's cases."""
