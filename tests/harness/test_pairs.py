import types

import pytest

from tessera_parity.loading import Patch, load_half
from tessera_parity.pairs import Unpaired, collect_pairs, find_pairs, public_functions, read_unpaired
from tessera_shared.errors import ParityError

pytest.importorskip("torch")
pytest.importorskip("jax")


@pytest.fixture(scope="module")
def halves():
    return {name: load_half(name) for name in ("numpy", "torch", "jax")}


def test_every_public_function_has_its_twins_or_a_reason(halves):
    pairs = find_pairs(halves)
    paths = {pair.path for pair in pairs}
    assert {"model.norms.rms_norm", "distil.losses.forward_kl", "serve.sampling.sample"} <= paths
    assert all({"torch", "jax"} <= set(pair.functions) for pair in pairs)


def test_a_renamed_parameter_is_named_with_both_sides(halves):
    patch = Patch(
        file="tessera_jax/model/transformer.py",
        find="def embed(token_ids_BT",
        replace="def embed(ids_BT",
    )
    _, problems = collect_pairs({**halves, "jax": load_half("jax", patches=(patch,))})
    assert len(problems) == 1
    assert "model.transformer.embed: parameter 1 is token_ids_BT" in str(problems[0])
    assert "ids_BT (positional or keyword) in jax" in str(problems[0])


def test_a_function_without_twin_is_missing_and_an_entry_excuses_it(halves):
    patch = Patch(file="tessera_torch/distil/losses.py", find="def hidden_cosine(", replace="def look_up(")
    spoiled = {**halves, "torch": load_half("torch", patches=(patch,))}
    _, problems = collect_pairs(spoiled)
    said = " / ".join(map(str, problems))
    assert "distil.losses.hidden_cosine = only in" in said
    assert "distil.losses.look_up = only in torch" in said
    entries = read_unpaired() | {
        "distil.losses.hidden_cosine": Unpaired(
            path="distil.losses.hidden_cosine", sides=("jax", "numpy"), reason="test"
        ),
        "distil.losses.look_up": Unpaired(path="distil.losses.look_up", sides=("torch",), reason="test"),
    }
    assert collect_pairs(spoiled, entries)[1] == []


def test_an_entry_that_has_a_twin_after_all_fails(halves):
    path = "model.norms.rms_norm"
    entries = read_unpaired() | {path: Unpaired(path=path, sides=("torch",), reason="out of date")}
    with pytest.raises(ParityError, match=r"unpaired.toml \['model.norms.rms_norm'\] sides"):
        find_pairs(halves, entries)


def test_an_entry_for_nothing_fails(halves):
    entries = read_unpaired() | {"model.gone": Unpaired(path="model.gone", sides=("torch",), reason="was there once")}
    with pytest.raises(ParityError, match=r"unpaired.toml \['model.gone'\]"):
        find_pairs(halves, entries)


def test_every_entry_has_a_sentence_as_reason():
    for entry in read_unpaired().values():
        assert len(entry.reason.split()) >= 5, entry


def test_imported_and_private_functions_are_not_the_modules_own():
    module = types.ModuleType("sample")
    exec("from math import sqrt\ndef own(): ...\ndef _private(): ...\nclass Kind: ...\n", vars(module))
    assert list(public_functions(module)) == ["own"]
