"""Marks what needs a server or a browser, and says at the end how many tests of each kind ran."""

from pathlib import Path

import pytest

KINDS = ("engine", "pack", "live", "browser")
OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, metavar="N", help="try N damaged and hostile inputs instead of a few")


def pytest_collection_modifyitems(items):
    for item in items:
        live = "live" in item.path.relative_to(Path(__file__).parent).parts
        if live:
            item.add_marker(pytest.mark.live)
        # Where tests run in several processes, all that share servers stay in one, and so does each other file.
        item.add_marker(pytest.mark.xdist_group("live" if live else item.path.stem))
        if "frontend" in item.fixturenames:
            item.add_marker(pytest.mark.browser)


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
            if outcome == "skipped" and kind in ("live", "browser"):
                reasons.add(f"{kind}: {report.longrepr[2].removeprefix('Skipped: ')}")
    terminalreporter.section("tests by kind")
    for kind, numbers in counts.items():
        said = [f"{numbers[outcome]} {outcome}" for outcome in OUTCOMES if numbers[outcome]]
        terminalreporter.write_line(f"{kind:8} {', '.join(said) or 'none ran'}")
    for reason in sorted(reasons):
        terminalreporter.write_line(f"skipped  {reason}")
