"""The notebook calls the stages of the script in order, defines nothing, and runs to its last cell."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import LakhMIDI as study

NOTEBOOK = Path(__file__).parents[1] / "Machine_Learning_Project.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def knobs_cell(notebook):
    return next(cell for cell in code_cells(notebook) if "knobs" in cell.metadata.get("tags", ()))


def test_it_calls_the_stages_in_order_and_defines_nothing(notebook):
    source = "\n".join(re.sub(r"^\s*!.*", "", cell.source, flags=re.M) for cell in code_cells(notebook))
    assert re.findall(r"^LakhMIDI\.(\w+)\(cfg\);?$", source, re.M) == [
        "banner",
        *(s.__name__ for s in study.STAGES),
    ]
    assert not re.search(r"^\s*(def|class)\b|\blambda\b", source, re.M)


def test_its_knobs_are_those_of_the_script(notebook):
    lines = [line.removeprefix("# ") for line in knobs_cell(notebook).source.splitlines() if "cfg" in line]
    used = [
        keyword.arg
        for line in lines
        for call in ast.walk(ast.parse(line))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    ]
    assert {"DATASET", "LMD_DOWNLOAD", "SAVE_DIR"} <= set(used) <= set(study.knob_names())


def test_a_stage_is_introduced_and_its_results_are_shown(notebook):
    for i, cell in enumerate(notebook.cells):
        if re.fullmatch(r"LakhMIDI\.\w+\(cfg\);", cell.source):
            assert notebook.cells[i - 1].cell_type == "markdown"
            assert notebook.cells[i + 1].cell_type == "code"


def test_stored_outputs_are_of_a_run_without_errors_and_small(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert NOTEBOOK.stat().st_size < 2_000_000


def test_it_runs_from_the_first_cell_to_the_last(notebook, tmp_path, midi_zip, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    run = nbformat.from_dict(notebook)
    knobs_cell(
        run
    ).source = f"cfg = Cfg.smoke({str(tmp_path)!r}, LMD_ZIP_PATH={str(midi_zip)!r}, DEVICE='cpu')"
    nbclient.NotebookClient(run, timeout=110, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs_lakh" / "report.html").exists()
    assert (
        sum("image/png" in o.get("data", {}) for cell in code_cells(run) for o in cell.get("outputs", []))
        >= 4
    )
