"""The native faces: an `nn.Module` and an `nnx.Module`, each trained by its ecosystem's own few lines."""

import itertools

import numpy as np
import pytest

from tessera_shared.init import initial_weights
from tessera_shared.numerics import BFLOAT16, FLOAT32
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import UNEMBEDDING, tensor_table


def tiny_spec(*, tied: bool) -> ModelSpec:
    return ModelSpec(
        vocab_size=29,
        num_layers=2,
        width=16,
        ffn_width=24,
        num_heads=4,
        num_kv_heads=2,
        head_width=4,
        max_positions=32,
        tie_embeddings=tied,
    )


IDS = np.random.default_rng(0).integers(0, 29, (4, 13)).astype(np.int32)


def assert_learned(losses):
    """Every step lowers the loss, down to below the best that a guess can reach which does not look at the context."""
    share = np.unique(IDS[:, 1:], return_counts=True)[1] / IDS[:, 1:].size
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < -(share * np.log(share)).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_torch_state_dict_has_the_tables_names_and_a_tied_embedding_once(tied):
    pytest.importorskip("torch")
    from tessera_torch.model.module import TesseraModel
    from tessera_torch.model.params import params_from_numpy

    spec = tiny_spec(tied=tied)
    model = TesseraModel(spec, BFLOAT16, params_from_numpy(initial_weights(spec, seed=1), dtype="float32"))
    assert list(model.state_dict()) == list(tensor_table(spec))
    assert (UNEMBEDDING in model.state_dict()) == (not tied)
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.float32"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_plain_torch_loop_trains_the_module(tied, recompute):
    torch = pytest.importorskip("torch")
    from tessera_torch.model.module import TesseraModel
    from tessera_torch.model.params import params_from_numpy

    spec = tiny_spec(tied=tied)
    model = TesseraModel(spec, FLOAT32, params_from_numpy(initial_weights(spec, seed=1), dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.from_numpy(IDS).long()
    losses = []
    for _ in range(20):
        logits = model(ids[:, :-1], recompute=recompute)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_learned(losses)
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_plain_nnx_and_optax_loop_trains_the_module():
    jax = pytest.importorskip("jax")
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    from tessera_jax.model.module import TesseraModel
    from tessera_jax.model.params import params_from_numpy

    spec = tiny_spec(tied=True)
    model = TesseraModel(spec, FLOAT32, params_from_numpy(initial_weights(spec, seed=1), dtype="float32"))
    assert set(model.weights) == set(tensor_table(spec))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    ids = jax.numpy.asarray(IDS)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            logits = model(ids[:, :-1], recompute=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert_learned(losses)


def test_both_faces_keep_their_own_copy_of_what_they_were_built_from():
    torch = pytest.importorskip("torch")
    from tessera_torch.model.module import TesseraModel
    from tessera_torch.model.params import params_from_numpy

    spec = tiny_spec(tied=True)
    params = params_from_numpy(initial_weights(spec, seed=1), dtype="float32")
    model = TesseraModel(spec, FLOAT32, params)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(float(tensor.abs().max()) > 0.0 for name, tensor in params.items() if name.endswith("weight"))
