"""The files of the playground, how they are sent, and what they know of the package."""

import concurrent.futures
import json
import pathlib
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from megatransformer_jax.models.exit_criteria import EXIT_CRITERIA
from megatransformer_jax.serving import page
from megatransformer_jax.serving.page import PAGE_PATHS, page_routes

FOLDER = pathlib.Path(page.__file__).parent / "playground"


class Lens:
    """Stands for a lens whose answer takes two launches."""

    def request(self, body):
        return body["ids"]

    async def answer(self, request, run):
        return {"sum": await run(lambda: sum(request)), "again": await run(lambda: 1)}


def order(function):
    future = concurrent.futures.Future()
    future.set_result(function())
    return future


async def read_body(request):
    return json.loads(await request.body())


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=page_routes(Lens(), read_body, order)))


def test_all_files_are_sent_and_may_load_nothing_from_elsewhere(client):
    sent = {path: client.get(path) for path in PAGE_PATHS}
    assert {path.lstrip("/") or "index.html" for path in sent} == {
        path.name for path in FOLDER.iterdir()
    }
    for path, answer in sent.items():
        assert answer.status_code == 200
        assert answer.content == (FOLDER / (path[1:] or "index.html")).read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    kinds = {path: answer.headers["content-type"].split(";")[0] for path, answer in sent.items()}
    assert kinds["/"] == "text/html" and kinds["/app.js"] == "text/javascript"
    assert kinds["/style.css"] == "text/css" and kinds["/icon.svg"] == "image/svg+xml"


def test_files_name_no_other_host_and_write_no_markup():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML|eval\(", text)


def test_the_lens_is_asked_between_launches(client):
    assert client.post("/lens", json={"ids": [1, 2]}).json() == {"sum": 3, "again": 1}
    without = TestClient(Starlette(routes=page_routes(None, read_body, order)))
    assert without.get("/").status_code == 200
    assert without.post("/lens", json={"ids": [1]}).status_code == 404


def test_criteria_and_thresholds_are_the_packages():
    script = (FOLDER / "depths.js").read_text()
    found = dict(re.findall(r"^  (\w+): \{ threshold: ([\d.e-]+), sign", script, re.MULTILINE))
    assert {name: float(value) for name, value in found.items()} == {
        name: criterion.default_threshold
        for name, criterion in EXIT_CRITERIA.items()
        if name != "fixed"
    }
