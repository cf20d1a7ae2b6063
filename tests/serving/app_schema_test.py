"""What /openapi.json says is what the server does: requests that it allows, and others, made up."""

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from running_server import chat_model, running
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

# Rules between fields, such as n=2 with temperature=0, are none that a schema can have.
NOT_CHECKED = [positive_data_acceptance]
# Most of the examples ask for texts, whose schemas are large.
_SHARES = {"/v1/completions": 10, "/v1/chat/completions": 10, "/tokenize": 3, "/detokenize": 3}


@pytest.mark.slow
def test_no_request_breaks_the_server_or_its_schema(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> None:
    # Paths with nothing to vary get fewer than their share.
    count, least = (360, 300) if pytestconfig.getoption("--serve-all") else (60, 45)
    lm = chat_model(tmp_path_factory.mktemp("chat"))
    with running(lm, rows=4, queue=64) as server, requests.Session() as session:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        total = sum(_SHARES.get(operation.path, 1) for operation in operations)
        statuses: dict[int, int] = {}
        for operation in operations:
            share = _SHARES.get(operation.path, 1) / total

            @hypothesis.settings(
                max_examples=max(round(count * share), 2),
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            )
            @hypothesis.given(
                case=st.one_of(operation.as_strategy(mode) for mode in GenerationMode)
            )
            def ask(case: schemathesis.Case) -> None:
                answer = case.call_and_validate(session=session, excluded_checks=NOT_CHECKED)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                assert answer.status_code < 500

            ask()
        assert sum(statuses.values()) >= least
        assert statuses[200] and statuses[400]
        assert server.state == "ready" and server.engine.num_open == 0
