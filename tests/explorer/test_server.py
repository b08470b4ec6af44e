"""The server: nothing without the token, everything bounded, tabs apart."""

from __future__ import annotations

import gc
import http.client
import json
import socket
from urllib.parse import urlsplit

import psutil
import pytest

from audio_lens import InputError
from audio_lens.errors import ExtraError
from audio_lens.explorer import server
from audio_lens.explorer.desk import Desk
from audio_lens.explorer.server import Explorer
from audio_lens.explorer.session import Session
from audio_lens.explorer.widget import started
from audio_lens.models.embedded import default_pair

pytestmark = pytest.mark.unchecked
PAIR = default_pair()
HEAD = {"kind": "head", "site": "decoder.attn", "layer": 2, "head": 4, "g": 0}


@pytest.fixture(scope="module")
def explorer(embedded):
    made = Explorer(started(embedded))
    with made.running():
        yield made


def send(explorer, path, body=None, method=None, **headers):
    """Status, headers and content of an answer."""
    link = http.client.HTTPConnection("127.0.0.1", explorer.port, timeout=60)
    try:
        link.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        link.close()


def ask(explorer, **message):
    """The events that answer a message."""
    path = f"{urlsplit(explorer.address).path}do"
    _, _, content = send(explorer, path, json.dumps(message))
    return [json.loads(line) for line in content.splitlines()]


def opened(explorer):
    return ask(explorer, do="open")[0]["session"]


def state(events):
    return next(event for event in events if event["event"] == "state")


# -------------------------------------------------------------------------------- who is let in


def test_the_page_loads_nothing_and_keeps_its_address_to_itself(explorer):
    status, headers, page = send(explorer, urlsplit(explorer.address).path)
    assert status == 200 and b"http://" not in page and b"https://" not in page
    assert b"src=" not in page and explorer.token.encode() not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/favicon.ico",
        "/wrong/",
        "/wrong/do",
        "//",
        "/{token}x/",
        "/x{token}/",
        "/do",
        "/%2e%2e/",
    ],
)
def test_a_wrong_token_gets_nothing(explorer, path):
    path = path.format(token=explorer.token)
    assert send(explorer, path)[::2] == (404, b"")
    assert send(explorer, path, b"{}")[::2] == (404, b"")


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "evil.example:{port}"}, {"Origin": "http://evil.example"}],
)
def test_other_names_of_this_machine_and_other_pages_get_nothing(explorer, headers):
    path = urlsplit(explorer.address).path
    given = {name: value.format(port=explorer.port) for name, value in headers.items()}
    assert send(explorer, path, **given)[::2] == (404, b"")
    assert send(explorer, f"{path}do", b'{"do": "open"}', **given)[::2] == (404, b"")


def test_no_file_is_served(explorer):
    base = urlsplit(explorer.address).path
    for path in ("../setup.cfg", "..%2f..%2fsetup.cfg", "etc/passwd", "explorer.js", "do"):
        status, _, content = send(explorer, base + path)
        assert status in (404, 405) and b"audio_lens" not in content


def test_it_listens_to_this_machine_alone(explorer):
    own = psutil.Process().net_connections("tcp4")
    (listening,) = [c for c in own if c.status == "LISTEN" and c.laddr.port == explorer.port]
    assert listening.laddr.ip == "127.0.0.1"


# -------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    "body, message",
    [
        (b"no json", "JSON"),
        (b"[]", "says what to do"),
        (b'{"do": "_seat"}', "says what to do"),
        (b'{"do": "touch", "session": "none"}', "put away"),
        (b'{"do": "touch", "session": 3}', "named by text"),
    ],
)
def test_messages_that_are_none_are_refused(explorer, body, message):
    _, _, content = send(explorer, f"{urlsplit(explorer.address).path}do", body)
    event = json.loads(content.splitlines()[0])
    assert event["event"] == "error" and message in event["message"]


def test_bad_touches_are_told_and_change_nothing(explorer):
    tab = opened(explorer)
    for touch in (None, {}, HEAD | {"head": 99}, HEAD | {"g": None}, HEAD | {"layer": True}):
        (event,) = ask(explorer, do="touch", session=tab, touch=touch)
        assert event["event"] == "error"
    assert state(ask(explorer, do="undo", session=tab))["touches"] == []


def test_uploads_are_bounded(explorer, monkeypatch):
    tab, base = opened(explorer), urlsplit(explorer.address).path
    clip = f"{base}clip?session={tab}&which=clip&name="
    content = PAIR.corrupted.read_bytes()
    _, _, answer = send(explorer, f"{clip}../../nine.wav", content)
    events = [json.loads(line) for line in answer.splitlines()]
    assert events[0]["clip"] == "nine.wav"
    assert state(events)["answers"][0]["word"] == "␣nine"
    _, _, answer = send(explorer, f"{clip}bad.wav", b"no sound")
    assert "cannot be read as audio" in json.loads(answer)["message"]
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    monkeypatch.setattr(server, "MOST_BODY", 1000)
    assert send(explorer, f"{clip}long.wav", content)[0] == 413
    assert send(explorer, f"{base}do", b"x" * 1001)[0] == 413


def test_tabs_are_apart(explorer):
    one, two = opened(explorer), opened(explorer)
    touched = state(ask(explorer, do="touch", session=one, touch=HEAD))
    bare = state(ask(explorer, do="redo", session=two))
    assert len(touched["touches"]) == 1 and bare["touches"] == []
    assert [a["now"] for a in bare["answers"]] == [a["before"] for a in bare["answers"]]


def test_a_map_comes_in_pictures(explorer):
    tab = opened(explorer)
    token = state(ask(explorer, do="undo", session=tab))["answers"][0]["token"]
    events = ask(explorer, do="map", session=tab, part="decoder", by="other", token=token)
    assert [e["event"] for e in events[-2:]] == ["map", "map_done"] and len(events) > 5
    assert len(events[-2]["spans"]) > len(events[0]["spans"])


def test_the_tab_that_was_used_least_goes(embedded):
    desk = Desk(Session(embedded, PAIR.clean, PAIR.question), most_sessions=2)
    names = [next(desk._do_open({}))["session"] for _ in range(3)]
    assert list(desk._seats) == names[1:]


def test_a_hundred_touches_leave_nothing(explorer):
    tab, process = opened(explorer), psutil.Process()

    def touch(count):
        for g in range(count):
            ask(explorer, do="touch", session=tab, touch=HEAD | {"g": g / 100})
            ask(explorer, do="undo", session=tab)
        gc.collect()
        return len(gc.get_objects()), process.memory_info().rss

    objects, size = touch(10)
    more, larger = touch(100)
    assert more - objects < 500
    assert larger - size < 30e6


# -------------------------------------------------------------------------------- starting


def test_a_port_that_is_taken_is_named(embedded):
    start = Session(embedded, PAIR.clean, PAIR.question)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} cannot be used"):
            Explorer(start, port)
    with pytest.raises(InputError, match="port"):
        Explorer(start, 70_000)


def test_a_missing_extra_is_named(embedded, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"pip install 'audio_lens\[explore\]'"):
        Explorer(Session(embedded, PAIR.clean, PAIR.question))
