"""What is counted, and what of it who sees."""

import threading

import pytest
from page_world import FigureRuntime, World, finished, play, usage
from prometheus_client.parser import text_string_to_metric_families

from edgekv.chat.events import Begun
from edgekv.errors import EngineFailed, QueueFull, RuntimeClosed
from edgekv.server.faults import fault_of
from edgekv.server.fields import Fault
from edgekv.server.live import APPS_MAX, OTHERS
from edgekv.server.metrics import RECENT_MAX, Metrics


@pytest.fixture
def metrics():
    return Metrics()


def samples(metrics, runtime=None, app=None):
    """Values by name and label values."""
    text = metrics.text(runtime, app).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(status, name):
    [app] = [app for app in status["apps"] if app["name"] == name]
    return app


def test_what_a_request_took_is_counted_once(metrics):
    play(metrics, "mail", ttft_ms=150.0, tbt_p50_ms=30.0, queue_ms=20.0, num_prompt_tokens=100)
    tokens = {"num_predicted_tokens": 60, "num_repaired_tokens": 50, "num_confirmed_tokens": 7}
    play(metrics, "mail", num_retracted_tokens=2, prefill_mode="predict", **tokens)
    found = samples(metrics)
    assert found["edgekv_requests_total", "mail", "stop"] == 2
    assert found["edgekv_ttft_seconds_bucket", "mail", "0.2"] == 1
    assert found["edgekv_ttft_seconds_bucket", "mail", "0.1"] == 0
    assert found["edgekv_tokens_total", "mail", "prompt"] == 100
    kinds = ("predicted", "repaired", "confirmed", "retracted")
    assert [found["edgekv_tokens_total", "mail", kind] for kind in kinds] == [60, 50, 7, 2]
    assert found["edgekv_prefills_total", "mail", "exact"] == 1
    assert found["edgekv_prefills_total", "mail", "predict"] == 1
    app = of(metrics.status(None, None), "mail")
    assert app["ended"] == {"stop": 2}
    assert app["tokens"]["predicted"] == 60


def refused(error):
    raise fault_of(error) from error


def vanished():
    raise Fault("unavailable", "the client went away")


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (vanished, "cancelled"),
        (lambda: refused(QueueFull("too many")), "QueueFull"),
        (lambda: None, "cancelled"),
    ],
)
def test_an_end_without_an_answer_is_counted_as_what_it_was(metrics, ends, reason):
    try:
        with metrics.request("mail", "0" * 32) as counting:
            counting.saw(Begun(num_prompt=12))
            assert samples(metrics)["edgekv_requests_running", "mail"] == 1
            ends()
    except Fault:
        pass
    found = samples(metrics)
    assert found["edgekv_requests_total", "mail", reason] == 1
    assert found["edgekv_requests_running", "mail"] == 0
    status = metrics.status(None, None)
    assert status["recent"][0]["reason"] == reason
    assert status["recent"][0]["num_prompt"] == 12
    assert status["running"] == []


def test_each_app_has_a_series_of_its_last(metrics):
    for number in range(RECENT_MAX + 5):
        play(metrics, "mail", ttft_ms=1.0 + number, tbt_p50_ms=0.5)
        play(metrics, "crowd")
        play(metrics, "crowd")
    mail = of(metrics.status(None, None), "mail")
    assert mail["ttfts_ms"] == [6.0 + number for number in range(RECENT_MAX)]
    assert mail["tbts_ms"] == RECENT_MAX * [0.5]
    assert mail["ended"] == {"stop": RECENT_MAX + 5}


def test_the_engines_figures_are_by_app_and_class(metrics):
    busy = usage(2, 1, kv_bytes=4096, num_open=3, num_stored=5)
    busy.num_waiting["background"] = 4
    runtime = FigureRuntime(mail=busy, gone=usage(num_stored=1))
    runtime.service_ms = {"mail": 1500.0}
    found = samples(metrics, runtime)
    assert found["edgekv_queue_length", "mail", "interactive"] == 2
    assert found["edgekv_queue_length", "mail", "background"] == 4
    assert found["edgekv_sessions", "mail", "open"] == 3
    assert found["edgekv_sessions", "gone", "stored"] == 1
    assert found["edgekv_app_kv_bytes", "mail"] == 4096
    assert found["edgekv_service_seconds_total", "mail"] == 1.5
    assert found["edgekv_pool_bytes", "used"] == 1 << 30
    assert found["edgekv_swap", "num_swap_outs"] == 3
    mail = of(metrics.status(runtime, None), "mail")
    assert mail["num_waiting"] == {"interactive": 2, "background": 4}
    assert (mail["num_open_sessions"], mail["num_stored_sessions"]) == (3, 5)
    del runtime.by_app["mail"]
    assert ("edgekv_sessions", "mail", "open") not in samples(metrics, runtime), "it has none"


@pytest.mark.parametrize("error", [RuntimeClosed("now"), EngineFailed("now")])
def test_a_runtime_that_has_just_ended_has_no_figures(metrics, error):
    play(metrics, "mail")
    runtime = FigureRuntime()
    runtime.error = error
    assert ("edgekv_pool_bytes", "used") not in samples(metrics, runtime)
    assert "pool" not in metrics.status(runtime, None)
    assert of(metrics.status(runtime, None), "mail")


def test_names_without_end_take_bounded_room(metrics):
    with metrics.request("stays", "0" * 32):
        play(metrics, "first", ttft_ms=1.0)
        for number in range(APPS_MAX + 20):
            play(metrics, f"app-{number}", ttft_ms=1.0, tbt_p50_ms=1.0)
        found = samples(metrics)
        assert found["edgekv_requests_running", "stays"] == 1
        names = {key[1] for key in found if key[0] == "edgekv_requests_total"}
        assert len(names) == APPS_MAX - 1
        assert f"app-{APPS_MAX + 19}" in names
        assert not [key for key in found if "first" in key], "of no kind"
        assert len(metrics.status(None, None)["apps"]) == APPS_MAX
    play(metrics, "first")
    assert samples(metrics)["edgekv_requests_total", "first", "stop"] == 1


def test_of_many_apps_in_the_store_the_rest_is_a_sum(metrics):
    by_app = {f"app-{n}": usage(num_stored=2) for n in range(APPS_MAX + 10)}
    found = samples(metrics, FigureRuntime(**by_app, busy=usage(1)))
    assert found["edgekv_sessions", OTHERS, "stored"] == 22
    assert found["edgekv_queue_length", "busy", "interactive"] == 1
    assert len([key for key in found if key[0] == "edgekv_app_kv_bytes"]) == APPS_MAX + 1


def test_an_app_with_a_key_sees_itself_alone(tmp_path):
    runtime = FigureRuntime(mail=usage(1, num_open=2), other=usage(num_open=1))
    world = World(tmp_path, runtime)
    for app in ("mail", "other"):
        play(world.metrics, app, ttft_ms=5.0)
    with world.metrics.request("mail", "0" * 32):
        metrics = world.with_key("other", "/metrics").text
        status = world.with_key("other", "/edgekv/status").json()
        assert "mail" not in metrics
        assert "pool" not in metrics
        assert 'edgekv_sessions{app="other",state="open"} 1.0' in metrics
        assert [app["name"] for app in status["apps"]] == ["other"]
        assert {one["app"] for one in status["recent"]} == {"other"}
        assert status["running"] == []
        assert not {"pool", "disk", "swap"} & status.keys()
    for path in ("/metrics", "/edgekv/status"):
        text = world.get(path, socket=True).text
        assert "mail" in text
        assert "pool" in text


@pytest.mark.slow
def test_figures_are_right_while_requests_come_and_go(metrics):
    """The loop counts; others ask meanwhile, from any thread."""
    over, failures = threading.Event(), []

    def look():
        try:
            while not over.is_set():
                status = metrics.status(None, None)
                assert all(app["num_running"] in (0, 1) for app in status["apps"])
                lines = metrics.text(None, "app-1").decode().splitlines()
                assert all(line[0] == "#" or 'app="app-1"' in line for line in lines)
        except Exception as error:  # noqa: BLE001 - the test fails with it
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(3 * APPS_MAX):
        with metrics.request(f"app-{number % (2 * APPS_MAX)}", "0" * 32) as counting:
            counting.saw(finished(ttft_ms=1.0))
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    found = samples(metrics)
    assert sum(v for key, v in found.items() if key[0] == "edgekv_requests_total") >= APPS_MAX
