"""Rounding at the sizes that people train: pools of real shapes, and how their bands join a stored calibration."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tessera_parity.calibration.store import (
    Entry,
    VariantStats,
    framework_version,
    load_entry,
    machine,
    quantiles_of,
    rounding_floor,
    save_entry,
    stats_of,
)
from tessera_parity.cli.main import app
from tessera_parity.rounding_cases import ALL_POOLS, POOLS, SHAPES
from tessera_parity.rounding_measure import Tally, least_error
from tessera_parity.sequential import best_rho, boundary
from tessera_parity.subjects.rounding import SHAPE_PLANS
from tessera_parity.variants import FAITHFUL
from tessera_shared.numerics import UNIT_ROUNDOFF, numerics_for
from tessera_shared.presets import PRESETS

ONE = np.array([1.0, 2.0, -3.0])


def an_entry(**streams_by_variant: dict[str, float]) -> Entry:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(40)
    return Entry(
        half="torch", dtype="float32", device="cpu", framework=framework_version("torch"), machine=machine(),
        date="2026-01-01", seed=1,
        variants={
            name: VariantStats(
                family=FAITHFUL, about="made up",
                streams={stream: stats_of(list(mean + 0.1 * noise)) for stream, mean in streams.items()},
            )
            for name, streams in streams_by_variant.items()
        },
        quantiles={stream: quantiles_of([0.0, 1.0]) for stream in next(iter(streams_by_variant.values()))},
    )  # fmt: skip


def test_shapes_are_the_presets_with_the_sums_as_long_as_theirs() -> None:
    for name, spec in SHAPES.items():
        whole = PRESETS[name]
        assert (spec.width, spec.ffn_width, spec.num_heads, spec.num_kv_heads, spec.head_width) == (
            whole.width, whole.ffn_width, whole.num_heads, whole.num_kv_heads, whole.head_width,
        )  # fmt: skip
        assert spec.num_layers >= 2
    assert not SHAPES.keys() & POOLS.keys()
    assert SHAPE_PLANS.keys() == SHAPES.keys()


def test_an_error_below_one_rounding_of_the_accumulator_counts_as_one() -> None:
    numerics = numerics_for("bfloat16")
    ideal = ONE * (1.0 + UNIT_ROUNDOFF["bfloat16"])
    exact, tiny, plain = Tally("jax", "bfloat16"), Tally("jax", "bfloat16"), Tally("jax", "bfloat16")
    exact.add("rich/grad q.bias", [(ONE, ONE, ideal)])
    tiny.add("rich/grad q.bias", [(ONE * (1.0 + 2.0**-40), ONE, ideal)])
    plain.add("rich/grad q.bias", [(ideal, ONE, ideal)])
    expected = np.log(UNIT_ROUNDOFF[numerics.softmax] / UNIT_ROUNDOFF["bfloat16"])
    assert exact.values["rich/grad q.bias"] == tiny.values["rich/grad q.bias"]
    assert exact.values["rich/grad q.bias"] == pytest.approx([expected])
    assert plain.values["rich/grad q.bias"] == [0.0]


def test_nothing_is_raised_where_values_stay_wide_or_the_operation_is_exact() -> None:
    assert least_error("rich/attention.scores", numerics_for("bfloat16")) == 0.0
    assert least_error("rich/mlp.up", numerics_for("float32")) == 0.0
    tally = Tally("jax", "bfloat16")
    tally.add("rich/embed", [(ONE, ONE, ONE)])
    assert tally.exact["rich/embed"] == ONE.size
    tally.add("rich/embed", [(ONE * (1.0 + 2.0**-40), ONE, ONE)])
    assert "an exact operation is off" in tally.faults[0]


def test_a_pool_joins_a_stored_entry_and_nothing_else_moves(tmp_path: Path) -> None:
    stored = an_entry(eager={"rich/logits": 0.1, "tiny/logits": 0.5}, chunked={"rich/logits": 0.2, "tiny/logits": 0.6})
    later = an_entry(eager={"rich/logits": 9.0, "tiny/logits": 0.7}, new={"tiny/logits": 0.8})
    joined = stored.with_pools(later, ("tiny",))
    means = {name: {s: round(v.mean, 1) for s, v in one.streams.items()} for name, one in joined.variants.items()}
    shift = round(stats_of(list(0.1 * np.random.default_rng(1).standard_normal(40))).mean, 1)
    assert means["eager"] == {"rich/logits": 0.1 + shift, "tiny/logits": pytest.approx(0.7 + shift)}
    assert means["chunked"]["tiny/logits"] == pytest.approx(0.6 + shift)  # not measured again: stays
    assert means["new"].keys() == {"tiny/logits"}
    assert joined.pools["tiny"]["date"] == later.date
    save_entry(joined, tmp_path)
    found = load_entry("torch", "float32", directory=tmp_path)
    assert found is not None
    assert found.pools == joined.pools


def test_the_floor_follows_the_pools_own_longest_sum() -> None:
    floors = {pool: rounding_floor(f"{pool}/mlp.up", "bfloat16") for pool in ALL_POOLS}
    assert 0.0 < floors["rich"] < floors["tiny"] < floors["qwen3-0.6b"]
    assert rounding_floor("losses/loss forward_kl", "bfloat16") == 0.0


@pytest.mark.parametrize("name", SHAPE_PLANS)
def test_a_shapes_plan_can_see_what_it_states(name: str) -> None:
    """At the plan's last case the boundary of a stream with the stated scatter is below the stated shift."""
    plan, alpha = SHAPE_PLANS[name], 1e-4 / 3 / 400 * 0.5
    width = boundary(plan.most, sigma=plan.scatter, alpha=alpha, rho=best_rho(plan.cases, alpha))
    assert width + 1.645 * plan.scatter / np.sqrt(plan.most) <= plan.required(plan.scatter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--pool", "huge"], "pool = 'huge': expected one of"), (["--pool", "tiny"], "expected a stored entry of torch")],
)
def test_a_pool_that_cannot_be_added_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "--half", "torch", *arguments, "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert message in f"{done.output} {done.exception}"
    assert not list(tmp_path.iterdir())
