"""The Colab notebook is committed without outputs and runs from top to bottom."""

import nbclient
import nbformat
import pytest


@pytest.fixture
def notebook(repository):
    return nbformat.read(repository / "docs" / "colab.ipynb", as_version=4)


def test_no_outputs_are_committed(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    # One device, as most readers have, and programs that are cheap to compile.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [_text(cell) for cell in code]
    assert "accelerator:" in texts[1]
    assert "step 60/60" in texts[2]
    depths = [line.split()[0] for line in texts[3].splitlines() if line[:4].strip().isdigit()]
    assert depths == ["1", "2", "4", "8"]
    assert any("image/png" in output.get("data", {}) for output in code[3].outputs)
    assert "step 60 (latest)" in texts[4]
    for depth in (1, 4, 16):
        assert texts[5].count(f"--- depth {depth}\nThe ") == 1
        assert texts[5].count(f"--- depth {depth}\nIf the ") == 1
    assert (tmp_path / "runs" / "colab" / "checkpoints" / "60").is_dir()


def _text(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")
