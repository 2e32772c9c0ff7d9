"""Over keys no app sees, continues or learns anything of another's."""

import openai
import pytest
from scripted_model import scripted

from edgekv.config import RuntimeConfig, StoreOptions
from edgekv.runtime import Runtime

PROMPT = [{"role": "user", "content": "A secret that takes some tokens to say. " * 4}]


@pytest.fixture
def clients(daemon):
    clients = {
        app: openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys[app])
        for app in ("mail", "notes")
    }
    yield clients
    for client in clients.values():
        client.close()


def cached(client, messages=PROMPT, **options):
    reply = client.chat.completions.create(model="any", messages=messages, **options)
    return reply.usage.prompt_tokens_details.cached_tokens


def test_what_one_app_computed_another_computes_again(clients):
    with scripted(lambda _: "Yes."):
        assert cached(clients["mail"]) == 0
        assert cached(clients["mail"]) > 0
        assert cached(clients["notes"]) == 0


def test_a_conversation_of_one_name_is_two(daemon, clients):
    headers = {"x-edgekv-session": "inbox"}
    follow = [
        *PROMPT,
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ]
    with scripted(lambda _: "Yes."):
        cached(clients["mail"], extra_headers=headers)
        assert cached(clients["notes"], follow, extra_headers=headers) == 0
        assert cached(clients["mail"], follow, extra_headers=headers) > 0
    names = {app: [s.name for s in daemon.runtime.app(app).sessions()] for app in clients}
    assert len(names["mail"]) == len(names["notes"]) == 1


def test_an_app_cannot_say_at_the_port_that_it_is_another(clients):
    headers = {"x-edgekv-app": "mail"}
    with scripted(lambda _: "Yes."):
        cached(clients["mail"])
        assert cached(clients["notes"], extra_headers=headers) == 0


def test_figures_are_of_ones_own_app(daemon, clients):
    with scripted(lambda _: "Yes."):
        cached(clients["mail"])
    status = clients["notes"].get("/../edgekv/status", cast_to=dict[str, object])
    assert "mail" not in str(status["apps"])
    assert status["recent"] == []


def test_a_revoked_key_opens_nothing(daemon, clients):
    daemon.apps.revoke("mail")
    with pytest.raises(openai.AuthenticationError):
        cached(clients["mail"])
    with scripted(lambda _: "Yes."):
        assert cached(clients["notes"]) == 0


def words(number):
    """A prompt of its own, of as many tokens as any other."""
    return [{"role": "user", "content": f"{number} " + "and words like any others, " * 9}]


def test_what_an_app_waits_for_says_nothing_of_anothers_cache(daemon, clients):
    """Its first token waits for the same rows, whether another app asked this before or not."""

    def work(messages):
        before = daemon.runtime.counters()
        start = before.num_rows, before.swap.num_restored_tokens
        assert cached(clients["notes"], messages, max_tokens=1) == known
        after = daemon.runtime.counters()
        return after.num_rows - start[0], after.swap.num_restored_tokens - start[1]

    with scripted(lambda _: "Yes."):
        cached(clients["notes"], words(1))
        known = cached(clients["notes"], words(2))  # its own: the beginning of every prompt
        for number in (3, 4):
            cached(clients["mail"], words(number))
        assert len({work(words(number)) for number in (3, 5, 4, 6)}) == 1


def test_an_app_cannot_drive_out_what_another_is_promised(idle_daemon, tiny_folder):
    pool = 1 << 22
    config = RuntimeConfig(
        pool_bytes=pool, store=StoreOptions(folder=idle_daemon.uds.parent / "kv")
    )
    idle_daemon.make = lambda: Runtime.open(str(tiny_folder), config=config)
    idle_daemon.apps.change("mail", pinned_bytes=pool // 2)
    daemon = idle_daemon.start()
    with openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["mail"]) as mail:
        cached(mail)
        has = daemon.runtime.usage()["mail"].kv_bytes
        assert 0 < has <= pool // 2
        with openai.OpenAI(base_url=f"{daemon.base_url}/v1", api_key=daemon.keys["notes"]) as notes:
            for number in range(40):
                cached(notes, words(number), max_tokens=20)
        assert daemon.runtime.counters().swap.num_swap_outs > 0, "nothing had to leave"
        assert daemon.runtime.usage()["mail"].kv_bytes == has
        reply = mail.chat.completions.create(model="any", messages=PROMPT, max_tokens=1)
        assert reply.usage.prompt_tokens_details.cached_tokens > 0
        assert reply.model_extra["edgekv"]["num_restored_tokens"] == 0
