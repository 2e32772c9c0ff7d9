"""The native protocol: a program does the same with a runtime and with a daemon.

The tests that take `app` run with both.
"""

import asyncio
import gc
import json
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from running_daemon import MODEL
from tiny_runtime import eventually, sampling

import edgekv
from edgekv.chat.events import Begun, Finished, TextDelta
from edgekv.chat.values import ChatMessage, Completion
from edgekv.engine.outbox import Delta
from edgekv.errors import (
    ConfigError,
    DaemonGone,
    PromptEmpty,
    PromptTooLong,
    RequestTimeout,
    RuntimeClosed,
    ServeError,
    SessionBusy,
    TooManySessions,
)
from edgekv.server import held, native
from edgekv.server.metrics import Counting

LONG = sampling(1500)
ASKED = Completion(
    messages=(
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="hello"),
    ),
    sampling=sampling(8),
)


@pytest.fixture
def connected(daemon):
    with edgekv.connect(daemon.uds) as connection:
        yield connection


@pytest.fixture(params=["local", "connected"])
def opened(request, idle_daemon):
    """A runtime, or a connection to a daemon that has it."""
    if request.param == "connected":
        idle_daemon.start()
        with edgekv.connect(idle_daemon.uds) as connection:
            yield connection
    else:
        with idle_daemon.make() as runtime:
            yield runtime


@pytest.fixture
def app(opened):
    return opened.app("mail")


# --- the same ---


def test_a_conversation(app):
    assert isinstance(app, edgekv.App)
    session = app.session("inbox", system="Be brief.")
    assert isinstance(session, edgekv.Session)
    reply = session.respond("hello", sampling=sampling(8), timeout_s=60)
    assert type(reply) is edgekv.Reply
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 8)
    assert reply.stats.num_output_tokens == 8
    assert reply.stats.sampling.max_tokens == 8
    assert session.last_reply == reply
    again = session.respond("more", sampling=sampling(4))
    assert again.stats.num_cached_tokens >= reply.stats.num_prompt_tokens
    assert session.system == "Be brief."
    assert session.messages == [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="hello"),
        ChatMessage(role="assistant", content=reply.text),
        ChatMessage(role="user", content="more"),
        ChatMessage(role="assistant", content=again.text),
    ]
    assert (session.kept, session.warning, session.busy) == (True, "", False)
    session.clear(system="Be long.")
    assert session.messages == [ChatMessage(role="system", content="Be long.")]
    assert session.last_reply is None


def test_deltas_are_the_answer(app):
    with app.session() as session, session.stream("hello", sampling=sampling(9, logprobs=1)) as s:
        deltas = list(s)
    assert all(type(delta) is Delta for delta in deltas)
    assert "".join(delta.text for delta in deltas) == s.text == s.reply.text
    assert len(s.reply.logprobs) == len(s.reply.token_ids) == 9
    assert len(s.reply.logprobs[0].top) == 1
    num_prompt = s.reply.stats.num_prompt_tokens
    assert s.prefill_progress[1] == num_prompt


def test_the_same_seed_says_the_same_here_and_there(idle_daemon):
    params = sampling(12, temperature=1.0, seed=7)
    with idle_daemon.make() as runtime:
        ours = runtime.app("mail").session().respond("hello", sampling=params)
    idle_daemon.start()
    with edgekv.connect(idle_daemon.uds) as connection:
        theirs = connection.app("mail").session().respond("hello", sampling=params)
    assert theirs.token_ids == ours.token_ids
    assert (theirs.text, theirs.stats.sampling) == (ours.text, ours.stats.sampling)


def test_raw_text_leaves_the_conversation_alone(app):
    session = app.session()
    session.respond("hello", sampling=sampling(2), raw=True)
    assert session.messages == []


def test_a_stop_string_comes_back(app):
    text = app.session().respond("hello", sampling=sampling(20)).text
    stop = text[5:7]
    reply = app.session().respond("hello", sampling=sampling(20, stop=(stop,)))
    assert (reply.finish_reason, reply.stop) == ("stop", stop)


def test_asyncio(app):
    async def talk():
        session = app.session("inbox")
        whole = await session.arespond("hello", sampling=sampling(5), timeout_s=60)
        async with await session.astream("more", sampling=sampling(5)) as stream:
            deltas = [delta async for delta in stream]
        assert "".join(d.text for d in deltas) == stream.reply.text
        await session.aprewarm("and")
        async with await app.astream(ASKED) as events:
            kinds = [type(event) async for event in events]
        assert (kinds[0], kinds[-1]) == (Begun, Finished)
        return whole

    assert len(asyncio.run(talk()).token_ids) == 5
    assert len(app.session("inbox").messages) == 4


def test_leaving_a_stream_takes_the_request_back(app):
    session = app.session("inbox")
    with session.stream("hello", sampling=LONG) as stream:
        next(stream)
        assert session.busy
    assert stream.reply.finish_reason == "cancelled"
    assert len(stream.reply.token_ids) < 1500
    assert stream.text == stream.reply.text
    assert session.messages[-1].content == stream.reply.text


def test_cancelling_a_task_takes_the_request_back(app):
    session = app.session("inbox")

    async def interrupted():
        task = asyncio.create_task(session.arespond("hello", sampling=LONG))
        while not session.busy:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupted())
    assert not session.busy


def test_a_dropped_stream_takes_the_request_back(app):
    session = app.session("inbox")
    next(session.stream("hello", sampling=LONG))
    gc.collect()
    eventually(lambda: not session.busy, timeout_s=30)
    assert session.respond("again", sampling=sampling(2)).finish_reason == "length"


def test_time_is_over(app):
    session = app.session("inbox")
    with pytest.raises(RequestTimeout):
        session.respond("hello", sampling=LONG, timeout_s=0.2)
    assert session.last_reply.finish_reason == "cancelled"


def test_what_cannot_be_asked(app):
    session = app.session("inbox")
    with pytest.raises(PromptEmpty) as empty:
        session.respond(" ")
    assert empty.value.hint == "say something"
    with pytest.raises(PromptTooLong) as long:
        session.respond("word " * 9000)
    assert long.value.num_tokens > long.value.tokens_max > 0
    with pytest.raises(ConfigError, match="text is 3"):
        session.respond(3)
    with pytest.raises(ConfigError, match="sampling is"):
        session.respond("a", sampling={"max_tokens": 3})
    with pytest.raises(ConfigError, match="prefill is 'guess'"):
        session.respond("a", prefill="guess")
    with pytest.raises(ConfigError, match="no KV predictor"):
        session.respond("a", prefill="predict")
    with pytest.raises(ConfigError, match="session name is ''"):
        app.session("")
    with pytest.raises(ConfigError, match="system is 3"):
        app.session("other", system=3)
    with pytest.raises(ConfigError, match="timeout_s is -1"):
        session.stream("a", timeout_s=-1)
    assert session.messages == []


def test_one_request_at_a_time(app):
    session = app.session("inbox")
    with session.stream("hello", sampling=LONG) as stream:
        next(stream)
        with pytest.raises(SessionBusy) as busy:
            session.respond("and")
        assert "answering another request" in str(busy.value)
        with pytest.raises(SessionBusy):
            session.clear()


def test_a_session_has_one_system_prompt(app):
    with app.session("inbox", system="one") as session:
        session.respond("hello", sampling=sampling(2))
    with pytest.raises(ConfigError, match="system prompt"):
        app.session("inbox", system="two")
    assert app.session("inbox", system="one").system == "one"


def test_a_closed_session_answers_no_more(app):
    session = app.session("inbox")
    stream = session.stream("hello", sampling=LONG)
    next(stream)
    session.close()
    assert session.closed
    assert stream.reply.finish_reason == "cancelled"
    with pytest.raises(RuntimeClosed, match="session 'inbox' was closed"):
        session.respond("more")
    session.close()
    assert app.session("inbox").messages[0].content == "hello"


def test_sessions_are_listed_and_removed(app):
    assert app.sessions() == []
    for name in ("one", "two, ü"):
        app.session(name).respond("hello", sampling=sampling(2))
    assert [info.name for info in app.sessions()] == ["two, ü", "one"]
    assert app.sessions()[0].num_messages == 2
    assert app.knows("one")
    assert app.remove("one")
    assert not app.remove("one")
    assert not app.knows("one")
    assert [info.name for info in app.sessions()] == ["two, ü"]


def test_prewarmed_and_suspended(app):
    session = app.session("inbox", system="Be brief, be kind, be here. " * 8)
    session.prewarm("hello")
    reply = session.respond("hello there", sampling=sampling(4))
    assert reply.stats.num_cached_tokens > 20
    assert session.suspend() > 20
    assert session.respond("more", sampling=sampling(2)).stats.num_restored_tokens > 20


def test_a_completion(app):
    whole = app.complete(ASKED)
    assert type(whole) is Finished
    assert (whole.reason, whole.usage.num_output) == ("length", 8)
    with app.stream(ASKED) as stream:
        events = list(stream)
    assert events[0] == Begun(num_prompt=whole.usage.num_prompt)
    said = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert said == whole.message.content == stream.finished.message.content
    assert stream.finished.usage.num_cached > 0
    with pytest.raises(PromptEmpty):
        app.complete(Completion())
    with app.stream(ASKED.with_sampling(max_tokens=1500)) as stream:
        next(stream)
    assert [type(event) for event in stream][-1] is Finished
    assert stream.finished.reason == "cancelled"


def test_sixteen_threads_ask_at_once(app):
    replies = {}

    def ask(number):
        session = app.session(f"s{number}")
        replies[number] = session.respond(f"hello {number % 4}", sampling=sampling(6))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 16
    assert all(replies[n].token_ids == replies[n % 4].token_ids for n in replies)


# --- what a daemon is ---


def test_what_is_connected_to(connected, daemon):
    assert connected.model_name == MODEL
    assert connected.context_max == daemon.runtime.context_max
    assert (connected.predicts, connected.keeps_sessions) == (False, True)
    assert connected.prefill == "exact"
    assert connected.app().name == "default"
    assert connected.app("mail") is connected.app("mail")
    connected.app("mail").session().respond("hello", sampling=sampling(2))
    (shown,) = connected.status()["apps"]
    assert (shown["name"], shown["num_recent"], shown["num_running"]) == ("mail", 1, 0)


def test_a_key_names_the_app(daemon):
    with edgekv.connect(daemon.base_url, key=daemon.keys["mail"]) as connection:
        app = connection.app()
        assert app.name == "mail"
        app.session("inbox").respond("hello", sampling=sampling(2))
        with pytest.raises(ConfigError, match="key is of the app 'mail'"):
            connection.app("notes")
    with edgekv.connect(daemon.base_url, key=daemon.keys["notes"]) as connection:
        assert connection.app("notes").sessions() == []
        assert not connection.app("notes").remove("inbox")
    with edgekv.connect(daemon.uds, app="mail") as connection:
        assert [info.name for info in connection.app().sessions()] == ["inbox"]
    with pytest.raises(ServeError, match="this key is not known"):
        edgekv.connect(daemon.base_url, key="ekv_wrong")
    with pytest.raises(ServeError, match="a key is missing"):
        edgekv.connect(daemon.base_url)


def test_an_apps_terms_are_its_keys(daemon, connected):
    daemon.apps.change("mail", weight=2.0, priority="background")
    app = connected.app("mail", weight=2, priority="background", prefill="exact")
    assert (app.weight, app.priority, app.prefill) == (2.0, "background", "exact")
    with pytest.raises(ConfigError, match=r"weight is 2\.0 at this daemon"):
        connected.app("mail", weight=3)


def test_a_session_without_a_name_is_its_clients_alone(connected, daemon):
    ours = connected.app("mail").session()
    ours.respond("hello", sampling=sampling(2))
    transport = httpx2.HTTPTransport(uds=str(daemon.uds))
    with httpx2.Client(transport=transport, base_url="http://localhost") as client:
        for token in ("", "guess"):
            for name in ("mail", "notes"):
                body = {"name": ours.name, "token": token}
                headers = {"x-edgekv-app": name}
                answer = client.put("/edgekv/session/look", json=body, headers=headers)
                assert not answer.is_success or answer.json()["messages"] == []


def test_of_stored_sessions_some_stay_open(connected, daemon, monkeypatch):
    monkeypatch.setattr(held, "KEPT_MAX", 2)
    app = connected.app("mail")
    sessions = [app.session(f"s{number}") for number in range(4)]
    for session in [*sessions, *sessions]:
        session.respond("hello", sampling=sampling(2))
        assert len(list(daemon.runtime._talks)) <= 3
    assert [len(session.messages) for session in sessions] == [4] * 4


def test_stored_sessions_make_room_and_others_do_not(connected, daemon):
    app = connected.app("mail")
    stored = [app.session(f"s{number}") for number in range(8)]
    for session in stored[:4]:
        session.respond("hello", sampling=sampling(2))
    daemon.apps.change("mail", num_sessions_max=2)
    for session in stored:
        session.respond("hello", sampling=sampling(2))
    unnamed = [app.session(), app.session()]
    with pytest.raises(TooManySessions):
        app.session()
    assert all(session.messages == [] for session in unnamed)
    daemon.apps.change("mail", num_sessions_max=None)  # it may have what any app may have again
    assert app.session().messages == []


def test_a_session_whose_client_is_gone_ends(connected, daemon, monkeypatch):
    monkeypatch.setattr(held, "IDLE_S", 0.3)
    app = connected.app("mail")
    named, unnamed = app.session("inbox"), app.session()
    named.respond("hello", sampling=sampling(2))
    eventually(lambda: not list(daemon.runtime._talks), timeout_s=10)
    assert daemon.server._model._num_users == 0
    with pytest.raises(RuntimeClosed, match="was closed"):
        unnamed.respond("hello")
    assert len(named.messages) == 2


def test_a_dropped_session_is_closed_at_the_daemon(connected, daemon):
    app = connected.app("mail")
    kept, unnamed = app.session("inbox"), app.session()
    assert len(list(daemon.runtime._talks)) == 2
    del kept, unnamed
    gc.collect()
    eventually(lambda: not list(daemon.runtime._talks), timeout_s=10)


def test_a_client_that_vanishes_takes_its_request_back(daemon):
    body = {"name": "inbox", "text": "hello", "sampling": {"max_tokens": 1500, "ignore_eos": True}}
    content = json.dumps(body)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(daemon.uds))
        head = "POST /edgekv/session/ask HTTP/1.1\r\nhost: localhost\r\n"
        client.sendall(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        (talk,) = daemon.runtime._talks
        assert not talk.running.done
    eventually(lambda: talk.running.done, timeout_s=10)
    assert talk.last_reply.finish_reason == "cancelled"
    daemon.runtime.check_integrity()


def test_a_daemon_that_ends_in_the_middle(idle_daemon, request):
    idle_daemon.options["drain_s"] = 0
    connected, daemon = request.getfixturevalue("connected"), idle_daemon
    session = connected.app("mail").session("inbox")
    stream = session.stream("hello", sampling=LONG)
    next(stream)
    with pytest.raises(RuntimeClosed):  # noqa: PT012
        daemon.stop()
        for _ in stream:
            pass
    with pytest.raises(DaemonGone, match="no daemon listens at") as gone:
        session.respond("more")
    assert gone.value.hint == "edgekv serve begins one"


def test_a_session_goes_on_after_a_restart(connected, daemon):
    app = connected.app("mail")
    session, unnamed = app.session("inbox"), app.session()
    first = session.respond("hello " * 30, sampling=sampling(8))
    daemon.stop()
    daemon.start()
    reply = session.respond("more", sampling=sampling(2))
    assert reply.stats.num_cached_tokens >= first.stats.num_prompt_tokens
    assert len(session.messages) == 4
    with pytest.raises(RuntimeClosed, match="was closed"):
        unnamed.respond("more")


def test_an_idle_model_is_unloaded_under_named_sessions_alone(idle_daemon):
    idle_daemon.start(keep_alive_s=0.2)
    loaded = idle_daemon.server._model
    with edgekv.connect(idle_daemon.uds) as connection:
        named, unnamed = connection.app("mail").session("inbox"), connection.app("mail").session()
        named.respond("hello", sampling=sampling(2))
        unnamed.respond("hello", sampling=sampling(2))
        time.sleep(0.5)
        assert loaded.loaded is not None
        unnamed.close()
        eventually(lambda: loaded.loaded is None, timeout_s=10)
        assert named.respond("more", sampling=sampling(2)).stats.num_cached_tokens > 0


def test_a_closed_connection(daemon):
    connection = edgekv.connect(daemon.uds)
    session = connection.app("mail").session("inbox")
    stream = session.stream("hello", sampling=LONG)
    next(stream)
    connection.close()
    connection.close()
    assert session.closed
    with pytest.raises(RuntimeClosed):
        session.respond("more")
    with pytest.raises(RuntimeClosed):
        connection.app("mail")
    assert not any(thread.name == "edgekv-link" for thread in threading.enumerate())


def test_nobody_is_there(tmp_path):
    with pytest.raises(DaemonGone, match="no daemon listens at"):
        edgekv.connect(tmp_path / "sock")
    with pytest.raises(DaemonGone):
        edgekv.connect("http://127.0.0.1:1", key="ekv_x")


@pytest.mark.parametrize("where", ["", "https://127.0.0.1:1", "http://example.org", "http://[", 3])
def test_no_place_of_a_daemon(where):
    with pytest.raises(ConfigError, match="where is"):
        edgekv.connect(where)


def test_a_stranger_is_no_daemon(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer():
            connection, _ = stranger.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ServeError, match="says 200 to GET /edgekv/hello"):
            edgekv.connect(f"http://127.0.0.1:{stranger.getsockname()[1]}")
        thread.join()


def test_a_client_needs_no_mlx(daemon):
    code = (
        "import sys, edgekv\n"
        "from edgekv.chat.values import Completion\n"
        "brief = edgekv.SamplingParams(max_tokens=3, ignore_eos=True)\n"
        "with edgekv.connect(sys.argv[1]) as daemon:\n"
        "    app = daemon.app('mail')\n"
        "    print(app.session('inbox').respond('hello', sampling=brief).finish_reason)\n"
        "    print(len(list(app.stream(Completion(prompt='a', sampling=brief)))) > 1)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'mlx']"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(daemon.uds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["length", "True"]


def test_lines_show_that_a_request_lives_and_how_far_it_got():
    class Waiting:
        prefill_progress = (0, 9)

    async def told():
        yield Begun(num_prompt=9)
        await asyncio.sleep(0.3)
        stream.prefill_progress = (5, 9)
        await asyncio.sleep(0.3)
        raise RuntimeClosed("it ended")

    async def lines():
        asked = native._Asked(stream=stream, told=told(), counting=Counting())
        return [line async for line in native._lines(asked, 0.1)]

    stream = Waiting()
    said = asyncio.run(lines())
    kinds = [json.loads(line)["type"] if line != "\n" else "" for line in said]
    assert [kind for kind in kinds if kind] == ["Begun", "Progress", "Progress", "Failed"]
    assert kinds.count("") >= 2
    assert json.loads(said[-1])["error"]["type"] == "RuntimeClosed"


def test_a_completions_lines(daemon):
    body = {"asked": {"prompt": "word " * 30, "sampling": {"max_tokens": 2, "ignore_eos": True}}}
    transport = httpx2.HTTPTransport(uds=str(daemon.uds))
    with (
        httpx2.Client(transport=transport, base_url="http://localhost") as client,
        client.stream("POST", "/edgekv/complete", json=body, timeout=60) as response,
    ):
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.iter_lines() if line]
    assert (lines[0]["type"], lines[-1]["type"]) == ("Begun", "Finished")
    assert lines[-1]["usage"]["num_output"] == 2


@pytest.mark.parametrize(
    ("path", "body", "kind", "said"),
    [
        ("complete", {"asked": {"messages": "Hi"}}, "ConfigError", "asked.messages is 'Hi'"),
        ("complete", {}, "ConfigError", "asked is None"),
        ("complete", [], "RequestError", "the body must be a JSON object"),
        ("session/ask", {"name": "a"}, "RequestError", "text is missing"),
        ("session/ask", {"text": "a"}, "RequestError", "name is missing"),
        ("session/ask", {"name": "", "text": "a"}, "ConfigError", "session name is ''"),
        ("session/fly", {}, "ServeError", "Not Found"),
    ],
)
def test_what_anybody_may_send(daemon, path, body, kind, said):
    transport = httpx2.HTTPTransport(uds=str(daemon.uds))
    with httpx2.Client(transport=transport, base_url="http://localhost") as client:
        answer = client.post(f"/edgekv/{path}", json=body)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["type"] == kind
    assert said in error["message"]
