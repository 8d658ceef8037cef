"""Tables for notebooks."""

import dataclasses
from html.parser import HTMLParser

from fim_lora.report.html import html_table
from helpers.spectra import compression, spectrum


class Reader(HTMLParser):
    """Collects the tags, and the text of every cell and paragraph."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.rows = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data
        elif data.strip():
            self.texts.append(data)


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
    chosen = dataclasses.replace(compression(whole), criterion="<img src=x onerror=alert(1)>")
    shown = read(chosen._repr_html_())
    assert shown.rows == chosen.rows()
    assert shown.texts == [chosen.criterion]
