"""Who gets in by which door, and the limits that are values."""

import pytest
from starlette.datastructures import Headers

from edgekv.server.access import Door, Doors, check_no_web_page, identify
from edgekv.server.fields import Fault
from edgekv.server.keys import AppsFile
from edgekv.server.limits import Rates

PORT, SOCKET, OPEN = Door(), Door(is_socket=True), Door(app="xcode")


@pytest.fixture
def apps(tmp_path):
    return AppsFile(tmp_path / "apps.json")


def headers(*pairs):
    return Headers(raw=[(name.encode(), value.encode()) for name, value in pairs])


def bearer(key):
    return ("authorization", f"Bearer {key}")


def refused(kind, door, sent, apps):
    with pytest.raises(Fault) as raised:
        identify(door, sent, apps)
    assert raised.value.kind == kind
    return raised.value


# --- doors ---


def test_the_door_is_where_the_request_came_in():
    doors = Doors(socket_path="/run/edgekv.sock", open_ports={9000: "xcode"})
    assert doors.of({"server": ("127.0.0.1", 8642)}) == PORT
    assert doors.of({"server": ("127.0.0.1", 9000)}) == OPEN
    assert doors.of({"server": ("/run/edgekv.sock", None)}) == SOCKET
    for unknown in (None, ("localhost", None), ("", None), ("/run/other.sock", None)):
        assert doors.of({"server": unknown}) == PORT
        assert Doors().of({"server": unknown}) == PORT
    assert doors.of({}) == PORT
    assert doors.of({"server": ("/run/edgekv.sock", 8642)}) == PORT


@pytest.mark.parametrize("door", [PORT, SOCKET])
def test_a_key_says_who_it_is(apps, door):
    key, other = apps.add("mail"), apps.add("notes", weight=3.0)
    assert identify(door, headers(bearer(key)), apps).app == "mail"
    assert identify(door, headers(("x-api-key", other)), apps).terms["weight"] == 3.0
    assert identify(door, headers(("authorization", f"bearer  {key} ")), apps).app == "mail"
    both = headers(bearer("dummy"), ("x-api-key", key))
    assert identify(door, both, apps).app == "mail"
    named = headers(bearer(key), ("x-edgekv-app", "notes"))
    assert identify(door, named, apps).app == "mail", "a name is nothing beside a key"


def test_at_the_port_a_key_is_needed(apps):
    key = apps.add("mail")
    assert "missing" in refused("unauthorized", PORT, headers(), apps).message
    assert (
        "missing" in refused("unauthorized", PORT, headers(("x-edgekv-app", "mail")), apps).message
    )
    for wrong in ("nothing", key[:-1], key + " x", "ekv_"):
        fault = refused("unauthorized", PORT, headers(bearer(wrong)), apps)
        assert "not known" in fault.message
        assert wrong not in fault.message
    refused("unauthorized", PORT, headers(("authorization", f"Basic {key}")), apps)
    refused("unauthorized", PORT, headers(("authorization", key)), apps)
    apps.revoke("mail")
    refused("unauthorized", PORT, headers(bearer(key)), apps)


def test_at_the_socket_a_name_is_enough(apps):
    apps.add("mail", weight=2.0)
    assert identify(SOCKET, headers(), apps).app == "default"
    assert identify(SOCKET, headers(), apps).terms == {}
    assert identify(SOCKET, headers(("x-edgekv-app", "mail")), apps).terms["weight"] == 2.0
    spelled = headers(("x-edgekv-app", "Grüße"))
    assert identify(SOCKET, spelled, apps).app == "Grüße"
    assert identify(SOCKET, headers(bearer("sk-dummy")), apps).app == "default"


def test_at_the_socket_a_key_of_ours_must_be_right(apps):
    key = apps.add("mail")
    apps.revoke("mail")
    sent = headers(bearer(key), ("x-edgekv-app", "mail"))
    refused("unauthorized", SOCKET, sent, apps)


def test_an_app_of_keys_alone_is_nobody_without_it(apps):
    key = apps.add("mail", key_only=True)
    apps.add("xcode", key_only=True)
    refused("unauthorized", SOCKET, headers(("x-edgekv-app", "mail")), apps)
    refused("unauthorized", OPEN, headers(), apps)
    assert identify(SOCKET, headers(bearer(key)), apps).app == "mail"


def test_an_open_port_is_of_one_app_whatever_is_sent(apps):
    key = apps.add("mail")
    sent = headers(bearer(key), ("x-edgekv-app", "notes"))
    assert identify(OPEN, sent, apps).app == "xcode"
    assert identify(OPEN, headers(), apps).app == "xcode"


@pytest.mark.parametrize("name", ["", "a\tb", "a" * 257, "\x1b[31m"])
def test_a_name_that_cannot_be(apps, name):
    fault = refused("invalid", SOCKET, headers(("x-edgekv-app", name)), apps)
    assert fault.param == "x-edgekv-app"
    assert "x-edgekv-app" in fault.message, "Anthropic's and Ollama's errors have no param"
    raw = Headers(raw=[(b"x-edgekv-app", b"\xff")])
    refused("invalid", SOCKET, raw, apps)


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-edgekv-app"])
def test_two_of_one_header_are_nobody(apps, name):
    apps.add("mail")
    fault = refused("invalid", SOCKET, headers((name, "mail"), (name, "notes")), apps)
    assert fault.param == name


# --- web pages ---

GOOD = [
    {"host": "localhost"},
    {"host": "localhost:8642"},
    {"host": "LocalHost:8642"},
    {"host": "127.0.0.1:1"},
    {"host": "[::1]:8642"},
    {"host": "localhost:8642", "sec-fetch-mode": "cors"},
    {"host": "localhost:8642", "sec-fetch-site": "same-origin", "origin": "http://localhost:8642"},
    {"host": "localhost:8642", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
    {"host": "127.0.0.1:8642", "origin": "http://localhost:8642"},
    {"host": "localhost", "origin": "http://localhost"},
    {"host": "localhost:80", "origin": "http://[::1]"},
]
HOSTS = ["", "evil.example", "localhost.evil.example", "evil.example:8642", "127.0.0.1.nip.io"]
HOSTS += ["localhost@evil.example", "localhost:", "localhost:8642x", "localhost:123456", "0.0.0.0"]
HOSTS += ["localhost, evil.example", "::1", "[::1", "localhost\n", "ｌocalhost", "10.0.0.1:8642"]
ORIGINS = ["null", "", "http://evil.example", "https://localhost:8642", "http://localhost:3000"]
ORIGINS += ["http://localhost", "http://localhost:8642.evil.example", "http://localhost:8642/"]
ORIGINS += ["app://obsidian.md", "http://user@localhost:8642", "HTTP//localhost:8642"]


@pytest.mark.parametrize("sent", GOOD, ids=str)
@pytest.mark.parametrize("door", [PORT, SOCKET, OPEN])
def test_what_no_page_sends(door, sent):
    check_no_web_page(door, headers(*sent.items()))


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_is_not_here(host):
    for door in (PORT, OPEN):
        with pytest.raises(Fault) as raised:
            check_no_web_page(door, headers(("host", host)))
        assert raised.value.status == 403
    check_no_web_page(SOCKET, headers(("host", host)))


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("door", [PORT, SOCKET, OPEN])
def test_a_page_that_is_not_ours(door, origin):
    with pytest.raises(Fault) as raised:
        check_no_web_page(door, headers(("host", "localhost:8642"), ("origin", origin)))
    assert raised.value.status == 403


@pytest.mark.parametrize("door", [PORT, SOCKET, OPEN])
def test_what_a_page_elsewhere_makes_a_browser_fetch(door):
    sent = headers(("host", "localhost:8642"), ("sec-fetch-site", "cross-site"))
    with pytest.raises(Fault) as raised:
        check_no_web_page(door, sent)
    assert raised.value.status == 403


def test_without_a_host_nobody_gets_in_at_a_port():
    with pytest.raises(Fault):
        check_no_web_page(PORT, headers())
    check_no_web_page(SOCKET, headers())


# --- requests a minute ---


class Clock:
    ms = 5_000.0

    def now_ms(self):
        return self.ms


def test_so_many_a_minute_and_no_more():
    clock = Clock()
    rates = Rates(clock)
    assert [rates.take("mail", 3) for _ in range(4)] == [0, 0, 0, 20]
    assert rates.take("notes", 1) == 0, "each app has its own"
    clock.ms += 19_000
    assert rates.take("mail", 3) == 1
    clock.ms += 1_000
    assert [rates.take("mail", 3) for _ in range(2)] == [0, 20]
    clock.ms += 3_600_000
    assert [rates.take("mail", 3) for _ in range(4)] == [0, 0, 0, 20], "nobody saves them up"


def test_who_comes_when_told_to_gets_in():
    clock = Clock()
    rates = Rates(clock)
    for rate in range(1, 400, 7):
        app = f"app-{rate}"
        for _ in range(rate):
            assert rates.take(app, rate) == 0
        clock.ms += 1e3 * rates.take(app, rate)
        assert rates.take(app, rate) == 0, rate


def test_a_rate_that_was_lowered_holds_at_once():
    clock = Clock()
    rates = Rates(clock)
    assert rates.take("mail", 100) == 0
    assert [rates.take("mail", 2) for _ in range(2)] == [0, 1]
    clock.ms += 1_000
    assert [rates.take("mail", 2) for _ in range(2)] == [0, 30]
