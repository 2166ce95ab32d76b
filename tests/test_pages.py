"""Both pages as people get them: in headless Chromium, where that is installed, and what their markup must have."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
from pages import COMPARISON, VERIFY, run_folder

from distillabse.evaluation.comparison_page import render_comparison
from distillabse.evaluation.report import collect, render_page
from distillabse.evaluation.templates import render

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "consumers"))

from chromium import browser_page, find_chromium

in_chromium = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
COLOURS = ("text", "muted", "blue", "teal", "amber", "rose", "violet", "slate", "good", "bad")
# What is cut off: wider than the window and in no box of its own that scrolls.
OUTSIDE = """
[...document.querySelectorAll('body *')].filter((element) => {
  const box = element.getBoundingClientRect();
  const seen = box.width > 0 && box.height > 0 && (!(element instanceof SVGElement) || element.tagName === 'text');
  return seen && !element.closest('.wide') && (box.right > innerWidth + 1 || box.left < -1);
}).map((element) => element.outerHTML.slice(0, 120))
"""
# Labels of the plot on top that lie over one another.
COVERED = """
(() => {
  const svg = [...document.querySelectorAll('header svg')].find((svg) => svg.getBoundingClientRect().width > 0);
  const texts = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
  const shared = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  return texts.flatMap(([name, a], number) => texts.slice(number + 1).filter(([other, b]) =>
    shared(a, b, 'left', 'right') > 2 && shared(a, b, 'top', 'bottom') > 4
  ).map(([other]) => [name, other]));
})()
"""


def hard_report(folder):
    """A report with what is hard to fit: 30 languages, long texts, a right-to-left one, and sparse layers."""
    verify = copy.deepcopy(VERIFY)
    for sets in verify["fidelity"].values():
        sets["test"]["slices"]["language"] = {
            f"x{number}": {"n": 10 + number, "cosine_mean": 0.9 - number / 100, "skill": 0.8 - number / 50}
            for number in range(30)
        }
    texts = ["a" * 500, "الخبر من الشرقيه", "one two three " * 30]
    verify["worst"] = [
        {"text": text, "language": "ar", "cosine": 0.1, "teacher_neighbour": texts[0], "teacher_similarity": 0.5,
         "student_neighbour": texts[2], "student_similarity": 0.4} for text in texts
    ]  # fmt: skip
    loads = {f"router/layer_{layer}/load_expert_{expert}": 0.125 for layer in range(3) for expert in range(8)}
    history = {
        "log": [{"step": step, "loss": 1 / step, **loads} for step in (10, 20)], "training_seconds": 9.0,
        "sentences": 500, "sentences_per_second": 55.5, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    return render_page(collect(run_folder(folder, verification=verify, training_history=history)))


def hard_comparison():
    """A comparison with long names of encoders, as they are when they are paths."""
    long = {
        name: name if name == "base" else f"runs/a-folder-with-a-long-name/bundle-{name}" for name in ("base", "middle")
    }

    def renamed(value):
        if isinstance(value, dict):
            return {long.get(key, key): renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        return long.get(value, value) if isinstance(value, str) else value

    return render_comparison(renamed(COMPARISON))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, html in (("report", hard_report(folder / "run")), ("comparison", hard_comparison())):
        found[name] = folder / f"{name}.html"
        found[name].write_text(html, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def browser():
    with browser_page(find_chromium()) as page:
        for domain in ("Network", "Log", "Runtime"):
            page.call(f"{domain}.enable")
        yield page


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_tables_have_headers_and_figures_have_names(pages, name):
    html = pages[name].read_text(encoding="utf-8")
    assert len(html) < 2_000_000
    tables = re.findall("<table.*?</table>", html, re.DOTALL)
    assert len(tables) > 5
    for table in tables:
        assert "<thead" in table and '<th scope="col"' in table
        assert not re.search(r"<th(?![^>]*scope=)[ >]", table)
        assert not re.search(r"<th[^>]*></th>", table)
    assert html.count("<svg") == len(re.findall(r'<svg role="img" aria-label="[^"]{10,}"', html))


def test_every_colour_of_text_can_be_read_in_light_and_dark():
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = render("page.css")
    for scheme in style.split("prefers-color-scheme: dark"):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for ground in ("page", "panel", "notice", "alarm"):
            for name in COLOURS if ground == "page" else ("text", "bad"):
                low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground, colours)  # WCAG 2.2, level AA


@in_chromium
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_loads_nothing_and_reports_no_error(pages, browser, name):
    browser.events.clear()
    browser.open(pages[name].as_uri())
    browser.evaluate("new Promise((done) => setTimeout(done, 200))")
    requests = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [pages[name].as_uri()]
    told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in told] == []


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_cut_off_or_covered(pages, browser, name, width, dark):
    browser.show(width, 800, dark)
    browser.open(pages[name].as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate(COVERED) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(16, 19, 24)" if dark else "rgb(255, 255, 255)")
    shown = "[...document.querySelectorAll('header svg')].filter((svg) => svg.getBoundingClientRect().width > 0).length"
    assert browser.evaluate(shown) == 1
    if width == 1280:  # the first screen ends below the plot
        assert browser.evaluate("document.querySelector('header figure').getBoundingClientRect().top") < 450


@in_chromium
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_can_be_printed(pages, browser, name, tmp_path):
    browser.open(pages[name].as_uri())
    browser.show(1280, 800, dark=True)  # paper stays white
    document = browser.pdf()
    assert document.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 15
