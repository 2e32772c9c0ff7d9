"""The page: who sees it, and that it shows figures and nothing that was said."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from page_world import GIB, SAID, FigureRuntime, World, play, usage

from edgekv.errors import RuntimeClosed
from edgekv.server.daemon import Listening
from edgekv.server.page import NUM_APPS_SHOWN, bars, duration, size
from edgekv.server.visitors import PASS_MS

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"


@pytest.fixture
def world(tmp_path):
    runtime = FigureRuntime(
        mail=usage(1, 2, kv_bytes=700 << 20, num_open=3, num_stored=8), archive=usage(num_stored=21)
    )
    world = World(tmp_path, runtime)
    for ttft_ms in (120.0, 480.0, 240.0):
        figures = {"num_prompt_tokens": 2000, "num_cached_tokens": 1500, "num_output_tokens": 77}
        play(world.metrics, "mail", ttft_ms=ttft_ms, tbt_p50_ms=21.0, **figures)
    return world


class Seen(HTMLParser):
    """Tags of a page, its text, and where it leads."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


def seen(world, **options):
    entered = world.entered()
    answer = world.get(entered.path, headers=entered.headers)
    assert answer.status_code == 200
    return Seen(answer.text)


# --- getting in ---


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_without_a_pass_it_says_how_to_get_in_and_nothing_of_any_app(world, method):
    answer = world.ask(method, "/")
    assert answer.status_code == 200
    assert "mail" not in answer.text
    assert "tiny" not in answer.text, "nor of the model"
    assert method == "HEAD" or "edgekv ps --page" in answer.text


def test_only_who_is_at_the_socket_gets_an_address(world):
    assert world.ask("POST", "/edgekv/page").status_code == 401
    key = world.apps.add("mail")
    answer = world.ask("POST", "/edgekv/page", headers={"x-api-key": key})
    assert answer.status_code == 403
    assert "token" not in answer.text
    assert world.invited().startswith("http://127.0.0.1:8642/?token=")


def test_a_daemon_without_a_port_has_no_address(tmp_path):
    world = World(tmp_path, origin=None)
    assert world.ask("POST", "/edgekv/page", socket=True).status_code == 404


def test_an_address_becomes_a_cookie_and_leaves_the_address_bar(world):
    address = world.invited()
    assert world.ask("HEAD", address).status_code == 200, "who looks ahead does not use it up"
    answer = world.get(address)
    assert answer.status_code == 303
    assert re.fullmatch(r"/live/[0-9a-f]{32}", answer.headers["location"])
    value, *flags = answer.headers["set-cookie"].split("; ")
    path = answer.headers["location"]
    expected = {"HttpOnly", "SameSite=strict", f"Path={path}", f"Max-Age={PASS_MS / 1e3:.0f}"}
    assert set(flags) == expected, "of its own path, for other ports get the cookies of this host"
    assert len(value) > 40
    token = address.partition("token=")[2]
    assert token not in str(answer.headers)
    again = world.get(address)
    assert again.status_code == 403
    assert "set-cookie" not in again.headers
    assert "edgekv ps --page" in again.text


@pytest.mark.parametrize("more", ["", "/figures"])
def test_nobody_else_sees_it(world, more):
    entered, other = world.entered(), world.entered()
    key = world.apps.add("other")
    for headers in (
        {},
        {"cookie": "edgekv="},
        {"cookie": "edgekv=x"},
        other.headers,  # a pass of another place
        {"authorization": f"Bearer {key}"},
    ):
        answer = world.get(entered.path + more, headers=headers)
        assert answer.status_code == 403
        assert "mail" not in answer.text
    assert world.get(entered.path + more, headers=entered.headers).status_code == 200


def test_a_web_page_sees_nothing_through_the_browser_of_a_visitor(world):
    entered = world.entered()
    for bidding in ({"sec-fetch-site": "cross-site"}, {"origin": "https://example.com"}):
        answer = world.get(entered.path, headers=entered.headers | bidding)
        assert answer.status_code == 403
        assert "mail" not in answer.text


def test_where_browsers_find_it():
    here = Listening(uds=None, address=("::1", 8642), open_addresses={})
    assert here.origin == "http://[::1]:8642"
    assert replace(here, address=("127.0.0.1", 80)).origin == "http://127.0.0.1:80"
    assert replace(here, address=None).origin is None


# --- what it shows ---


def test_it_shows_figures(world):
    text = " ".join(seen(world).text.split())
    assert "1.0 GiB of 4.0 GiB" in text
    assert "5.0 GiB of 20.0 GiB" in text
    assert "3 open29 stored" in text
    assert "mail 3 3 open, 8 stored 700 MiB 75 % 240 ms p95 456 ms" in text
    assert "stop 2,000 1,500 77 480 ms 21 ms" in text
    assert "0 open, 21 stored" in text


def test_it_shows_what_runs(world):
    with world.metrics.request("mail", "0" * 32) as counting:
        text = " ".join(seen(world).text.split())
        assert "mail 1 now, 1 waits" in text
        assert "mail begun 0" in text
        counting.answers = True
        assert "mail answers 0" in " ".join(seen(world).text.split())


def test_nothing_that_was_said_is_in_it(world):
    entered = world.entered()
    for path in (entered.path, f"{entered.path}/figures"):
        assert SAID not in world.get(path, headers=entered.headers).text


def test_names_of_apps_are_text(world):
    play(world.metrics, HOSTILE, ttft_ms=10.0)
    entered = world.entered()
    page = Seen(world.get(entered.path, headers=entered.headers).text)
    assert page.tags.count("script") == 1
    assert HOSTILE in page.text
    parts = world.get(f"{entered.path}/figures", headers=entered.headers).json()["parts"]
    for name in ("apps", "recent"):
        part = Seen(parts[name])
        assert "script" not in part.tags
        assert HOSTILE in part.text


def test_it_needs_nothing_but_itself_and_lets_nothing_else_run(world):
    entered = world.entered()
    answer = world.get(entered.path, headers=entered.headers)
    policy = answer.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    page = Seen(answer.text)
    nonces = [one for one in page.attributes if one[1] == "nonce"]
    assert nonces == [("style", "nonce", nonce), ("script", "nonce", nonce)]
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("style", "src", "action"), tag
        assert name != "href" or value.startswith("data:"), tag
    assert nonce not in world.get(entered.path, headers=entered.headers).text, "new each time"


def test_it_can_be_heard(world):
    page = seen(world)
    assert [tag for tag in page.tags if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h2"]
    assert page.tags.count("caption") == page.tags.count("table") == 2
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == page.tags.count("svg")
    assert "Times to the first token, the last 3: 120 ms to 480 ms, the newest 240 ms" in labels
    assert ("html", "lang", "en") in page.attributes


def test_its_parts_are_those_of_the_page(world):
    entered = world.entered()
    page = world.get(entered.path, headers=entered.headers).text
    figures = world.get(f"{entered.path}/figures", headers=entered.headers).json()
    assert list(figures["parts"]) == ["now", "apps", "recent"]
    for name, html in figures["parts"].items():
        assert f'<section id="{name}"' in page
        assert html in page
    assert re.fullmatch(r"as of \d\d:\d\d:\d\d, up .*", figures["as_of"])


def test_it_is_there_while_no_model_is(world):
    world.model.loaded.error = RuntimeClosed("just now")
    text = seen(world).text
    assert "GiB" not in text
    assert "the engine does not answer" in text
    world.model._runtime = None
    page = seen(world)
    assert "The model is not loaded" in page.text
    assert "mail" in page.text, "what it counted stays"


def test_it_is_there_when_nobody_has_asked(tmp_path):
    text = seen(World(tmp_path, FigureRuntime())).text
    assert "No app has asked anything yet" in text
    assert "None yet." in text


def test_of_many_apps_some_are_shown(world):
    for number in range(NUM_APPS_SHOWN):
        play(world.metrics, f"app-{number}")
    page = seen(world)
    assert page.tags.count("tr") < 2 * NUM_APPS_SHOWN
    assert "and 2 more" in page.text


# --- how figures are said ---


def test_bars_are_as_high_as_their_values():
    assert bars([1.0, 2.0]) == "M116 24v-12.0h1.4v12.0zM118 24v-24.0h1.4v24.0z"
    assert bars([0.0, 1e9]).startswith("M116 24v-1.0"), "what is there can be seen"
    assert bars([]) == ""


def test_times_and_sizes():
    times = (0.04, 12.3, 999.4, 999.6, 9940, 61_000, 600_000, 7.2e6, 4e8)
    said = ["0.0 ms", "12 ms", "999 ms", "1.0 s", "9.9 s", "61 s", "10 min", "2.0 h", "5 d"]
    assert [duration(ms) for ms in times] == said
    assert duration(None) == duration(0.0) == "–"
    assert [size(n) for n in (0, 999, 5 << 20, GIB)] == ["0 B", "999 B", "5 MiB", "1.0 GiB"]
