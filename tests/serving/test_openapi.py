"""What /docs.json says is what the service does: requests made from the description alone (schemathesis), good ones and bad ones."""

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.serving.conftest import Running

PATHS = ("/recommend", "/rank", "/events")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_requests_made_from_the_description(running: Running) -> None:
    schema = schemathesis.openapi.from_dict(running.client.get("/docs.json").json())
    seen: set[int] = set()
    for path in PATHS:
        operation = schema[path]["POST"]
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def conforms(case: schemathesis.Case) -> None:
                response = case.call(base_url=str(running.client.base_url))
                case.validate_response(response, checks=CHECKS)
                seen.add(response.status_code)

            conforms()
    assert 400 in seen
    answer = running.client.post("/recommend", json={"user_id": "u0001"})
    assert answer.status_code == 200
