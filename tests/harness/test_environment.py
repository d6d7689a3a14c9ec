"""What a run says about the two sides' settings: like is compared with like, and what is said is so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.environment import differences, xla_threads

SETTINGS = st.booleans() | st.integers(0, 64) | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2)
SIDES = st.dictionaries(st.sampled_from(["threads", "float64", "devices", "tf32"]), SETTINGS)
COUNT = """
import os, jax.numpy as jnp
x = jnp.ones((512, 512))
(x @ x).block_until_ready()
tasks = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print(tasks.count("tf_XLAEigen"))
"""


@given(torch=SIDES, jax=SIDES)
def test_a_line_for_every_common_setting_that_differs_and_for_no_other(torch: dict, jax: dict) -> None:
    found = differences({"torch": {"version": "2", **torch}, "jax": {"version": "1", **jax}})
    assert [line.partition(":")[0] for line in found] == [
        name for name in torch if name in jax and str(torch[name]) != str(jax[name])
    ]
    assert differences({"torch": torch, "jax": {name: str(value) for name, value in torch.items()}}) == []


def test_one_side_alone_differs_from_nothing() -> None:
    assert differences({"torch": {"threads": "1"}}) == []
    assert differences({}) == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
@pytest.mark.parametrize("switches", [{}, {"OMP_NUM_THREADS": "3"}, {"NPROC": "3"}, {"PJRT_NPROC": "2", "NPROC": "5"}])
def test_xlas_threads_are_as_many_as_said(switches: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    for name in ("NPROC", "PJRT_NPROC", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    counted = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(counted.stdout) == xla_threads()
