"""Many clients of several apps, half of whom vanish: nothing is left, nobody is disturbed."""

import gc
import json
import os
import random
import threading
import time

import httpx2
import pytest
from tiny_runtime import eventually

APPS = ("mail", "notes", "code", "music")


def body(number, *, stream=True):
    text = f"{number}: " + "some words to read " * (number % 7)
    return {
        "model": "any",
        "messages": [{"role": "user", "content": text}],
        "temperature": 1.0,
        "seed": number,
        "max_tokens": 8 + number % 40,
        "stream": stream,
    }


class Crowd:
    """Clients that ask one thing after another until the time is over."""

    def __init__(self, daemon, seconds):
        self.daemon, self.end = daemon, time.monotonic() + seconds
        self.answers: dict[int, str] = {}
        self.failures: list[object] = []

    def run(self, num_clients):
        threads = [threading.Thread(target=self._client, args=[i]) for i in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.end - time.monotonic()) + 120)

    def _client(self, index):
        chance = random.Random(index)
        headers = {"x-edgekv-app": APPS[index % len(APPS)]}
        transport = httpx2.HTTPTransport(uds=str(self.daemon.uds))
        with httpx2.Client(
            transport=transport, base_url="http://localhost", headers=headers, timeout=60
        ) as client:
            while time.monotonic() < self.end:
                number = chance.randrange(10_000)
                try:
                    self._ask(client, number, leaves_at=chance.choice((None, None, 0, 1, 5)))
                except Exception as error:  # noqa: BLE001 - the test looks at them
                    self.failures.append(error)

    def _ask(self, client, number, leaves_at):
        pieces, is_whole = [], False
        with client.stream("POST", "/v1/chat/completions", json=body(number)) as response:
            assert response.status_code == 200, response.read()
            for count, line in enumerate(response.iter_lines()):
                if leaves_at is not None and count > leaves_at:
                    return
                is_whole |= line == "data: [DONE]"
                pieces.append(line)
        assert is_whole
        self.answers[number] = text_of(pieces)


def text_of(lines):
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


def resources(daemon):
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208


@pytest.mark.parametrize(
    ("num_clients", "seconds", "num_asked_again"),
    [
        pytest.param(8, 6, 20, marks=pytest.mark.faults),
        pytest.param(16, 120, 100_000, marks=pytest.mark.long),
    ],
)
def test_a_crowd_leaves_nothing_behind(daemon, num_clients, seconds, num_asked_again):
    Crowd(daemon, 0.5).run(num_clients)  # what is made once is made
    eventually(lambda: not daemon.server.server_state.connections, timeout_s=10)
    before = resources(daemon)
    crowd = Crowd(daemon, seconds)
    crowd.run(num_clients)
    assert not crowd.failures
    assert len(crowd.answers) > num_clients
    eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)
    eventually(lambda: not daemon.server.server_state.connections, timeout_s=30)
    daemon.runtime.check_integrity()
    alone = {}
    with httpx2.Client(
        transport=httpx2.HTTPTransport(uds=str(daemon.uds)),
        base_url="http://localhost",
        headers={"x-edgekv-app": "alone"},
        timeout=60,
    ) as client:
        for number in sorted(crowd.answers)[:num_asked_again]:
            reply = client.post("/v1/chat/completions", json=body(number, stream=False)).json()
            alone[number] = reply["choices"][0]["message"]["content"]
    assert {number: crowd.answers[number] for number in alone} == alone
    eventually(lambda: resources(daemon)[0] <= before[0] + 2, timeout_s=20)
    pool = min(32, (os.cpu_count() or 1) + 4)  # the loop's own threads, which stay
    eventually(lambda: resources(daemon)[1] <= before[1] + pool, timeout_s=20)
    for app in daemon.runtime.apps():
        app.close()
    eventually(lambda: daemon.runtime.pool_snapshot().used_bytes == 0, timeout_s=60)
    daemon.runtime.check_integrity()


def test_who_leaves_in_a_long_prefill_stops_it(daemon):
    long = {"role": "user", "content": "x " * 400}
    with httpx2.Client(
        transport=httpx2.HTTPTransport(uds=str(daemon.uds)), base_url="http://localhost"
    ) as client:
        request = {"model": "any", "messages": [long], "stream": True, "max_tokens": 500}
        with client.stream("POST", "/v1/chat/completions", json=request) as response:
            next(response.iter_lines())
    eventually(lambda: not daemon.runtime._engine.inbox.num_unfinished, timeout_s=30)
    daemon.runtime.check_integrity()
