"""The page in a browser: headless Chromium through playwright, where there are both."""

import asyncio
import contextlib
import re
import shutil
import socket
import threading

import pytest
import uvicorn
from page_world import FigureRuntime, World, play, usage

from edgekv.server.limits import Limits
from edgekv.server.sockets import uvicorn_settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: chromium)"),
]

LONG = "an app of a very long name " + 60 * "x"
WAIT_MS = 60_000


class Served(World):
    """A world that a browser can ask, too."""

    @contextlib.contextmanager
    def at_a_port(self):
        settings = uvicorn_settings(Limits())
        config = uvicorn.Config(self.guard, lifespan="off", log_level="critical", **settings)
        server = uvicorn.Server(config)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
            thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
            thread.start()
            try:
                yield self
            finally:
                server.should_exit = True
                thread.join()

    def invited(self):
        return self.origin + super().invited().removeprefix("http://127.0.0.1:8642")


@pytest.fixture
def served(tmp_path):
    runtime = FigureRuntime(mail=usage(1, 2, kv_bytes=700 << 20, num_open=3, num_stored=8))
    world = Served(tmp_path, runtime)
    for number in range(65):
        figures = {"num_prompt_tokens": 23_456, "num_cached_tokens": 20_000}
        play(world.metrics, "mail", ttft_ms=100.0 + number, tbt_p50_ms=20.0, **figures)
    for name in (LONG, "<script>document.title = 'taken'</script>"):
        play(world.metrics, name, ttft_ms=123_456.0, num_output_tokens=123_456)
    with world.at_a_port():
        yield world


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with contextlib.closing(driver.chromium.launch(**options)) as browser:
            yield browser


@contextlib.contextmanager
def looking(browser, **options):
    """A page, and what it complains of and asks for."""
    with contextlib.closing(browser.new_context(**options)) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        yield page


def contrast(page, selector):
    """Of an element's text to the page's ground, as WCAG says it."""
    colors = page.evaluate(
        "s => [document.querySelector(s), document.body].map((e, i) =>"
        " getComputedStyle(e)[i ? 'backgroundColor' : 'color'])",
        selector,
    )
    lights = []
    for color in colors:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_is_readable_and_goes_on(browser, served, tmp_path, scheme, width):
    viewport = {"width": width, "height": 800}
    with looking(browser, viewport=viewport, color_scheme=scheme) as page:
        page.goto(served.invited())
        assert re.fullmatch(f"{served.origin}/live/[0-9a-f]+", page.url), "no token is left in it"
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.title() == "edgekv · tiny"
        for selector in ("h1", ".quiet", "#as-of", "tbody th", "#recent .end"):
            assert contrast(page, selector) >= 4.5, selector
        is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") < "rgb(2"
        assert is_dark == (scheme == "dark")

        play(served.metrics, "new-here", ttft_ms=4321.0)
        page.get_by_role("rowheader", name="new-here").wait_for()
        assert page.get_by_role("table", name="Apps").count() == 1
        assert page.get_by_role("img", name="Times to the first token").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
        assert page.complaints == []
        assert all(url.startswith((served.origin, "data:")) for url in page.asked)


def test_it_says_so_when_nobody_answers(browser, served):
    with looking(browser) as page:
        page.goto(served.invited())
        page.route("**/figures", lambda route: route.abort())
        page.get_by_text("edgekv does not answer").wait_for()
        page.unroute("**/figures")
        page.locator("#alarm").wait_for(state="hidden")


def test_it_says_so_when_its_time_is_over(browser, served):
    with looking(browser) as page:
        page.goto(served.invited())
        page.context.clear_cookies()
        page.get_by_text("This address has ended").wait_for()


def test_what_does_not_change_stays_selected(browser, served):
    with looking(browser) as page:
        page.goto(served.invited())
        page.wait_for_timeout(2500)
        page.evaluate("window.row = document.querySelector('#apps tbody tr')")
        with page.expect_response("**/figures") as answered:
            pass
        answered.value.finished()
        page.wait_for_timeout(100)
        assert page.evaluate("document.contains(window.row)")


def test_another_port_of_this_host_gets_no_cookie(browser, served):
    """Cookies know no ports: without its path this one would be sent to any app's own page."""
    with socket.socket() as listener, looking(browser) as page:
        page.goto(served.invited())
        assert len(page.context.cookies(page.url)) == 1
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(WAIT_MS / 1e3)
        heads = []

        def answer():
            connection, _ = listener.accept()
            with connection:
                heads.append(connection.recv(65536).decode())
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/live/")
        thread.join()
        assert "cookie" not in heads[0].lower()
