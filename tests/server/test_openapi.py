"""The document at /openapi.json says what the daemon does: what it allows is answered, what it
does not allow is refused, and every answer is as it says."""

import re
from typing import get_args

import jsonschema
import pytest
import requests
import schemathesis
from fuzz import fuzz
from running_daemon import RunningDaemon
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_model import scripted

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime
from edgekv.server.fields import Fault, FaultKind
from edgekv.server.metrics import Metrics
from edgekv.server.model import ServedModel
from edgekv.server.openapi import document
from edgekv.server.service import Service, say

DOCUMENT = document()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}
TAKING = [label for label, operation in OPERATIONS.items() if "requestBody" in operation]
ALWAYS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
# Why what the schemas allow is refused nevertheless; no schema could say this.
REASONS = (
    "prompt is too long",
    "there are no messages",  # of the conversation is left what edgekv has a use for: nothing
    "tool_choice",  # of a tool that is not offered
    "must be the id of a tool_use block before it",
    "there is a tool of this name already",
    "must be unlike those of the tools before it",
    "is Anthropic's own, which edgekv does not have",
    "this runtime has no KV predictor",
    "computes no embeddings",
    "Unsatisfiable schema",
)


@pytest.fixture(scope="module")
def schema():
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.config.generation.with_security_parameters = False
    return schema


@pytest.fixture(scope="module")
def serving(tiny_folder, tmp_path_factory):
    """A daemon whose answers are short."""
    config = RuntimeConfig(pool_bytes=1 << 26, context_max=256)
    daemon = RunningDaemon(
        tmp_path_factory.mktemp("daemon"), lambda: Runtime.open(str(tiny_folder), config=config)
    )
    with scripted(lambda _: "Yes."):
        yield daemon.start()
        daemon.stop()


def operation_of(schema, label):
    method, path = label.split()
    return schema[path][method]


def probe(daemon, operation, mode, num_examples):
    """Ask an operation what the document allows, or what it does not; check each answer."""
    headers = {"authorization": f"Bearer {daemon.keys['mail']}"}

    @fuzz(examples=num_examples, case=operation.as_strategy(mode))
    def ask(case):
        answer = case.call(daemon.base_url, session, headers, timeout=60)
        accepts = [] if is_unsayable(answer) else [positive_data_acceptance]
        case.validate_response(answer, checks=[*ALWAYS, *accepts], headers=headers)

    with requests.Session() as session:
        ask()


def is_unsayable(answer):
    return answer.status_code == 400 and any(reason in answer.text for reason in REASONS)


# --- the document itself ---


def test_it_is_a_document_of_openapi(schema):
    schema.validate()
    for operation in OPERATIONS.values():
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in contents:
            for media in content.get("content", {}).values():
                jsonschema.Draft202012Validator.check_schema(media["schema"])


def test_every_route_is_in_it_but_those_that_are_private():
    service = Service(ServedModel("tiny", lambda: None, None), metrics=Metrics(), heartbeat_s=1)

    def asked(routes):
        plain = [(route, re.sub(":path}", "}", route.path)) for route in routes]
        return {f"{method} {p}" for route, p in plain for method in route.methods - {"HEAD"}}

    private = asked([*service._native.routes(), *service._page.routes()])
    assert asked(service.application().routes) - private == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_errors_are_of_the_shape_that_it_says(label):
    path = label.split()[1]
    for kind in get_args(FaultKind):
        fault = Fault(kind, "no", param="field", code="word", retry_after_s=1)
        response = OPERATIONS[label]["responses"].get(str(fault.status))
        if response is not None:
            whole = {**response["content"]["application/json"]["schema"], **DOCUMENT}
            jsonschema.validate(say(fault, path), whole, jsonschema.Draft202012Validator)


# --- the daemon ---


def test_it_is_served_to_who_has_a_key(serving):
    address = f"{serving.base_url}/openapi.json"
    assert requests.get(address, timeout=60).status_code == 401
    headers = {"x-api-key": serving.keys["mail"]}
    assert requests.get(address, headers=headers, timeout=60).json() == DOCUMENT


def test_the_model_that_is_served_is_as_it_says(serving):
    headers = {"x-api-key": serving.keys["mail"]}
    answer = requests.get(f"{serving.base_url}/v1/models/tiny", headers=headers, timeout=60)
    said = OPERATIONS["GET /v1/models/{name}"]["responses"]["200"]["content"]["application/json"]
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), said["schema"])


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_what_it_allows_is_answered(schema, serving, label):
    probe(serving, operation_of(schema, label), GenerationMode.POSITIVE, 5)


@pytest.mark.slow
@pytest.mark.parametrize("label", TAKING)
def test_what_it_does_not_allow_is_refused(schema, serving, label):
    probe(serving, operation_of(schema, label), GenerationMode.NEGATIVE, 5)


@pytest.mark.long
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("label", TAKING)
def test_much_of_what_it_allows_and_of_what_it_does_not(schema, serving, label, mode):
    probe(serving, operation_of(schema, label), mode, 200)
