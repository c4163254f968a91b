"""The notebook finds the script or says so, calls its stages in order, defines nothing, runs to its end."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import smoke_knobs

import LakhMIDI as study

NOTEBOOK = Path(__file__).parents[1] / "Machine_Learning_Project.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def knobs_cell(notebook):
    return next(cell for cell in code_cells(notebook) if "knobs" in cell.metadata.get("tags", ()))


def check_outputs(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    kinds = {kind for output in outputs for kind in (output.output_type, output.get("name"))}
    assert not kinds & {"error", "stderr"}
    return outputs


def test_it_calls_the_stages_in_order_defines_nothing_and_knows_the_knobs(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    called = re.findall(r"^ *LakhMIDI\.(\w+)\(cfg\);?$", source, re.M)
    assert called == ["banner", *(stage.__name__ for stage in study.STAGES)]
    assert not re.search(r"^\s*(def|class)\b|\blambda\b", source, re.M)
    knobs = knobs_cell(notebook).source
    nodes = ast.walk(ast.parse(knobs.replace("# cfg", "cfg")))
    used = {node.arg for node in nodes if isinstance(node, ast.keyword)} - {None}
    used |= set(re.findall(r'"([A-Z_]+)":', knobs))
    assert {"DATASET", "LMD_DOWNLOAD", "DATA_ROOT", "ABC_ROOT"} <= used <= set(study.knob_names())


def test_the_first_cell_installs_only_what_is_missing_never_torch_and_says_what_to_set(notebook, tmp_path):
    def set_up():  # as a program of its own, without a network
        command = [sys.executable, "-c", code_cells(notebook)[0].source]
        env = os.environ | {"PIP_NO_INDEX": "1"}
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return run.returncode, run.stderr

    code, said = set_up()
    assert code == 1 and said.count("\n") == 1 and "set LAKHMIDI" in said
    (tmp_path / "LakhMIDI.py").touch()
    (tmp_path / "requirements.txt").write_text("# why\ntorch==99\nnumpy==99  # arrays\nscipy==99\n")
    assert set_up()[0] == 0
    (tmp_path / "requirements.txt").write_text("torch==99\nno-such-package==1; python_version > '3'  # why\n")
    code, said = set_up()
    assert code == 1 and "could not install no-such-package==1" in said


def test_stored_outputs_are_of_a_run_without_errors_and_small(notebook):
    outputs = check_outputs(notebook)
    assert not re.search("can't|failed|\r", "".join(output.get("text", "") for output in outputs))
    assert NOTEBOOK.stat().st_size < 1_000_000 and "widgets" not in notebook.metadata


def test_it_runs_from_the_first_cell_to_the_last(notebook, tmp_path, midi_zip, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("LakhMIDI.py", "requirements.txt"):
        (tmp_path / name).symlink_to(NOTEBOOK.parent / name)
    knobs = smoke_knobs(tmp_path, LMD_ZIP_PATH=str(midi_zip), DEVICE="cpu")
    knobs_cell(notebook).source = f"cfg = Cfg(**{knobs})"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs_lakh" / "report.html").exists() and check_outputs(notebook)
