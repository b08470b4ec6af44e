"""The widget: the same session in Python and in the notebook's page."""

from __future__ import annotations

import gc
import queue
import sys
import weakref

import pytest

import audio_lens
from audio_lens import InputError
from audio_lens.errors import ExtraError
from audio_lens.explorer import Head, Session, markup
from audio_lens.explorer.desk import Desk
from audio_lens.explorer.widget import _widget_class
from audio_lens.models.embedded import default_pair
from browsers import until

PAIR = default_pair()
HEAD = {"kind": "head", "site": "decoder.attn", "layer": 2, "head": 4, "g": 0}
# a notebook's model, whose messages are answered by `answered` at once
NOTEBOOK = """
const listeners = [];
const model = {
  on: (name, listener) => listeners.push(listener),
  send: async ({ number, message }) => {
    for (const event of await answered(message)) listeners.forEach((one) => one({ number, event }));
  },
};
widget.render({ model, el: document.body });
"""


@pytest.fixture
def widget(embedded):
    return audio_lens.explore(embedded, PAIR.clean, PAIR.question)


def told(widget, message, number=1):
    """The events that a widget sends when its page asks."""
    sent = queue.Queue()
    widget.send = sent.put
    widget._handle_custom_msg({"number": number, "message": message}, [])
    events = list(iter(lambda: sent.get(timeout=30)["event"], None))
    return events


def test_page_and_python_share_a_session(widget):
    opened, scene, _, sound = told(widget, {"do": "open"})
    assert (scene["clip"], sound["rate"]) == (PAIR.clean.name, 16_000)
    told(widget, {"do": "touch", "session": opened["session"], "touch": HEAD})
    assert widget.session.touches == (Head("decoder.attn", 2, 4),)
    widget.session.touch(Head("decoder.attn", 3, 0, 0.5))
    (again,) = told(widget, {"do": "drop", "session": opened["session"], "at": 0})
    assert [touch["head"] for touch in again["touches"]] == [0]


def test_what_is_no_message_is_refused(widget):
    for message in (None, {}, {"do": "_seat"}):
        (event,) = told(widget, message)
        assert event["event"] == "error"


def test_a_widget_that_is_gone_is_freed(embedded):
    widget = audio_lens.explore(embedded, PAIR.clean, PAIR.question)
    told(widget, {"do": "open"})
    gone = weakref.ref(widget.session)
    widget.close()
    del widget
    gc.collect()
    assert gone() is None


def test_a_missing_extra_is_named(embedded, monkeypatch):
    _widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ExtraError, match=r"pip install 'audio_lens\[explore\]'"):
        audio_lens.explore(embedded)
    _widget_class.cache_clear()


def test_a_model_that_answers_in_another_way_is_refused():
    from families import FAMILIES

    family = FAMILIES["wav2vec2"]
    with pytest.raises(InputError, match="the explorer shows models that write text"):
        Session(family.hooked(family.build()), PAIR.clean)


@pytest.mark.slow
@pytest.mark.unchecked
def test_the_widget_runs_in_a_browser(browser, embedded, tmp_path):
    desk = Desk(Session(embedded, PAIR.clean, PAIR.question, PAIR.corrupted), is_shared=True)

    def answered(message):
        events = queue.Queue()
        desk.ask(message, events.put)
        return [*iter(lambda: events.get(timeout=60), None), None]

    script = markup.script("widget.js").replace("export default", "const widget =")
    page_file = tmp_path / "notebook.html"
    page_file.write_text(
        f"<style>{markup.style()}</style><body><script type=module>{script}{NOTEBOOK}</script>"
    )
    page = browser.new_page()
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.expose_function("answered", answered)
    page.goto(page_file.as_uri())
    own = "document.querySelector('.ale')?.dataset"
    until(page, f"{own}?.ready === 'true' && {own}.headed === {own}.turn", 60)
    page.click('.cell[data-at="2.4"]')
    page.click('[data-is="turn-off"]')
    until(page, "document.querySelectorAll('.touches .off').length === 1", 60)
    assert desk.start.touches == (Head("decoder.attn", 2, 4),)
    page.close()
    assert not troubles
