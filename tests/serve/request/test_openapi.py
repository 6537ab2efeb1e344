"""Schemathesis asks the server what its OpenAPI document allows and what it forbids."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi import checks

from serve.request.app import make_app
from serve.request.limits import Limits
from serve.v2.routes import VERSION, model_name

CHECKS = [
    not_a_server_error,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
    checks.unsupported_method,
]
NUM_EXAMPLES = 25  # of each operation and mode


@pytest.fixture
def schema(runtime):
    """The server's own document of itself, over a server in this process."""
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(runtime, Limits(max_body_bytes=2**20)))
    shutdown_lifespans()


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("is_known", [True, False], ids=["this-model", "any-model"])
def test_the_server_does_what_its_description_says(schema, runtime, mode, is_known):
    names = {"name": model_name(runtime.model), "version": VERSION} if is_known else {}
    operations = [result.ok() for result in schema.get_all_operations()]
    tested = [operation for operation in operations if mode.is_positive or can_be_broken(operation)]
    assert len(tested) > 2
    for operation in tested:
        ask(operation, mode, {name: value for name, value in names.items() if f"{{{name}}}" in operation.path})


def can_be_broken(operation):
    """Whether anything that is sent could be forbidden: any text is a name in an address."""
    return any((operation.query, operation.headers, operation.body))


def ask(operation, mode, path_parameters):
    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(mode, path_parameters=path_parameters or None))
    def ask_once(case):
        case.validate_response(case.call(), checks=CHECKS)

    ask_once()
