"""Reads a page as a browser would: elements with their attributes, tables as rows of cells."""

import re
from html.parser import HTMLParser


class Cell:
    """A cell of a table."""

    def __init__(self, attributes: dict[str, str | None]) -> None:
        self.value = attributes.get("data-v")
        self.classes = (attributes.get("class") or "").split()
        self.text = ""


class Page(HTMLParser):
    """The elements and the tables of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[dict[str, str | None], list[list[Cell]]]] = []
        self.text = ""
        self._cell: Cell | None = None
        self._skip = False
        self.feed(source)

    def table(self, name: str) -> list[list[Cell]]:
        """Find the rows of the table with this id or class."""
        for attributes, rows in self.tables:
            if name == attributes.get("id") or name in (attributes.get("class") or "").split():
                return rows
        raise LookupError(name)

    def every(self, name: str) -> list[list[list[Cell]]]:
        """Find the rows of every table with this class."""
        return [rows for about, rows in self.tables if name in (about.get("class") or "").split()]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._skip = tag in ("script", "style")
        if tag == "table":
            self.tables.append((attributes, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append(cell := Cell(attributes))
            self._cell = cell

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.text += data
        if self._cell is not None:
            self._cell.text += re.sub(r"[ \n]+", " ", data) if data.strip() else ""
