"""Pages as tests read them: elements, text and the data inside."""

import base64
import gzip
import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page: tags with attributes, and the text inside by element id or tag."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._open = [], {}, []
        self.feed(path.read_text(encoding="utf-8"))
        packed = base64.b64decode(self.text["data-gz"])
        self.data = json.loads(gzip.decompress(packed).decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(dict(attrs).get("id", tag))

    def handle_endtag(self, tag):
        if self._open:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.text[self._open[-1]] = self.text.get(self._open[-1], "") + data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
