"""Marks what needs a server or a browser, and says at the end how many tests of each kind ran."""

import os
from pathlib import Path

import pytest

# The models here are so small that a second thread costs more than it brings: also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

KINDS = ("engine", "pack", "web", "live", "browser")
OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, metavar="N", help="try N damaged and hostile inputs instead of a few")


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder == "live":
            item.add_marker(pytest.mark.live)
        if {"pages", "fresh_frontend"} & set(item.fixturenames):
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of a run of all files in several processes; its library is imported here, as other runs do without."""
    if config.getoption("dist") != "loadfile":
        return None
    from two_ends import FromTwoEnds

    return FromTwoEnds(config, log)


@pytest.fixture(scope="session")
def chromium():
    """A browser, or a skip. Its library is imported here: most tests run without it, some where it is not installed."""
    from browser import CHROMIUM_FLAGS, find_chromium
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium was found; set CHROMIUM_PATH to its program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def kind_of(report) -> str | None:
    if "browser" in getattr(report, "keywords", ()):  # a module that failed to import has none
        return "browser"
    return next((kind for kind in KINDS if kind in Path(report.nodeid.split("::")[0]).parts), None)


def pytest_terminal_summary(terminalreporter):
    counts = {kind: dict.fromkeys(OUTCOMES, 0) for kind in KINDS}
    reasons = set()
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            kind = kind_of(report)
            if kind:
                counts[kind][outcome] += 1
            if outcome == "skipped" and kind in ("web", "live", "browser"):
                reasons.add(f"{kind}: {report.longrepr[2].removeprefix('Skipped: ')}")
    terminalreporter.section("tests by kind")
    for kind, numbers in counts.items():
        said = [f"{numbers[outcome]} {outcome}" for outcome in OUTCOMES if numbers[outcome]]
        terminalreporter.write_line(f"{kind:8} {', '.join(said) or 'none ran'}")
    for reason in sorted(reasons):
        terminalreporter.write_line(f"skipped  {reason}")
