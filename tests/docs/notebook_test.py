"""The Colab notebook is committed without outputs and runs from top to bottom."""

import http.server
import json
import re
import threading

import nbclient
import nbformat
import pytest
from cheap_compilation import CHEAP_COMPILATION


@pytest.fixture
def notebook(repository):
    return nbformat.read(repository / "docs" / "colab.ipynb", as_version=4)


def test_no_outputs_are_committed(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


class _Sessions(http.server.BaseHTTPRequestHandler):
    """Answers as Colab's kernel does when it is asked what it runs."""

    path_of_notebook = ""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        assert self.path == "/api/sessions"
        self.wfile.write(json.dumps([{"path": self.path_of_notebook}]).encode())

    def log_message(self, *unused):
        pass


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "fileId=https%3A//github.com/some-one/mega.jax/blob/v0.2/docs/colab.ipynb",
            "git+https://github.com/some-one/mega.jax@v0.2",
        ),
        ("fileId=1a2B3c", None),
    ],
)
def test_in_colab_it_installs_the_repository_it_was_opened_from(
    notebook, tmp_path, monkeypatch, path, expected
):
    monkeypatch.chdir(tmp_path)
    names = {}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code[:2]:
        exec(cell, names)
    handler = type("Handler", (_Sessions,), {"path_of_notebook": path})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_port))
        threading.Thread(target=server.handle_request).start()
        if expected is None:
            with pytest.raises(ValueError, match="set SOURCE above"):
                names["source"]()
        else:
            assert names["source"]() == expected


def test_a_checkout_and_a_source_that_is_given_come_first(notebook, repository, monkeypatch):
    monkeypatch.chdir(repository / "docs")
    names = {}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code[:2]:
        exec(cell, names)
    assert names["source"]() == str(repository)
    names["SOURCE"] = "git+https://example.org/fork"
    assert names["source"]() == "git+https://example.org/fork"


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    # One device, as most readers have, and programs that are cheap to compile.
    monkeypatch.setenv("XLA_FLAGS", CHEAP_COMPILATION)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [_text(cell) for cell in code]
    assert "accelerator:" in texts[1]
    assert "'loss':" in texts[2] and "validation after step 60" in texts[2]
    # A bar, and the table at the end.
    assert "<progress" in _shown(code[2], "text/html")
    rows = re.findall(r"<tr><td>(\d+)", _shown(code[3], "text/html"))
    assert rows == ["1", "2", "4", "8"]
    assert _shown(code[4], "image/png") and _shown(code[7], "image/png")
    assert len(texts[5].splitlines()) >= 4 and re.search(r"\[[1-4]\]", texts[5])
    assert "(1, " in texts[6] and "Iterations after token" in _shown(code[6], "text/html")
    assert "saved-model" in texts[8] and "new tiny, seed 0" in texts[8]
    assert (tmp_path / "runs" / "colab" / "checkpoints" / "60").is_dir()
    assert not any("--config" in cell.source or "absl" in cell.source for cell in code)


def _text(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _shown(cell, kind: str) -> str:
    """What a cell displays."""
    return "".join(output.get("data", {}).get(kind, "") for output in cell.outputs)
