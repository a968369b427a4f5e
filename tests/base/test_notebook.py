from __future__ import annotations

from html.parser import HTMLParser

from opensmp.base import notebook


class Words(HTMLParser):
    """The text of each element, and which elements there are."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)


NASTY = '<script>alert("&")</script>'


def test_text_stays_text():
    for made in (notebook.preformatted(NASTY), notebook.paragraph(NASTY)):
        read = Words(made)
        assert "".join(read.words) == NASTY
        assert len(read.tags) == 1


def test_a_table_has_a_cell_for_each_text():
    read = Words(notebook.table(["name", "size"], [["a", "1"], [NASTY, "2\n3"]], left=["name"]))
    assert "script" not in read.tags
    assert (read.tags.count("th"), read.tags.count("td"), read.tags.count("tr")) == (2, 4, 3)
    assert [word for word in read.words if "s" not in word] == ["name", "a", "1", "2\n3"]
