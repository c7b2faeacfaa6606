"""Requests that schemathesis makes of what the server says of itself: its OpenAPI document and our options' schemas."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import MESSAGES

pytestmark = pytest.mark.slow

ROUTES = ("/v1/align_spec/info", "/v1/align_spec/reports/{response_id}", "/v1/chat/completions")
ANY_ORDER = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def text(**more):
    return {"type": "string", "maxLength": 12, **more}


@pytest.fixture(scope="module")
def schema(server):
    """The served document, in which a chat request is one of ours: a small one, with any options that a method has."""
    document = httpx.get(f"{server.root}/openapi.json").raise_for_status().json()
    document["paths"] = {route: document["paths"][route] for route in ROUTES}
    methods = httpx.get(f"{server.root}/v1/align_spec/info").json()["methods"]
    assert not any("$defs" in one for one in methods.values())
    grammar = {"type": "object", "properties": {"regex": {"enum": ["[01]{2}", "a*", "(", ""]}}, "required": ["regex"]}
    body = {
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "messages", "max_tokens", "vllm_xargs"],
        "properties": {
            "model": {"const": "base"},
            "messages": {
                "anyOf": [
                    {"const": MESSAGES},
                    {
                        "type": "array",
                        "maxItems": 3,
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["role", "content"],
                            "properties": {
                                "role": text(enum=["system", "user", "assistant", "tool", "x"]),
                                "content": text(),
                            },
                        },
                    },
                ]
            },
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 6},
            "temperature": {"enum": [0, 0.5, 1.0]},
            "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64},
            "cache_salt": text(),
            "structured_outputs": grammar,
            "stream": {"type": "boolean"},
            "vllm_xargs": {"anyOf": [small(one) for one in methods.values()]},
        },
    }
    document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"] = {"application/json": {"schema": body}}
    loaded = schemathesis.openapi.from_dict(document)
    loaded.config.update(base_url=server.root)
    return loaded


def small(schema):
    """Whatever the schema accepts, but no request for hundreds of samples."""
    properties = dict(schema["properties"])
    for name in ("bon", "bon_reference", "deal_top_k", "deal_lookahead", "asap_max_attempts", "cards_max_tries"):
        if name in properties:
            properties[name] = {**properties[name], "maximum": 4}
            if properties[name].get("default", 0) > 4:
                properties[name].pop("default")
    return {**schema, "properties": properties}


def answers(server, schema, route, method):
    """Statuses of a few hundred requests to one route."""
    found = []

    @ANY_ORDER
    @given(st.data())
    def ask(data):
        case = data.draw(schema[route][method].as_strategy())
        response = case.call(timeout=120)
        found.append(response.status_code)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["message"]

    ask()
    assert server.process.poll() is None
    assert server.get("/health")[0] == 200
    return found


@pytest.mark.parametrize("route", ROUTES[:2])
def test_our_own_routes_answer_as_they_say(server, schema, route):
    assert set(answers(server, schema, route, "GET")) <= {200, 404}


def test_any_options_of_the_schemas_are_served_or_refused(server, schema):
    found = answers(server, schema, "/v1/chat/completions", "POST")
    assert {200, 400} <= set(found) <= {200, 400, 422}
    assert found.count(200) > 20
    server.wait_idle()
