"""Tables for notebooks."""

import dataclasses
from html.parser import HTMLParser

from peft import LoraConfig

from fim_lora import FimScores, LayerScore, RankAllocation
from fim_lora.report.html import html_table
from fim_lora.report.rank_colors import RankScale, hexadecimal
from helpers.proportional import proportional
from helpers.spectra import compression, spectrum


class Reader(HTMLParser):
    """Collects the tags, and the text of every cell and paragraph."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.rows, self.cells = set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cells.append(dict(attributes))
        self.is_caption = tag in ("caption", "p")

    def handle_data(self, data):
        if self.is_caption and data.strip():
            self.texts.append(data)
        elif data.strip():
            self.rows[-1][-1] += data


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_a_table_shows_exactly_its_rows():
    rows = [["size", "loss"], ["50 %", "<script>alert('1')</script>"], ["a & b", '"c" &lt; d']]
    reader = read(html_table(rows, "<b>heading</b> & more"))
    assert reader.rows == rows
    assert reader.texts == ["<b>heading</b> & more"]
    assert reader.tags == {"div", "p", "table", "tr", "th", "td"}


def test_a_spectrum_and_a_compression_show_their_tables():
    whole = spectrum()
    shown = read(whole._repr_html_())
    assert [row[0] for row in shown.rows[1:]] == ["100.0%", "50.0%", "25.0%", "12.5%", "6.2%"]
    assert shown.texts == [str(whole).splitlines()[0]]
    chosen = dataclasses.replace(compression(whole, 0.25), criterion="<img src=x onerror=alert(1)>")
    shown = read(chosen._repr_html_())
    assert shown.rows[: len(chosen.rows())] == chosen.rows()
    assert shown.texts[0] == chosen.criterion
    assert rank_rows(shown.rows[len(chosen.rows()) :]) == chosen.ranks


def rank_rows(rows):
    """The ranks in a table of kinds of layer at depths, by the names that `helpers.spectra` gives."""
    (_, *kinds), *others = rows
    return {
        f"model.layers.{depth}.{kind}": int(rank)
        for depth, *cells in others
        for kind, rank in zip(kinds, cells, strict=True)
    }


def test_an_allocation_shows_its_ranks_in_color():
    names = ["model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.v_proj", "<b>head</b>"]
    scores = FimScores({name: LayerScore(4.0**place, 0.1, 2, (8, 8)) for place, name in enumerate(names)}, 1)
    config = LoraConfig(r=4, init_lora_weights="fim", fim_config=proportional(r_min=0))
    allocation = RankAllocation.from_scores(scores, config)
    shown = read(allocation._repr_html_())
    first, second, third, head = map(str, allocation.ranks.values())
    assert shown.rows == [
        ["depth", "q_proj", "v_proj"],
        ["0", first, second],
        ["1", "", third],
        ["layer", "rank"],
        ["<b>head</b>", head],
    ]
    assert shown.texts == [str(allocation).splitlines()[0], "model.layers", "other layers"]
    assert [cell["title"] for cell in shown.cells if "title" in cell] == names
    assert [cell["data-layer"] for cell in shown.cells if "title" in cell] == ["0", "1", "2", "3"]
    scale = RankScale.of(allocation.ranks.values())
    for cell, rank in zip([cell for cell in shown.cells if "title" in cell], allocation.ranks.values(), strict=True):
        assert f"background: {hexadecimal(scale.color(rank))};" in cell["style"]
    assert "0" in (first, second, third, head)
