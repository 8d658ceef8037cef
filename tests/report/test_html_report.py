"""The report: what its page shows is what the result has."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from xml.etree import ElementTree

import pytest
from peft import LoraConfig

from fim_lora import FimScores, LayerScore, RankAllocation
from fim_lora.ranks.size_curve import SizeCurve
from fim_lora.ranks.sizes import format_prediction
from fim_lora.report.html_report import html_report
from helpers.spectra import compression, spectrum

VOID = {"meta", "input", "img", "link", "br"}
HOSTILE = ["<script>alert(1)</script>", "</script><b>x", 'a" onmouseover="alert(1)', "a' b & c &lt; d", "{{ 7 * 7 }}"]


class Page(HTMLParser):
    """The tables by caption, the headings with their texts, the scripts, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.facts, self.scripts, self.open, self.texts = [], {}, [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("dt", "dd"):
            self.facts.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed in its order
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        inner = self.open[-1] if self.open else ""
        if inner == "caption":
            self.caption += data
        elif inner in ("td", "th"):
            self.rows[-1][-1] += data
        elif inner in ("dt", "dd"):
            self.facts[-1] += data
        elif inner == "script":
            self.scripts[-1] += data
        elif inner not in ("style", ""):
            self.texts.append(data.strip())

    @property
    def headings(self):
        return dict(zip(self.facts[::2], self.facts[1::2], strict=True))

    @property
    def cells(self):
        """Layer name, as the cell's title, to the attributes of the cell."""
        return {attributes["title"]: attributes for tag, attributes in self.tags if "data-layer" in attributes}

    def with_id(self, name):
        [(tag, attributes)] = [one for one in self.tags if one[1].get("id") == name]
        return tag, attributes


def allocation(names=("model.layers.0.q_proj", "model.layers.1.q_proj", "head"), standard_error=0.5):
    scores = {name: LayerScore(4.0 ** (place + 1), standard_error, 8, (12, 20)) for place, name in enumerate(names)}
    return RankAllocation.from_scores(FimScores(scores, 2), LoraConfig(r=4))


def page_of(result, curve=None, **options):
    return Page(html_report(result, **({"model": "", "facts": {}, "provenance": {}, "curve": curve} | options)))


def compressed(share=0.25, measured=(), examples=6, **options):
    whole = spectrum(examples=examples)
    chosen = compression(whole, share, **options)
    return chosen, SizeCurve.of(whole, chosen, measured)


def test_an_allocation_is_shown_with_its_scores_and_their_errors():
    result = allocation()
    page = page_of(result, facts={"Data": "data.jsonl"})
    assert page.headings["Data"] == "data.jsonl"
    assert page.headings["Measured"] == result.scores.measured
    assert page.headings["Size"] == f"{result.num_parameters:,} parameters, as with uniform rank 4"
    [rows] = [rows for caption, rows in page.tables.items() if caption.startswith("One row for each layer")]
    assert rows[0][:8] == ["layer", "rank", "lora_alpha", "parameters", "norm", "±", "mean eFIM", "±"]
    for row, (name, score) in zip(rows[1:], result.scores.items(), strict=True):
        assert row[0] == name
        assert int(row[1]) == result.ranks[name]
        assert float(row[2]) == result.alphas[name]
        assert int(row[3]) == result.ranks[name] * 32
        assert float(row[4]) == pytest.approx(score.norm, rel=0.01)
        # The norms at one standard error above and below the mean, as far as the error is small.
        above, below = ((score.mean + sign * 1e-4 * score.standard_error) ** 0.5 * 240**0.5 for sign in (1, -1))
        assert float(row[5]) == pytest.approx((above - below) / 2e-4, rel=0.05)
        assert float(row[6]) == pytest.approx(score.mean, rel=0.01)
        assert float(row[7]) == score.standard_error
    assert {name: int(cell["data-layer"]) for name, cell in page.cells.items()} == {
        name: place for place, name in enumerate(result.ranks)
    }
    assert page.tables["other layers"][1:] == [["head", str(result.ranks["head"])]]
    assert not page.scripts


def test_unknown_errors_and_projected_scores_are_named():
    result = allocation(standard_error=None)
    scores = FimScores({name: replace(score, exact=False) for name, score in result.scores.items()}, 2)
    page = page_of(replace(result, scores=scores))
    [rows] = [rows for caption, rows in page.tables.items() if caption.startswith("One row for each layer")]
    for row in rows[1:]:
        assert (row[5], row[7], row[9]) == ("unknown", "unknown", "through a random projection")


def test_a_compression_is_shown_with_its_ranks_before_and_after():
    result, curve = compressed(loss_before=2.0, loss_after=2.5)
    page = page_of(result, curve)
    assert page.tables["The adapter before and after"] == result.rows()
    rows = page.tables["One row for each layer"]
    assert {row[0]: (int(row[1]), int(row[2])) for row in rows[1:]} == {
        name: (result.ranks_before[name], rank) for name, rank in result.ranks.items()
    }
    assert sum(int(row[5].replace(",", "")) for row in rows[1:]) == result.num_parameters


def test_the_slider_has_every_size_of_the_curve():
    result, curve = compressed(measured=[(300, 0.125)], loss_before=2.0, loss_after=2.5)
    page = page_of(result, curve)
    content = json.loads(page.scripts[0])
    assert len(content["points"]) == len(curve.points)
    _, slider = page.with_id("slider")
    assert (slider["min"], slider["max"]) == ("0", str(len(curve.points) - 1))
    assert curve.points[int(slider["value"])].parameters == result.num_parameters
    assert ("label", {"for": "slider"}) in page.tags
    [table] = [rows for caption, rows in page.tables.items() if caption.startswith("One row for each size")]
    measured = {300: "+0.12", result.num_parameters: "+0.5"}
    for point, shown, row in zip(curve.points, content["points"], table[1:], strict=True):
        assert shown["ranks"] == list(point.ranks.values())
        assert shown["shown"] == row
        assert row[1] == f"{point.parameters:,}"
        assert row[0] == f"{point.share:.1%}"
        assert row[2] == format_prediction(point.prediction)
        assert row[6] == measured.get(point.parameters, "")
        assert row[7] == f"{point.dropped_norm:.1%}"
    used = {rank for point in curve.points for rank in point.ranks.values()}
    assert {int(rank) for rank in content["colors"]} == used | set(result.ranks.values())
    for name, rank in result.ranks.items():
        background, text = content["colors"][str(rank)]
        assert f"background: {background}; color: {text}" in page.cells[name]["style"]
    # Before the script runs, the page shows the chosen size.
    shown = content["points"][int(slider["value"])]["shown"]
    assert [text for text in page.texts if text in shown[:2]] == shown[:2]


def test_the_marker_is_where_the_picture_has_the_size():
    result, curve = compressed()
    page = page_of(result, curve)
    points = json.loads(page.scripts[0])["points"]
    [picture] = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    svg = ElementTree.fromstring(base64.b64decode(picture.partition("base64,")[2]))
    width = float(svg.get("viewBox").split()[2])
    # The path of the predicted curve, whose points are the sizes.
    lines = [one.get("d") for one in svg.iter("{http://www.w3.org/2000/svg}path") if "#31688e" in one.get("style", "")]
    [line] = [one for one in lines if one.count("L") + 1 == len(points)]
    lefts = [float(x) for x, _ in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    assert [point["place"] for point in points] == pytest.approx([100 * x / width for x in lefts], abs=0.01)


def test_the_picture_without_data_and_the_cap_are_those_of_the_curve():
    result, curve = compressed(examples=0, r_max=2)
    page = page_of(result, curve)
    assert all(point["shown"][2] == "unknown" for point in json.loads(page.scripts[0])["points"])
    assert max(max(point["ranks"]) for point in json.loads(page.scripts[0])["points"]) == 2
    assert "r_max = 2" in page.headings["Ranks"]


def test_a_compression_without_its_sizes_says_so():
    result, _ = compressed()
    page = page_of(result)
    assert not page.scripts
    assert any("fim_size_curve.json" in text for text in page.texts)
    assert page.tables["The adapter before and after"] == result.rows()


def test_sizes_of_another_compression_are_refused():
    _, curve = compressed(0.5)
    with pytest.raises(ValueError, match="not those of this compression"):
        page_of(compressed(0.25)[0], SizeCurve(curve.points[-2:], (), curve.num_parameters, ""))
    with pytest.raises(ValueError, match="not those of this compression"):
        page_of(allocation(), curve)


def test_everything_that_was_recorded_is_shown():
    provenance = {
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0", "peft": "0.20"},
        "data": {"name": "data.jsonl", "rows": 3, "columns": {"text": "t"}, "sha256": None},
        "classes": ["a", "b"],
        "nothing": [],
    }
    headings = page_of(allocation(), provenance=provenance).headings
    expected = {
        "date": "2026-01-02T03:04:05+00:00",
        "versions.torch": "2.13.0",
        "versions.peft": "0.20",
        "data.name": "data.jsonl",
        "data.rows": "3",
        "data.columns.text": "t",
        "classes": "a, b",
        "nothing": "none",
    }
    assert {key: value for key, value in headings.items() if key in expected} == expected
    assert "data.sha256" not in headings


def test_deeply_nested_and_invisible_values_are_shown():
    nested = {"x": "\u202egnp.exe\x1b[2J"}
    for _ in range(3000):
        nested = {"a": nested}
    [value] = [text for text in page_of(allocation(), provenance=nested).headings.values() if "gnp" in text]
    assert value == "\\u202egnp.exe\\x1b[2J"


def test_hostile_names_stay_text():
    names = [f"model.layers.{place}.{name}" for place, name in enumerate(HOSTILE)] + HOSTILE
    plain = page_of(allocation([f"model.layers.{place}.a" for place in range(5)] + list("bcdef")))
    result = allocation(names)
    options = {"model": HOSTILE[0], "facts": {name: name for name in HOSTILE}}
    page = page_of(result, provenance={name: {name: name} for name in HOSTILE}, **options)
    allowed = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} == allowed
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert set(page.cells) == set(names)
    for name in HOSTILE:
        assert page.headings[name] == name
        assert page.headings[f"{name}.{name}"] == name
    rows = next(rows for caption, rows in page.tables.items() if caption.startswith("One row for each layer"))
    assert [row[0] for row in rows[1:]] == names
    assert any(HOSTILE[0] in text for text in page.texts)


def test_hostile_names_stay_text_beside_the_script():
    whole = spectrum(HOSTILE)
    result = replace(compression(whole, 0.5), criterion="</script><script>alert(1)</script>")
    page = page_of(result, SizeCurve.of(whole, result))
    assert len(page.scripts) == 2  # the values, and the script of the template
    assert set(page.cells) == set(HOSTILE)
    json.loads(page.scripts[0])


def test_the_same_result_gives_the_same_page():
    result, curve = compressed()
    pages = [html_report(result, model="", facts={}, provenance={}, curve=curve) for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_page_needs_nothing_from_outside():
    result, curve = compressed()
    text = html_report(result, model="", facts={}, provenance={}, curve=curve)
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    [policy] = [one["content"] for tag, one in page.tags if tag == "meta" and "http-equiv" in one]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "@import" not in text
    assert "url(" not in text
    assert not page.open


def test_the_template_switches_no_escaping_off():
    template = files("fim_lora.report").joinpath("report.html").read_text(encoding="utf-8")
    assert not re.search(r"\|\s*safe|autoescape", template)
