"""Reading pages that the package writes, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

ALONE = {"meta", "br", "hr", "img", "link", "input", "col"}  # elements without an end tag


class Page(HTMLParser):
    """Fails where tags do not match.

    Attributes:
        fetched: what the page would get from elsewhere.
        texts: the texts of all elements, by their class.
        count: how many elements there are of each name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it, and what it fetches."""
        told = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ALONE:
            self.open.append((tag, told.get("class") or ""))
        links = [str(told[name]) for name in ("src", "href", "xlink:href", "data", "action") if name in told]
        self.fetched += [link for link in links if not link.startswith("#")]
        self.fetched += [tag] if tag in ("link", "iframe", "object", "embed") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One that ends where it begins."""
        self.handle_starttag(tag, attrs)
        if tag not in ALONE:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """It ends what was opened last."""
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        """Keep it under the class of its element."""
        if self.open:
            tag, name = self.open[-1]
            self.texts.setdefault(name, []).append(data.strip())
            self.fetched += re.findall(r"@import.*|url\((?!#)[^)]*", data) if tag == "style" else []


def read_page(text: str) -> Page:
    """A whole page: every element that begins ends."""
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [], f"{page.open} never end"
    return page
