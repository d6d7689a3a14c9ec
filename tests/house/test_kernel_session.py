"""A session on a lent GPU, tried without one: it resumes, its box is hard, what is absent is never met, wrong words are one line."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benchmarks" / "kernels"
NAMES = (
    "boxed",
    "doctor",
    "first_light",
    "harness",
    "prebuild_flashinfer",
    "probes",
    "run_all",
    "session",
    "session_parts",
    "sweeping",
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules; what they put on the path and among the modules is taken away again."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHES))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHES)):
                del sys.modules[name]


def session(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHES / "session.py"), *arguments], capture_output=True, text=True, timeout=seconds, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "--only", "ropes"], "op = 'ropes': expected one of adamw, "),
        (["check:ropes=9"], "op = 'ropes': expected one of adamw, "),
        (["chek"], "part = 'chek': expected one of doctor, check, "),
        (["time+check"], "step = 'time+check': expected timed parts alone"),
        (["time=soon"], "step = 'time=soon': expected PART=SECONDS"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_2(
    scripts: SimpleNamespace, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts.session.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_a_dry_part_is_kept_and_the_next_call_goes_on_from_there(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = session("check", "--dry", "--only", "rope", "--out", str(first), "--from", str(first))
    assert done.returncode == 0, done.stderr
    assert "check     rope" in done.stderr
    kept = json.loads((first / "session.json").read_text(encoding="utf-8"))["check"]["rope"]
    assert kept["problem"] == ""
    assert kept["cases"] > 0
    assert "| rope |" in (first / "report.md").read_text(encoding="utf-8")

    done = session("check", "profile", "--dry", "--only", "rope", "--out", str(second), "--from", str(first))
    assert done.returncode == 0, done.stderr
    assert "check     rope" not in done.stderr  # it is done
    assert "profile   rope" in done.stderr
    assert set(json.loads((second / "session.json").read_text(encoding="utf-8"))) == {"check", "profile"}


def job(scripts: SimpleNamespace, name: str, code: str, **options: object) -> object:
    return scripts.boxed.Job(
        part="check", name=name, command=[sys.executable, "-c", code], environment=dict(os.environ), limit=60,
        read=lambda ran: {"problem": ran.problem(), "out": ran.out}, **options,
    )  # fmt: skip


def test_a_box_ends_what_is_under_way_with_all_it_started_and_begins_nothing_late(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    note = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(note)!r}, 'w')"
    spawn = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"{spawn}; print('begun', flush=True); time.sleep(60)"
    records: dict[str, dict[str, object]] = {}
    jobs = [job(scripts, "long", parent, least=0.1), job(scripts, "late", "pass", least=0.5)]
    clock = time.monotonic()
    late = scripts.boxed.run_jobs(
        jobs, workers=1, box=scripts.boxed.Box(1.0), keep=lambda job, record: records.update({job.name: record})
    )
    assert time.monotonic() - clock < 3.0
    assert [one.name for one in late] == ["late"]
    assert records["long"]["problem"] == "stopped after 1 s"
    assert records["long"]["out"] == "begun\n"
    time.sleep(max(0.0, 3.5 - (time.monotonic() - clock)))
    assert not note.exists()


def test_an_interrupt_ends_what_is_under_way_and_begins_nothing_more(scripts: SimpleNamespace) -> None:
    kept: list[str] = []

    def keep(job: SimpleNamespace, record: dict[str, object]) -> None:
        kept.append(job.name)
        raise KeyboardInterrupt

    jobs = [
        job(scripts, "short", "pass"),
        job(scripts, "long", "import time; time.sleep(60)"),
        job(scripts, "next", "pass"),
    ]
    clock = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scripts.boxed.run_jobs(jobs[:2] + 40 * jobs[2:], workers=2, box=scripts.boxed.Box(90), keep=keep)
    assert time.monotonic() - clock < 30
    assert kept[0] == "short"
    assert "long" not in kept
    assert len(kept) < 40


def test_unreadable_output_loses_no_other_job(scripts: SimpleNamespace) -> None:
    records: dict[str, dict[str, object]] = {}
    broken = scripts.boxed.Job(
        part="check", name="broken", command=[sys.executable, "-c", "print('{')"], environment=dict(os.environ), limit=60,
        read=lambda ran: json.loads(ran.out),
    )  # fmt: skip
    left = scripts.boxed.run_jobs(
        [broken, job(scripts, "other", "print('fine')")], workers=1, box=scripts.boxed.Box(60),
        keep=lambda job, record: records.update({job.name: record}),
    )  # fmt: skip
    assert left == []
    assert str(records["broken"]["problem"]).startswith("unreadable: JSONDecodeError")
    assert records["other"]["out"] == "fine\n"


def timing(scripts: SimpleNamespace, ms: float) -> object:
    return scripts.harness.Timing(median_ms=ms, p20=ms, p80=ms, samples=30)


def test_an_absent_peer_is_not_measured_and_never_met(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TESSERA_BENCH_DRY", raising=False)
    times = {"trl": timing(scripts, 2.0)}
    assert scripts.harness.best_of("better", times, ("trl", "liger")) == {}
    assert scripts.harness.best_of("better", times, ("trl",)) == {"better": times["trl"]}
    row = scripts.harness.Row(
        op="loss", shape="1", ours=timing(scripts, 1.0), peers=times, flops=1.0, limit="cublas", must={"better": 1.5},
        at_most={"GiB": (0.1, scripts.harness.UNKNOWN)},
    )  # fmt: skip
    assert row.verdicts({}) == [("x better not measured >= 1.5", None), ("GiB 0.1 <= not measured", None)]
    assert json.loads(json.dumps(row.to_json({}), allow_nan=False))["at_most"] == {"GiB": [0.1, None]}


def test_a_peer_whose_compiler_fails_is_left_out(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    monkeypatch.setenv("TESSERA_BENCH_DRY", "1")

    def too_large() -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    assert set(scripts.harness.measure({"ours": lambda: None, "peer": too_large})) == {"ours"}


def test_shapes_are_shared_in_a_warm_up_and_late_ones_are_said(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = scripts.harness.turn
    assert list(turn("abcde")) == list("abcde")
    shares = []
    for share in range(3):
        monkeypatch.setenv("TESSERA_BENCH_WARM", f"{share}/3")
        shares.append("".join(turn("abcde")))
    assert shares == ["ad", "be", "c"]
    monkeypatch.delenv("TESSERA_BENCH_WARM")
    monkeypatch.setenv("TESSERA_BENCH_UNTIL", "1.0")
    assert list(turn("ab")) == []
    assert capsys.readouterr().err == "  left out, time is up: a\n  left out, time is up: b\n"


def test_a_crash_names_the_peer_and_keeps_the_rows_of_before(scripts: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"limits": {}, "gpu": "g", "rows": [{"shape": "b", "fresh": True}]}), encoding="utf-8")
    said = "  trying: ours\n  trying: flashinfer xqa\nan illegal memory access\n"
    ran = scripts.boxed.Ran(code=1, out="", err=said, seconds=3.0)
    known = {"rows": [{"shape": "a"}, {"shape": "b"}], "without": []}
    found = scripts.session_parts.read_time("paged_attention", ran, path, known)
    assert found["rows"] == [{"shape": "b", "fresh": True}, {"shape": "a"}]
    assert (found["without"], found["again"], found["done"]) == (["flashinfer xqa"], True, False)
    again = scripts.session_parts.read_time("paged_attention", ran, path, known | {"without": ["flashinfer xqa"]})
    assert not again["again"]  # it is not the peer then


def sweep(scripts: SimpleNamespace, shape: str, answers: dict[str, float]) -> object:
    return scripts.sweeping.Sweep(
        part="rows", key="all", shape=shape, current="now", work=1.0, limit="copy",
        candidates={name: lambda value=value: torch.full((3,), value) for name, value in answers.items()},
    )  # fmt: skip


def swept(
    scripts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    sweeps: Sequence[object],
    times: dict[str, dict[str, float]],
) -> object:
    """Sweep fakes whose times are given by shape."""
    module = ModuleType("fake_bench")
    module.sweeps = lambda: iter(sweeps)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_bench", module)
    monkeypatch.setitem(scripts.sweeping.SOURCES, "fake", "fake_bench")
    monkeypatch.setenv("TESSERA_BENCH_DRY", "1")

    def measured(one, functions, samples):
        named = {repr(name): name for name in one.candidates}
        own = {id(function): name for name, function in one.candidates.items()}
        return {key: timing(scripts, times[one.shape][own[id(f)] if key == "ours" else named[key]])
                for key, f in functions.items()}  # fmt: skip

    monkeypatch.setattr(scripts.sweeping, "_time", measured)
    store = scripts.sweeping.Store(path=None, shapes={}, fatal=["rows, large: 'deadly'"])
    scripts.sweeping._sweep("fake", store)
    return store


@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu", "adamw"])
def test_candidates_of_a_sweep_call_what_is_there(
    op: str, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep notes what a candidate raises and goes on: a name that is gone would leave a sweep without numbers."""
    monkeypatch.setenv("TESSERA_BENCH_DRY", "1")
    for one in scripts.sweeping.sweeps_of(op):
        one.candidates[one.current]()


def test_a_sweep_ranks_over_shapes_and_never_what_is_wrong_or_deadly(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"now": 1.0, "even": 1.0, "wrong": 2.0, "nan": float("nan")}
    times = {
        "large": {"now": 2.0, "even": 1.5, "wrong": 0.1, "nan": 0.1, "deadly": 0.1},
        "small": {"now": 1.0, "even": 1.05, "wrong": 0.1, "nan": 0.1},
    }
    store = swept(
        scripts, monkeypatch, [sweep(scripts, "large", right | {"deadly": 1.0}), sweep(scripts, "small", right)], times
    )
    record = store.record()
    assert list(record["shapes"]["rows, large"]["ms"]) == ["'even'", "'now'"]
    left_out = record["shapes"]["rows, large"]["left_out"]
    assert left_out["'wrong'"].startswith("WRONG: 1 away")
    assert left_out["'nan'"].startswith("WRONG: inf")
    assert left_out["'deadly'"] == "took its process down"
    (choice,) = scripts.sweeping.choices_of(record)
    assert (choice["current"], choice["best"], choice["shapes"]) == ("'now'", "'even'", 2)
    assert choice["gain"] == pytest.approx((2.0 / 1.5 / 1.05) ** 0.5)
    (line,) = scripts.sweeping.suggestions(record)
    assert line == "rows, all: 'now' -> 'even', 1.127x faster over 2 shapes"
    assert any("WRONG" in one for one in scripts.sweeping.table_of({"fake": record}))


def test_a_candidate_in_which_the_process_died_is_left_out_but_not_one_that_time_stopped(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.json"
    for code, blamed in ((1, "rows, large: 'deadly'"), (None, "")):
        path.write_text(json.dumps({"shapes": {}, "fatal": [], "at": "rows, large: 'deadly'"}), encoding="utf-8")
        record = scripts.session_parts.read_sweep(scripts.boxed.Ran(code=code, out="", err="", seconds=1.0), path)
        assert (record["at"], record["again"]) == (blamed, code is not None)
    store = scripts.sweeping.Store(path=None, shapes={}, fatal=[], at="rows, large: 'deadly'")
    store.blame()
    assert store.fatal == ["rows, large: 'deadly'"]


def test_what_ncu_prints_becomes_a_table(scripts: SimpleNamespace) -> None:
    names = ["ID", "Kernel Name", "thread Domain:Push/Pop_Range", "gpu__time_duration.sum", "launch__registers_per_thread",
             "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
             "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
             "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
             "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
             "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"]  # fmt: skip
    units = ["", "", "", "us", "register/thread", "%", "%", "%", "inst", "inst", "inst"]
    first = ["0", "forward_kernel", '"<default domain>":"probe flash_attention forward S4096":none', "1,439.5", "168", "12.5",
             "60", "55.25", "7.5", "2.25", "9"]  # fmt: skip
    small = ["1", "fill(float*)", '"<default domain>":"probe flash_attention forward S4096":none', "2", "16", "n/a", "1", "",
             "", "", ""]  # fmt: skip
    cells = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in (names, units, first, small)]
    launches = scripts.probes.read("\n".join(["==PROF== Connected to process 1", *cells]))
    assert [(one.kernel, one.us, one.registers, one.tensor, one.dram) for one in launches] == [
        ("forward_kernel", 1439.5, 168, 55.25, 12.5),
        ("fill", 2.0, 16, None, None),
    ]
    assert launches[0].probe == "forward S4096"
    assert launches[0].stalls == "long scoreboard 7.5, wait 2.2"
    lines = scripts.probes.table_of({"flash_attention": {"launches": [vars(one) for one in launches]}, "rope": {}})
    assert (
        lines[2]
        == "| flash_attention | forward S4096 | `forward_kernel` | 1439.5 | 55 | 12 | 60 |  | 168 |  | long scoreboard 7.5, wait 2.2 |"
    )
    assert lines[3].startswith("| rope | not measured |")
    assert len(lines) == 4  # a kernel that takes no time is not told
    assert scripts.probes.read("==ERROR== The user does not have permission") == []


def test_a_memory_fault_is_a_problem_and_a_stopped_worker_without_one_is_not(scripts: SimpleNamespace) -> None:
    at = "".join(json.dumps({"kind": "at", "what": f"case {number}"}) + "\n" for number in range(3))
    read, ran = scripts.session_parts.read_sanitizer, scripts.boxed.Ran
    stopped = read(ran(code=None, out=at, err="", seconds=150.0), "========= COMPUTE-SANITIZER\n", False)
    assert (stopped["problem"], stopped["begun"], stopped["done"]) == ("", 3, True)
    fault = "========= Invalid __global__ read of size 4 bytes\n=========     at forward_kernel\n"
    faulty = read(ran(code=0, out=at, err="", seconds=9.0), fault + "========= ERROR SUMMARY: 7 errors\n", False)
    assert faulty["problem"] == "7 errors: Invalid __global__ read of size 4 bytes"
    assert not faulty["done"]
    refused = read(ran(code=1, out="", err="no", seconds=1.0), "========= Error: Device not supported\n", False)
    assert refused["problem"] == "exit status 1: no; ========= Error: Device not supported"


def test_libraries_built_ahead_are_a_wheel_that_flashinfer_finds(scripts: SimpleNamespace, tmp_path: Path) -> None:
    library = tmp_path / "sampling.so"
    library.write_bytes(b"\x7fELF")
    wheel = scripts.prebuild_flashinfer.pack([library], tmp_path / "wheels", "0.6.3")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = subprocess.run(
        [sys.executable, "-c", "import flashinfer_jit_cache as it; print(it.__version__, it.get_jit_cache_dir())"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert found[0] == "0.6.3"
    assert (Path(found[1]) / "sampling" / "sampling.so").read_bytes() == b"\x7fELF"


def first_light(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHES / "first_light.py"), "--dry", *arguments],
        capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
    )  # fmt: skip


def test_first_calls_are_right_in_the_emulator_and_the_interpreter() -> None:
    done = first_light("one_box", "sample", "--seconds", "150")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, verdict = done.stdout.splitlines()
    assert first.startswith("right  one_box")
    assert second.startswith("right  sample")
    assert verdict == "2 of 2 right"


def test_a_first_call_that_hangs_costs_itself_alone() -> None:
    done = first_light("one_box", "--seconds", "0.3")
    assert done.returncode == 1
    assert "WRONG  one_box" in done.stdout
    assert "hung: stopped after 0 s" in done.stdout
    assert done.stdout.endswith("0 of 1 right; first not: one_box\n")


@pytest.mark.parametrize(("share", "code"), [(0.3, 0), (1.1, 1), (float("nan"), 1), (float("inf"), 1)])
def test_a_first_call_that_errs_by_more_than_is_allowed_is_not_right(
    scripts: SimpleNamespace,
    share: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(scripts.first_light.STEPS, "odd", lambda: iter([("out", 0.1), ("lse", share)]))
    assert scripts.first_light.main(["odd", "--inside"]) == code
    assert capsys.readouterr().out == f"out 0.10, lse {share:.2f}\n"


def test_a_kernel_that_is_off_is_off_by_more_than_is_allowed(scripts: SimpleNamespace) -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    ((_, right),) = scripts.first_light._compare(lambda x: (2 * x,), lambda x: (2 * x,), [x], names="y", length=8)
    ((_, wrong),) = scripts.first_light._compare(lambda x: (2.1 * x,), lambda x: (2 * x,), [x], names="y", length=8)
    assert right <= 1.0 < wrong


@pytest.mark.parametrize(
    ("arguments", "code", "told"), [(["odd"], 2, "step = 'odd': expected one of compiler, "), ([], 4, "GPU = none")]
)
def test_what_first_calls_lack_is_one_line(
    scripts: SimpleNamespace, arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not arguments and Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    assert scripts.first_light.main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
