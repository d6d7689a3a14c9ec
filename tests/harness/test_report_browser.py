"""The report as people see it: opened from a file in Chromium, clicked through, measured, looked at."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera_parity.report import write_reports
from tessera_parity.report.heatmap import FORWARD_ORDER, OUTSIDE
from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict

pytestmark = pytest.mark.browser

FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)
PANELS = ("overview", "checks", "layers", "rounding", "training", "mutants", "environment")
LEAST_INK = 0.015
"""Share of pixels that differ from the background; a page with a heading and one line of text has more."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing (pip install playwright)")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is missing (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield opened
        opened.close()


def layered(name: str, side: str, layers: int, rng: np.random.Generator) -> Check:
    outside = name in OUTSIDE
    departs = name == "attention.q_rope" and side == "jax"
    errors = (10 ** rng.uniform(-16, -13, layers)).tolist()
    return Check(
        subject="forward", name=name, question=Question.MATHEMATICS, sides=("numpy", side), cases=40,
        compared=123_456, verdict=Verdict.DIVERGENCE if departs else Verdict.PARITY,
        observed=1e-3 if departs else max(errors), limit=1e-12 * layers, op=name if departs else None,
        layer=1 if departs else None, case={"seed": 1} if departs else None,
        series={} if outside else {"error_by_layer": [1e-3] * layers if departs else errors},
    )  # fmt: skip


def full_run() -> Run:
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    losses = 3 + np.exp(-steps / 90)
    checks = [layered(name, side, 48, rng) for side in ("torch", "jax") for name in FORWARD_ORDER]
    common: dict[str, Any] = {
        "question": Question.ROUNDING, "sides": ("torch", "jax"), "verdict": Verdict.PARITY, "cases": 60,
        "compared": 60, "observed": 0.01, "limit": 0.05,
    }  # fmt: skip
    ratios = {"log_ratio": rng.normal(size=60).tolist(), "log_ratio_calibration": rng.normal(size=200).tolist()}
    curves = {
        "loss_torch": losses.tolist(),
        "loss_jax": (losses + 1e-9).tolist(),
        "moment_first": (1e-15 * (steps + 1)).tolist(),
    }
    long = "a_name_without_any_place_to_break_" * 4
    checks += [
        Check(subject="rounding", name=long, series=ratios, **common),
        Check(subject="trajectory", name="nano", series=curves, **common),
    ]
    mutant = MutantOutcome(
        name=long, half="jax", kind="index", killed=True, killed_by="forward", expected_op="attention.q_rope",
        named_op="attention.q_rope", repro_layers=1, repro_tokens=2,
    )  # fmt: skip
    environment = {
        "os": "Linux",
        "path": long,
        "torch": {"version": "2.13", "x64": "on"},
        "jax": {"version": "0.10", "x64": "on"},
    }
    return Run(lane="full", seed=1, environment=environment, checks=checks, mutants=[mutant] * 30, left_out=[long])


def opened(browser: Any, run: Run, directory: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    write_reports(run, directory)
    page = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
    troubles: list[str] = []
    address = (directory / "report.html").as_uri()
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda request: request.url == address or troubles.append(f"request: {request.url}"))
    page.goto(address)
    return page, troubles


def ink(page: Any, path: Path) -> float:
    """Return the share of pixels of a screenshot that are not the page's own background."""
    from matplotlib.image import imread

    page.screenshot(path=path)
    pixels = imread(path)[..., :3]
    return float(np.mean(np.abs(pixels - pixels[0, 0]).max(-1) > 0.1))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_panel_opens_by_click_fits_the_window_and_is_not_empty(
    browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    page, troubles = opened(browser, full_run(), tmp_path, width, scheme)
    first = page.locator("header").inner_text()
    assert "Divergence" in first
    assert "30 of 30" in first
    assert page.locator("header dl").bounding_box()["y"] < 500, "the verdict and both rates are in the first screen"
    for key in PANELS:
        page.click(f"[data-panel={key}]")
        panel = page.locator(f"#{key}")
        assert page.locator("[role=tabpanel]:visible").count() == 1
        assert len(panel.inner_text()) > 40, key
        assert page.locator(f"#{key} .empty").count() == 0, key
        wide, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= window, f"{key} overflows: {wide} > {window}"
        assert ink(page, tmp_path / f"{key}.png") > LEAST_INK, key
    assert troubles == []


def test_labels_of_pictures_do_not_overlap(browser: Any, tmp_path: Path) -> None:
    page, _ = opened(browser, full_run(), tmp_path, 390, "light")
    overlaps = """(panel) => [...document.querySelectorAll("#" + panel + " svg")].flatMap((svg) => {
        const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
            p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1
        ).map(([b]) => a + " on " + b));
    })"""
    for key in ("layers", "rounding", "training"):
        page.click(f"[data-panel={key}]")
        assert page.locator(f"#{key} svg").count() > 0
        assert page.evaluate(overlaps, key) == []


def test_tabs_work_by_keyboard_and_the_filter_narrows_the_list(browser: Any, tmp_path: Path) -> None:
    page, troubles = opened(browser, full_run(), tmp_path, 1280, "light")
    page.focus("#tab-overview")
    page.keyboard.press("ArrowRight")
    assert page.locator("#checks").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-checks"
    everything = page.locator("#checks tbody tr:visible").count()
    page.fill("#filter", "Q_ROPE numpy")
    assert page.locator("#checks tbody tr:visible").count() == 2 < everything
    page.click("[data-verdict=divergence].chip")
    assert page.locator("#checks tbody tr:visible").count() == 1
    page.click("#checks tbody tr:visible summary >> nth=0")
    assert "parity repro" in page.locator("#checks tbody tr:visible").inner_text()
    page.fill("#filter", "no such check")
    assert page.locator("#nothing").is_visible()
    assert troubles == []


def test_an_empty_run_says_so_in_every_panel(browser: Any, tmp_path: Path) -> None:
    page, troubles = opened(browser, Run(lane="quick", seed=0, environment={}), tmp_path, 390, "light")
    assert "Inconclusive" in page.locator("header").inner_text()
    for key in PANELS:
        page.click(f"[data-panel={key}]")
        assert page.locator(f"#{key} .empty").is_visible(), key
    assert troubles == []
