"""The page of a comparison, from a small but complete comparison.json."""

from __future__ import annotations

import copy
import re

import pytest
from pages import COMPARISON, NAMES, Page, grid_row

from distillabse.evaluation.comparison_page import headline, key_figures, pareto_points, render_comparison
from distillabse.evaluation.page_tables import Cell, grid_tint, resources
from distillabse.evaluation.plots.speed import looks_of

SECTIONS = [
    "Encoders", "Fidelity to base", "Speed", "Throughput, memory, cold start and energy", "Guards", "Worst sentences",
    "Environment",
]  # fmt: skip


@pytest.fixture(scope="module")
def html() -> str:
    return render_comparison(COMPARISON)


def changed(**replaced):
    return copy.deepcopy(COMPARISON) | replaced


def test_every_figure_of_the_json_is_on_the_page(html):
    text = Page(html).text.replace("\N{EN DASH}", "-")
    for figure in (
        "3 encoders, baseline base, thesis protocol", "1,234 texts of news.txt, 18 tokens", "at most 33",
        "onnx/small.onnx", "ONNX Runtime CPU", "470,926,848", "18.1 MB", "512.3 MB", "abababababab",
        "0.9123", "0.9113-0.9133", "0.8765", "0.7654", "+0.0358", "+0.0311 to +0.0402", "2.5e-07",
        "14.25 ms", "8.85x", "8.80-8.90", "1.61 ms", "0.86x", "21.38", "28.50", "4,321.00", "128 tokens",
        "78", "76-80", "2,345.6 MB", "3,456.7 MB", "4.56", "4.44-4.78",
        "Energy was not measured: RAPL is not readable.",
        "spread 0.0361", "0.1357", "0.8642", "0.7531", "<b>next</b>", "<script>alert('x')</script>",
        "Xeon <Gold>", "cores_used_by_others", "4.5 minutes", "All 2 guards passed",
    ):  # fmt: skip
        assert figure in text, figure
    assert re.findall("<h2>(.*?)</h2>", html) == SECTIONS
    assert "Peak GPU memory" not in text


def test_hostile_names_and_texts_are_escaped_and_nothing_is_loaded(html):
    page = Page(html)
    assert {"script", "b", "fast", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert len(page.ids) == len(set(page.ids)) > 100
    assert set(page.links) <= {f"#{identifier}" for identifier in page.ids}
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in html


def test_marks_say_which_speedups_are_not_certain(html):
    assert html.count('<abbr title="the time ended before') == 1
    assert re.findall(r'<abbr title="Wilcoxon p ([^"]+)">n\.s\.', html) == ["0.31"]


def test_the_headline_names_the_closest_and_the_fastest():
    assert headline(COMPARISON) == (
        "small & <fast> stays closest to base (mean cosine 0.912, skill 0.945) and is fastest: "
        "8.8x faster than base at batch 1."
    )
    two = changed()
    two["latency"]["middle"][0]["speedup"] = 8.94
    assert headline(two) == (
        "small & <fast> stays closest to base (mean cosine 0.912, skill 0.945); "
        "middle is fastest: 8.9x faster than base at batch 1."
    )
    alone = changed(encoders={name: COMPARISON["encoders"][name] for name in ("base", "middle")})
    assert headline(alone) == "middle: mean cosine 0.876, skill 0.765, 6.4x faster than base at batch 1."
    alone["latency"]["middle"] = [grid_row(1, None, 28.5, 0.5)]
    assert "2.0x slower than base at batch 1" in headline(alone)


def test_key_figures_are_the_best_of_each_kind():
    values = [(key["value"], key["note"]) for key in key_figures(COMPARISON)]
    assert values == [
        ("0.9123", "small & <fast>; constant vector 0.3112"),
        ("8.8x", "small & <fast> (8.80\N{EN DASH}8.90)"),
        ("1.61 ms", "small & <fast>; base 14.25 ms"),
        ("18.1 MB", "small & <fast>; base 1,883.7 MB"),
    ]


def test_points_are_of_the_smallest_cell_and_of_what_was_measured_in_it():
    result = changed()
    result["latency"]["middle"] = [grid_row(64, 128, 5001.0, 0.86)]
    points = pareto_points(result, looks_of(NAMES, "base"))
    assert [(point.label, point.latency_ms, point.fidelity, point.size_bytes) for point in points] == [
        ("base", 14.25, 1.0, 1_883_730_160),
        ("small & <fast>", 1.61, 0.9448, 18_079_553),
    ]


def test_failed_guards_are_a_banner_that_says_why(html):
    banner = "These figures are not to be trusted:"
    assert banner not in html
    result = changed(trusted=False)
    result["guards"][0].update(passed=False, detail="All vectors are equal. Check the pooling of <middle>.")
    page = render_comparison(result)
    text = Page(page).text
    assert banner in text and "guards passed" not in text
    alarm = page[page.index('<div class="alarm"') : page.index("<dl")]
    assert "constant student</strong> (middle): All vectors are equal. Check the pooling of &lt;middle&gt;." in alarm
    assert "throttling" not in alarm
    assert page.index(banner) < page.index('aria-label="Fidelity (skill)')


def test_what_is_absent_leaves_its_section_out():
    least = {"name": "peers", "baseline": "base", "encoders": {"base": {}, "other": {}}}
    html = render_comparison(least)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Encoders"]
    assert "<svg" not in html and "other: no fidelity and no speed-up was measured." in html
    for key in ("fidelity", "fidelity_pairs", "latency", "guards", "worst", "environment", "texts", "energy", "memory"):
        render_comparison({name: value for name, value in COMPARISON.items() if name != key})
    without = changed(energy={"base": {"joules_per_1000_sentences": 12.345}})
    for rows in without["latency"].values():
        for row in rows:
            for key in ("speedup", "speedup_ci95", "wilcoxon_p", "converged", "p95_ms", "p99_ms"):
                row.pop(key, None)
    text = Page(render_comparison(without)).text
    assert "12.35" in text or "12.34" in text
    assert "8.85x" not in text and "1.61 ms" in text


def test_resources_have_a_column_for_what_was_measured_and_shares_of_its_largest():
    table = resources(COMPARISON)
    assert table["columns"] == ["Sentences per second", "Memory when loaded", "Peak memory", "Cold start, s"]
    assert table["rows"]["base"][0] == Cell("78", "76\N{EN DASH}80", 50.0)
    assert table["rows"]["middle"] == [Cell("155", "150\N{EN DASH}161", 100.0), None, None, None]
    assert table["notes"] == ["Energy was not measured: RAPL is not readable."]
    assert resources({}) == {"columns": [], "rows": {}, "notes": []}


def test_tints_are_symmetrical_in_the_logarithm():
    assert grid_tint(1.0) == ("above", 0.0)
    assert grid_tint(2.0) == ("above", pytest.approx(35 / 3))
    assert grid_tint(0.5) == ("below-even", pytest.approx(35 / 3))
    assert grid_tint(100.0) == ("above", 35.0)


def test_many_encoders_stay_distinct():
    names = [f"a-very-long-folder-name-{number}-of-an-encoder" for number in range(12)]
    looks = looks_of(names, names[3])
    assert len({(look.colour, look.line) for look in looks.values()}) == 12
    assert looks[names[3]].line == "--"
    assert [look.label for look in looks_of(["short", "x" * 15 + "y" * 15], "short").values()] == [
        "short", "x" * 11 + "\N{HORIZONTAL ELLIPSIS}" + "y" * 11,
    ]  # fmt: skip
