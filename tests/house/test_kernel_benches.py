"""The kernels' benchmarks as scripts: each op has one, its dry run gives rows, and the table tells what was missed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benchmarks" / "kernels"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_bench_harness", BENCHES / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def timing(harness: ModuleType, ms: float):
    return harness.Timing(median_ms=ms, p20=ms, p80=ms, samples=30)


def test_a_row_says_which_musts_are_met_missed_or_could_not_be_judged(harness: ModuleType) -> None:
    row = harness.Row(
        op="rms_norm", shape="4096x4096", ours=timing(harness, 0.5), peers={"liger": timing(harness, 0.4)},
        bytes_moved=1e9, limit="copy", must={"liger": 0.98, "torch": 1.5, "share": 0.4},
        at_most={"memory GiB": (0.7, 0.6)},
    )  # fmt: skip
    assert row.rate() == pytest.approx(2000.0)
    assert row.ratio("liger") == pytest.approx(0.8)
    assert [met for _, met in row.verdicts({"copy": 4000.0})] == [False, None, True, False]
    assert [met for _, met in row.verdicts({})] == [False, None, None, False]
    json.dumps(row.to_json({"copy": 4000.0}))


def test_a_peer_that_does_not_work_is_left_out_with_a_line_and_ours_may_not(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA_BENCH_DRY", "1")

    def missing():
        raise ImportError("No module named 'liger_kernel'")

    assert list(harness.available({"liger": missing, "torch": lambda: lambda: None})) == ["torch"]
    assert set(harness.measure({"ours": lambda: None, "broken": missing})) == {"ours"}
    assert capsys.readouterr().err.count("left out") == 2
    with pytest.raises(ImportError):
        harness.measure({"ours": missing})


def test_one_script_that_crashes_loses_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "kernels"
    folder.mkdir(parents=True)
    for name in ("boxed.py", "harness.py", "run_all.py"):
        (folder / name).write_text((BENCHES / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "bench_good.py").write_text(
        "import harness\n\n\ndef rows():\n"
        "    times = harness.measure({'ours': lambda: None, 'peer': lambda: None})\n"
        "    ours = times.pop('ours')\n"
        "    return [harness.Row(op='good', shape='1', ours=ours, peers=times, bytes_moved=1.0, must={'peer': 0.0})]\n",
        encoding="utf-8",
    )
    (folder / "bench_bad.py").write_text("import os\n\n\ndef rows():\n    os.abort()\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(folder / "run_all.py"), "--dry", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "| good | 1 |" in done.stdout
    assert "**exit status -6" in done.stdout
    assert "0 met, 0 missed, 1 not judged" in done.stdout
    (written,) = (tmp_path / "out").glob("*.json")
    assert [one["op"] for one in json.loads(written.read_text(encoding="utf-8"))["results"]] == ["bad", "good"]
