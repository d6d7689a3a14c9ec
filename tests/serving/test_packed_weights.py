"""`tessera generate --weights`: each format, with and without kernels; what is held; what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tessera_kernels.fp8_scaling import quantize_fp8
from tessera_kernels.quant_weight import dequantize, quantize_w4, quantize_w8
from tessera_kernels.reference.fp8_matmul import FRACTION_BITS, STEP
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.cli.edge import run_commands
from tessera_shared.cli.generate import streamed_ids
from tessera_shared.cli.main import app
from tessera_shared.errors import KernelError
from tessera_shared.init import initial_weights
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import projection_names, tensor_table
from tessera_shared.tokens import Tokenizer
from tessera_shared.weight_choice import WEIGHT_FORMATS, check_weights
from tessera_shared.weights import LoadedModel, load_model, save_model
from tessera_torch import kernels
from tessera_torch.fast import packed_weights
from tessera_torch.fast import projections as fast_projections
from tessera_torch.fast.packed_weights import Fp8Weight, PackedWeight, pack_model
from tessera_torch.fast.projections import packed_projections, projections
from tessera_torch.kernels import choose, cuda_ops, fastest_ops, reference_ops
from tessera_torch.model.params import params_from_numpy
from tessera_torch.model.transformer import forward
from tessera_torch.serve.decode import stream_tokens

SPEC = ModelSpec(
    architecture="qwen2", vocab_size=259, num_layers=2, width=40, ffn_width=136, num_heads=4, num_kv_heads=2,
    head_width=16, max_positions=64, qkv_bias=True, eos_token_id=0,
)  # fmt: skip
GREEDY: dict[str, Any] = {
    "backend": "torch", "num_tokens": 5, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0,
    "dtype": "float32", "device": "cpu",
}  # fmt: skip
QUANT_FORMATS = ("w8", "w8g128", "w4")


def drawn_arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    arrays = initial_weights(SPEC, seed=seed, dtype="float32")
    return {name: (value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    Tokenizer.train_bpe(["the cat sat on the mat"], SPEC.vocab_size).save(directory / "tokenizer.json")
    save_model(directory / "m", SPEC, drawn_arrays(), tokenizer_file=directory / "tokenizer.json")
    return directory / "m"


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LoadedModel:
    return load_model(model_dir)


def written_out(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, Fp8Weight):
        return (weight.codes.double() * weight.scales.double()[:, None]).to(dtype)
    return dequantize(weight, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_the_command_runs_in_every_format_and_says_once_what_became_of_the_weights(
    model_dir: Path, weights: str, dtype: str, capsys: Any
) -> None:
    flags = ["--prompt", "the cat", "--tokens", "4", "--ids", "--ignore-end", "--dtype", dtype, "--weights", weights]
    assert run_commands(app, ["generate", str(model_dir), *flags], program="tessera") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["new_ids"]) == 4
    (line,) = printed.err.splitlines()
    assert line.startswith(f"weights: {weights}, {7 * SPEC.num_layers} projections, ")
    assert f" in {dtype} -> " in line


@pytest.mark.parametrize("weights", QUANT_FORMATS)
def test_kernels_and_their_references_choose_the_same_tokens_where_the_logits_leave_no_doubt(
    model: LoadedModel, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prompt = [3, 5, 7]
    found = [
        list(streamed_ids(model, prompt, kernels=asked, weights=weights, **GREEDY)) for asked in ("reference", "triton")
    ]
    ids_BT = torch.tensor([prompt + found[0]])
    held = pack_model(model.arrays, weights=weights, spec=SPEC, numerics=FLOAT32, device="cpu")
    truth, plain = (
        forward(
            {name: value.to(dtype) for name, value in held.params.items()}
            | {name: written_out(weight, dtype) for name, weight in held.packed.items()},
            ids_BT, spec=SPEC, numerics=numerics,
        )[0, len(prompt) - 1 : -1].double()
        for dtype, numerics in ((torch.float64, FLOAT64), (torch.float32, FLOAT32))
    )  # fmt: skip
    error = kernel_limit(
        float((plain - truth).abs().max()), torch.float32, magnitude=float(truth.abs().max()), length=1000
    )
    first, second = truth.topk(2, dim=-1).values.unbind(-1)
    assert float((first - second).min()) > 2 * error
    assert truth.argmax(-1).tolist() == found[0] == found[1]


def test_fp8_runs_through_the_kernels_too(model_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = ["--prompt", "the", "--tokens", "2", "--ids", "--ignore-end", "--weights", "fp8", "--kernels", "triton"]
    assert run_commands(app, ["generate", str(model_dir), *flags], program="tessera") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["new_ids"]) == 2
    assert [line.partition(":")[0] for line in printed.err.splitlines()] == ["kernels", "weights"]


def test_without_weights_nothing_is_packed_and_the_tokens_are_the_plain_models(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(packed_weights, "pack_model", None)
    prompt_BT = torch.tensor([[3, 5, 7]], dtype=torch.int32)
    params = params_from_numpy(model.arrays, dtype="float32")
    plain = [int(ids_B[0]) for ids_B in stream_tokens(params, prompt_BT, spec=SPEC, numerics=FLOAT32, num_tokens=5)]
    for asked in (None, "reference"):
        assert list(streamed_ids(model, [3, 5, 7], kernels=asked, **GREEDY)) == plain
    assert "weights" not in capsys.readouterr().err


@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_what_is_held_is_what_is_told_and_nothing_else(weights: str, numerics: Any) -> None:
    arrays = drawn_arrays()
    held = pack_model(arrays, weights=weights, spec=SPEC, numerics=numerics, device="cpu")
    assert list(held.packed) == projection_names(SPEC)
    assert held.packed.keys() | held.params.keys() == tensor_table(SPEC).keys()
    assert not held.packed.keys() & held.params.keys()
    parts = [
        part
        for weight in held.packed.values()
        for part in ((weight.codes, weight.scales) if isinstance(weight, Fp8Weight) else (weight.codes, weight.steps))
    ]
    packed, rest = (sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (parts, held.params.values()))
    width = 4 if numerics is FLOAT32 else 2
    plain = sum(arrays[name].size for name in held.packed) * width
    sizes = [packed_weights._size(number) for number in (plain, packed, rest)]
    assert held.told == (
        f"weights: {weights}, 14 projections, {sizes[0]} in {numerics.compute} -> {sizes[1]}; embeddings, norms and biases "
        f"{sizes[2]}"
    )
    assert all(str(value.dtype) == f"torch.{numerics.compute}" for value in held.params.values())


def test_sizes_are_told_in_powers_of_1024() -> None:
    assert [packed_weights._size(size) for size in (7, 1024, 3 * 2**19, 5 * 2**29)] == [
        "7 B", "1.0 KiB", "1.5 MiB", "2.5 GiB",
    ]  # fmt: skip


def test_projections_are_the_seven_of_each_layer() -> None:
    kinds = [name.split(".")[-2] for name in projection_names(replace(SPEC, tie_embeddings=False))]
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert kinds == seven * SPEC.num_layers


@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16])
def test_codes_are_those_of_the_stored_numbers_whatever_the_compute_dtype(numerics: Any) -> None:
    arrays = drawn_arrays()
    for weights, quantize in (
        ("w8", quantize_w8), ("w8g128", partial(quantize_w8, group=128)), ("w4", partial(quantize_w4, group=128)),
    ):  # fmt: skip
        held = pack_model(arrays, weights=weights, spec=SPEC, numerics=numerics, device="cpu")
        for name, weight in held.packed.items():
            assert torch.equal(weight.codes, quantize(torch.from_numpy(arrays[name])).codes)
    held = pack_model(arrays, weights="fp8", spec=SPEC, numerics=numerics, device="cpu")
    for name, weight in held.packed.items():
        codes, scales = quantize_fp8(torch.from_numpy(arrays[name]), scaling="row")
        assert torch.equal(weight.codes.view(torch.int8), codes.view(torch.int8))
        assert torch.equal(weight.scales, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_projection_is_the_product_with_the_weight_written_out_and_then_the_bias(
    weights: str, dtype: torch.dtype
) -> None:
    numerics = FLOAT32 if dtype is torch.float32 else BFLOAT16
    held = pack_model(drawn_arrays(), weights=weights, spec=SPEC, numerics=numerics, device="cpu")
    name = "model.layers.1.self_attn.k_proj"
    x_BTD = torch.randn((3, 2, SPEC.width), generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1.0, 50.0]
    ).view(3, 1, 1)
    x_BTD = x_BTD.to(dtype)
    project = packed_projections(held.params, held.packed, reference_ops().packed())
    (found,) = project(x_BTD, name)
    seen = x_BTD  # by the product
    if weights == "fp8":
        codes_XD, scales_X = quantize_fp8(x_BTD.flatten(0, 1), scaling="row")
        seen = (codes_XD.double() * scales_X.double()[:, None]).view(x_BTD.shape)
    params = {
        f"{name}.weight": written_out(held.packed[f"{name}.weight"], torch.float64),
        f"{name}.bias": held.params[f"{name}.bias"],
    }
    truth, plain = (
        projections({key: value.to(to) for key, value in params.items()})(seen.to(to), name)[0].double()
        for to in (torch.float64, dtype)
    )
    assert found.dtype == dtype
    assert found.shape == truth.shape
    for row in range(3):  # the largest row must not hide the others
        errors = [float((side[row].double() - truth[row]).abs().max()) for side in (found, plain)]
        limit = kernel_limit(errors[1], dtype, magnitude=float(truth[row].abs().max()), length=SPEC.width)
        if weights == "fp8":  # the reference's narrow sum drops this much of its partial sums at every step
            terms_2F = seen[row].double().abs() @ params[f"{name}.weight"].abs().t()
            limit += -(-SPEC.width // STEP) * 2.0**-FRACTION_BITS * float(terms_2F.max())
        assert errors[0] <= limit


def test_projections_of_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = pack_model(drawn_arrays(), weights="fp8", spec=SPEC, numerics=FLOAT32, device="cpu")
    project = packed_projections(held.params, held.packed, reference_ops().packed())
    names, x_BTD = [f"model.layers.0.self_attn.{one}_proj" for one in "qkv"], torch.randn((2, 3, SPEC.width))
    apart = [project(x_BTD, name)[0] for name in names]
    seen: list[torch.Tensor] = []
    quantize = partial(quantize_fp8, scaling="row")
    monkeypatch.setattr(fast_projections, "quantize_fp8", lambda x, scaling: (seen.append(x), quantize(x))[1])
    together = project(x_BTD, *names)
    assert len(seen) == 1
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_token_alone_is_the_token_in_its_batch(weights: str) -> None:
    """Dynamic scales are each token's own: what the neighbors hold changes nothing."""
    held = pack_model(drawn_arrays(), weights=weights, spec=SPEC, numerics=FLOAT32, device="cpu")
    project = packed_projections(held.params, held.packed, reference_ops().packed())
    x_BTD = torch.round(4 * torch.randn((2, 3, SPEC.width))) / 4  # sums of such numbers have no order
    loud_BTD = x_BTD.clone()
    loud_BTD[0, 1] *= 1e4
    for name in projection_names(SPEC)[:2]:
        quiet, loud = (project(x, name.removesuffix(".weight"))[0] for x in (x_BTD, loud_BTD))
        assert torch.equal(quiet[1], loud[1])
        assert torch.equal(quiet[0, [0, 2]], loud[0, [0, 2]])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--weights", "w3"], "weights = 'w3': expected one of w8, w8g128, w4, fp8"),
        (["--weights", ""], "weights = '': expected one of w8"),
        (["--weights", "w8", "--backend", "jax"], "weights = 'w8' with backend jax: expected weights as stored"),
        (["--weights", "w4", "--dtype", "float64"], "dtype = 'float64' with weights = 'w4': expected float32 or bfloat16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(model_dir: Path, flags: list[str], says: str, capsys: Any) -> None:
    assert run_commands(app, ["generate", str(model_dir), "--prompt", "the", *flags], program="tessera") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {says}")
    assert "; try " in line


def test_it_is_refused_before_a_framework_is_loaded(model_dir: Path) -> None:
    code = (
        "import sys\nfrom tessera_shared.cli.edge import run_commands\nfrom tessera_shared.cli.main import app\n"
        f"code = run_commands(app, ['generate', {str(model_dir)!r}, '--prompt', 'a', '--weights', 'q4'], program='tessera')\n"
        "sys.exit(code if 'torch' not in sys.modules else 77)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 2, done.stderr


def test_none_stands_for_weights_as_stored() -> None:
    for backend in ("torch", "jax"):
        check_weights(None, backend=backend, dtype="float64")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_weight_that_cannot_be_quantized_is_named(weights: str, wrong: float) -> None:
    arrays, name = drawn_arrays(), "model.layers.1.mlp.up_proj.weight"
    arrays[name][3, 2] = wrong
    with pytest.raises(KernelError) as caught:
        pack_model(arrays, weights=weights, spec=SPEC, numerics=FLOAT32, device="cpu")
    assert str(caught.value).startswith(f"{name}: ")
    assert f"[3, 2] = {wrong}: expected finite numbers" in str(caught.value)
    assert "; try the checkpoint before" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_beyond_float32_is_named_by_the_command(tmp_path: Path, model_dir: Path, capsys: Any) -> None:
    arrays = {name: value.astype(np.float64) for name, value in drawn_arrays().items()}
    arrays["model.layers.0.self_attn.v_proj.weight"][0, 1] = 1e300
    save_model(tmp_path / "m", SPEC, arrays, tokenizer_file=model_dir / "tokenizer.json")
    flags = ["--prompt", "the", "--tokens", "2", "--weights", "w8"]
    assert run_commands(app, ["generate", str(tmp_path / "m"), *flags], program="tessera") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.layers.0.self_attn.v_proj.weight: weight_FD[0, 1] = inf: expected finite")


def test_packed_weights_need_the_references_where_no_kernel_runs() -> None:
    for asked in ("auto", "reference"):
        choice = choose(asked, device="cpu", numerics=FLOAT32, spec=SPEC, weights="w8")
        assert choice.ops is not None
        assert choice.ops.name == "reference"
        assert "reference (plain torch)" in choice.why
        assert choose(asked, device="cpu", numerics=FLOAT32, spec=SPEC).ops is None


@pytest.mark.parametrize(("capability", "room"), [((9, 0), "cuda"), ((8, 0), "triton"), ((10, 0), "triton")])
def test_cuda_takes_packed_products_in_cuda_on_hopper_alone(
    capability: tuple[int, int], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    ops = cuda_ops("cuda")
    assert ops.name == "cuda"
    rooms = [getattr(ops.packed(), name).__module__.split(".")[1] for name in ("quant_matmul", "fp8_matmul")]
    assert rooms == [room, "triton"]


@pytest.mark.parametrize(
    ("rows", "outputs", "room"),
    [
        (1, 8, "cuda"),
        (16, 8, "cuda"),
        (17, 8, "triton"),
        (64, 8, "triton"),
        (65, 8, "cuda"),
        (2049, 8, "triton"),
        (0, 8, "cuda"),
        (1, 6, "triton"),
        (1, 8452, "triton"),
    ],
)
def test_the_fastest_packed_product_goes_by_rows_and_outputs(
    rows: int, outputs: int, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    for one in ("cuda", "triton"):
        file = import_module(f"tessera_kernels.{one}.quant_matmul")
        monkeypatch.setattr(file, "quant_matmul", lambda x, weight, one=one: one)
    weight = quantize_w8(torch.ones(outputs, 16))
    assert fastest_ops().packed().quant_matmul(torch.ones(rows, 16), weight) == room


def test_a_gpu_without_products_of_e4m3_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    given: dict[str, Any] = {"device": "cuda", "numerics": BFLOAT16, "spec": SPEC}
    with pytest.raises(
        KernelError, match="weights = fp8: expected another format, because the tensor cores of an old one"
    ):
        choose("triton", weights="fp8", **given)
    choice = choose("auto", weights="fp8", **given)
    assert choice.ops is not None
    assert choice.ops.name == "reference"
    assert "an old one have no products of E4M3" in choice.why
    assert choose("triton", weights="w8", **given).ops is not None
