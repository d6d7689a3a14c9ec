"""Calibrations: what is stored comes back, what is broken is refused, and variants are the same mathematics."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tessera_parity.budget import gamma, mathematics_limit
from tessera_parity.calibration.store import (
    DATA,
    Entry,
    Stats,
    VariantStats,
    framework_version,
    load_entry,
    machine,
    quantiles_of,
    rounding_floor,
    save_entry,
    stats_of,
)
from tessera_parity.cli.calibrate import entry_of
from tessera_parity.compare import relative_difference
from tessera_parity.loading import load_half
from tessera_parity.resync import FUSED
from tessera_parity.variants import FAITHFUL, run_apart, usual, variants_of
from tessera_shared.errors import FormatError, ParityError


def an_entry(half: str = "torch", *, means: tuple[float, ...] = (0.1, 0.2)) -> Entry:
    rng = np.random.default_rng(0)
    variants = {
        f"v{index}": VariantStats(
            family=FAITHFUL, about="made up", streams={"rich/logits": stats_of(mean + 0.1 * rng.standard_normal(50))}
        )
        for index, mean in enumerate(means)
    }
    variants["jit"] = VariantStats(
        family=FUSED, about="made up", streams={"rich/logits": Stats(mean=-3.0, deviation=0.1, scale=0.1, cases=50)}
    )
    return Entry(
        half=half, dtype="float32", device="cpu", framework=framework_version(half), machine=machine(),
        date="2026-01-01", seed=1, variants=variants, quantiles={"rich/logits": quantiles_of([0.0, 1.0])},
    )  # fmt: skip


def test_an_entry_comes_back_as_it_was_stored(backend: str, tmp_path: Path) -> None:
    entry = an_entry(backend)
    save_entry(entry, tmp_path)
    found = load_entry(backend, "float32", directory=tmp_path)
    assert found is not None
    assert found.variants.keys() == entry.variants.keys()
    mean = entry.variants["v0"].streams["rich/logits"].mean
    assert found.variants["v0"].streams["rich/logits"].mean == float(f"{mean:.9g}"), "nine digits are stored"
    assert load_entry(backend, "bfloat16", directory=tmp_path) is None


def test_a_band_belongs_to_its_family(tmp_path: Path) -> None:
    entry = an_entry()
    band = entry.band("rich/logits", FAITHFUL, alpha=1e-7)
    assert band is not None
    assert -1.0 < band.low < 0.1 < 0.2 < band.high < 1.0  # what fusion does is no yardstick for eager
    fused = entry.band("rich/logits", FUSED, alpha=1e-7)
    assert fused is not None
    assert fused.high < -2.0
    assert entry.band("rich/other", FAITHFUL, alpha=1e-7) is None


def test_more_streams_make_every_band_wider() -> None:
    loose, tight = (an_entry().band("rich/logits", FAITHFUL, alpha=alpha) for alpha in (1e-9, 1e-3))
    assert loose is not None
    assert tight is not None
    assert loose.low < tight.low < tight.high < loose.high
    assert loose.sigma > tight.sigma


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    path = save_entry(an_entry(), tmp_path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FormatError, match=path.name):
        load_entry("torch", "float32", directory=tmp_path)


def test_a_legal_variant_has_finite_errors() -> None:
    with pytest.raises(FormatError, match="finite"):
        stats_of([0.1, -math.inf, 0.2])


def test_only_values_rounded_below_their_accumulator_have_a_floor() -> None:
    assert rounding_floor("rich/mlp.up", "float32") == 0.0
    assert rounding_floor("rich/attention.scores", "bfloat16") == 0.0
    assert rounding_floor("rich/grad logits", "bfloat16") == 0.0
    assert 0.0 < rounding_floor("rich/mlp.up", "bfloat16") < 0.01


def test_variants_have_names_of_their_own_and_the_usual_one_is_first(backend: str) -> None:
    for device in ("cpu", "cuda"):
        found = variants_of(backend, device=device, compiled=True)
        assert found[0] == usual(backend)
        assert len({one.name for one in found}) == len(found) >= 5


def test_patched_variants_are_the_same_mathematics(backend: str) -> None:
    rng = np.random.default_rng(3)
    x, weight, bias = rng.standard_normal((3, 5, 7)), rng.standard_normal((4, 7)), rng.standard_normal(4)
    clean = load_half(backend)
    expected = clean.numpy(clean.module("model.linear").linear(*map(clean.array, (x, weight, bias))))
    patched = [one for one in variants_of(backend) if one.patches]
    assert patched
    for variant in patched:
        half = load_half(backend, patches=variant.patches)
        for dtype, limit in (("float64", mathematics_limit()), ("bfloat16", gamma(3, "bfloat16"))):
            arrays = [half.array(value, dtype) for value in (x, weight, bias)]
            value = half.module("model.linear").linear(*arrays)
            assert str(value.dtype).removeprefix("torch.") == dtype
            assert relative_difference(half.numpy(value), expected).value <= limit


def test_a_variant_that_does_not_exist_is_refused() -> None:
    from dataclasses import replace

    wrong = replace(usual("torch"), name="warp")
    with pytest.raises(ParityError, match="warp"):
        run_apart(wrong, dtypes=["float32"], cases=1, seed=0, device="cpu")


def test_an_entry_is_made_of_measurements() -> None:
    values = {"float32": {"rich/logits": [0.1, 0.2, 0.15, 0.12]}}
    entry = entry_of("torch", "float32", "cpu", 5, {"eager": (usual("torch"), values)})
    assert entry.streams(FAITHFUL) == ["rich/logits"]
    assert entry.quantiles["rich/logits"][0] == 0.1
    assert entry.machine["cpu"]


def test_stored_calibrations_say_where_they_come_from() -> None:
    paths = sorted(DATA.glob("*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        assert path.name == f"{data['device']}-{data['half']}-{data['framework']}-{data['dtype']}.json"
        assert {"cpu", "flags", "architecture"} <= data["machine"].keys()
        assert len(data["variants"]) >= 5
        for variant in data["variants"].values():
            assert all(stats["cases"] >= 30 for stats in variant["streams"].values())
