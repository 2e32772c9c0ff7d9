"""Over keys no app sees, continues or learns anything of another's."""

import openai
import pytest
from scripted_model import scripted

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
