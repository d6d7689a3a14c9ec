import sys

import numpy as np
import pytest

from tessera_parity import loading
from tessera_parity.budget import mathematics_limit
from tessera_parity.compare import relative_difference
from tessera_parity.loading import FreshModules, Patch, load_half
from tessera_shared.errors import MissingDependency, ParityError
from tessera_shared.numerics import FLOAT64

DOUBLED_EPS = Patch(file="tessera_shared/reference/norms.py", find="BT1 + eps)", replace="BT1 + 2 * eps)")


def norm_of(half):
    out = half.module("model.norms").rms_norm(
        half.array(np.full((1, 4), 1e-3)), half.array(np.ones(4)), eps=1e-6, numerics=FLOAT64
    )
    return float(half.numpy(out)[0, 0])


def assert_close(found, expected):
    assert relative_difference(np.array(found), np.array(expected)).value <= mathematics_limit()


def test_a_patched_half_differs_and_the_clean_one_beside_it_does_not():
    clean, broken = load_half("numpy"), load_half("numpy", patches=(DOUBLED_EPS,))
    assert_close(norm_of(clean), 1e-3 / np.sqrt(2e-6))
    assert_close(norm_of(broken), 1e-3 / np.sqrt(3e-6))
    assert norm_of(load_half("numpy")) == norm_of(clean)


def test_loading_leaves_the_clean_modules_in_sys_modules_alone(backend):
    before = {name: module for name, module in sys.modules.items() if name.startswith("tessera_")}
    half = load_half(backend)
    fresh = half.module("model.transformer")
    after = {name: module for name, module in sys.modules.items() if name.startswith("tessera_")}
    assert all(after[name] is module for name, module in before.items())
    assert not [name for name in after.keys() - before.keys() if ".model." in name]
    assert fresh is half.module("model.transformer")
    assert fresh is not load_half(backend).module("model.transformer")


def test_functions_of_a_copy_call_functions_of_the_same_copy(backend):
    transformer = load_half(backend).module("model.transformer")
    assert transformer.block.__globals__["attention_block"].__globals__ is not None
    one, other = load_half(backend), load_half(backend)
    for half in (one, other):
        used = half.module("model.transformer").block.__globals__["attention_block"]
        assert used is half.module("model.attention").attention_block


def test_a_patch_in_shared_is_seen_by_that_half_only(backend):
    patch = Patch(file="tessera_shared/rope.py", find="2 * pair / width", replace="3 * pair / width")
    broken, clean = load_half(backend, patches=(patch,)), load_half(backend)
    from tessera_shared import rope as untouched
    from tessera_shared.presets import preset

    spec = preset("nano")
    tables = []
    for half in (broken, clean):
        positions_BT = half.array(np.arange(5, dtype=np.int32)[None])
        tables.append(half.numpy(half.module("model.rope").rope_tables(positions_BT, spec=spec, numerics=FLOAT64)[0]))
    pair = np.arange(spec.head_width // 2)
    for table, factor in zip(tables, (3, 2), strict=True):
        angles = np.arange(5)[:, None] * spec.rope.theta ** (-factor * pair / spec.head_width)
        assert_close(table[0, :, : pair.size], np.cos(angles))
    assert broken.shared("rope") is not clean.shared("rope")
    assert clean.shared("rope") is untouched
    assert "3 * pair" not in untouched.__loader__.get_source("tessera_shared.rope")


@pytest.mark.parametrize("find", ["this text is nowhere", "np."])
def test_a_patch_that_does_not_occur_exactly_once_is_refused(find):
    with pytest.raises(ParityError, match=r"occurs \d+ times: expected exactly 1"):
        load_half("numpy", patches=(Patch(file="tessera_shared/reference/norms.py", find=find, replace="x"),))


def test_patches_of_one_file_apply_one_after_the_other():
    second = Patch(file="shared/tessera_shared/reference/norms.py", find="+ 2 * eps)", replace="+ 8 * eps)")
    assert_close(norm_of(load_half("numpy", patches=(DOUBLED_EPS, second))), 1e-3 / np.sqrt(9e-6))


@pytest.mark.parametrize("file", ["numpy/linalg.py", "tessera_shared/reference/absent.py", "tessera_shared/spec.txt"])
def test_a_patch_of_a_file_that_is_not_ours_is_refused_in_one_line(file):
    with pytest.raises(ParityError, match="patch file = ") as caught:
        load_half("numpy", patches=(Patch(file=file, find="a", replace="b"),))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_module_is_patched_in_a_copy_of_its_package(tmp_path):
    folder = tmp_path / "tessera_kernels" / "cuda"
    folder.mkdir(parents=True)
    (folder / "sample.cu").write_text("sum += x;\n")
    patch = Patch(file="kernels/tessera_kernels/cuda/sample.cu", find="+=", replace="=")
    patch.plant_in(tmp_path)
    assert (folder / "sample.cu").read_text() == "sum = x;\n"
    with pytest.raises(ParityError, match="occurs 0 times"):
        Patch(file="tessera_kernels/cuda/absent.cu", find="+=", replace="=").plant_in(tmp_path)
    with pytest.raises(ParityError, match=r"patch file = .*expected a Python file"):
        _ = patch.module
    with pytest.raises(ParityError, match=r"patch file = .*expected a file of a tessera_ package"):
        Patch(file="numpy/linalg.cu", find="a", replace="b").plant_in(tmp_path)


def test_an_unknown_half_and_a_missing_framework_say_what_to_do(monkeypatch):
    with pytest.raises(ParityError, match="expected one of numpy, torch, jax"):
        load_half("tensorflow")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="not installed"):
        loading.require("torch")


def test_imports_inside_functions_stay_inside_the_copy(tmp_path, monkeypatch):
    package = tmp_path / "tessera_sample"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "leaf.py").write_text("VALUE = 1\n")
    (package / "top.py").write_text(
        "import tessera_sample.inner.leaf as leaf\n"
        "def late():\n    from .inner import leaf as mine\n    return mine\n"
        "def value():\n    return leaf.VALUE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    patch = Patch(file="tessera_sample/inner/leaf.py", find="1", replace="2")
    fresh = FreshModules("tessera_sample", (patch,))
    top = fresh.load("tessera_sample.top")
    assert (top.value(), top.late().VALUE) == (2, 2)
    assert top.late() is fresh.modules["tessera_sample.inner.leaf"]
    assert "tessera_sample.inner.leaf" not in sys.modules


def test_bfloat16_comes_in_and_goes_out_exactly(backend):
    half = load_half(backend)
    value = np.array([1.0, 1.0 + 2.0**-7, -3.5, 1e-30])
    inside = half.array(value, "bfloat16")
    assert "bfloat16" in str(inside.dtype)
    assert np.array_equal(half.numpy(inside)[:3], value[:3])
    assert half.numpy(inside).dtype == np.float64
    assert half.numpy(half.array(np.array([1, 2], np.int32))).dtype == np.int32


def test_gradients_by_name_include_what_the_value_does_not_depend_on(backend):
    half = load_half(backend)
    params = {"used": half.array(np.array([2.0, 3.0])), "unused": half.array(np.ones(2))}
    value, grads = half.value_and_grad(lambda p: (p["used"] ** 2).sum(), params)
    assert float(half.numpy(value)) == 13.0
    assert half.numpy(grads["used"]).tolist() == [4.0, 6.0]
    assert half.numpy(grads["unused"]).tolist() == [0.0, 0.0]


def test_the_oracle_has_slopes_by_complex_step_and_no_reverse_mode():
    half = load_half("numpy")
    slope = half.directional_derivative(
        lambda p: np.sum(p["x"] ** 3), {"x": np.array([2.0, 5.0])}, {"x": np.array([1.0, 0.0])}
    )
    assert slope == 12.0
    with pytest.raises(ParityError, match="no reverse differentiation"):
        half.value_and_grad(lambda p: p["x"], {"x": np.ones(1)})


def test_a_device_that_is_not_there_is_one_line(backend):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(MissingDependency, match=r"device = 'cuda': expected .*; try --device cpu"):
        load_half(backend, device="cuda")
