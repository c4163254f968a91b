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
    source = "\n".join(cell.source for cell in code_cells(notebook))
    called = re.findall(r"^ *LakhMIDI\.(\w+)\(cfg\);?$", source, re.M)
    assert called == ["banner", *(stage.__name__ for stage in study.STAGES)]
    assert not re.search(r"^\s*(def|class)\b|\blambda\b", source, re.M)


def test_its_knobs_are_those_of_the_script(notebook):
    source = knobs_cell(notebook).source
    nodes = ast.walk(ast.parse(source.replace("# cfg", "cfg")))
    used = {node.arg for node in nodes if isinstance(node, ast.keyword)} - {None}
    used |= set(re.findall(r'"([A-Z_]+)":', source))
    assert {"DATASET", "LMD_DOWNLOAD", "DATA_ROOT", "ABC_ROOT"} <= used <= set(study.knob_names())


def set_up(notebook, folder):
    """The first code cell as a program of its own, without a network."""
    command = [sys.executable, "-c", code_cells(notebook)[0].source]
    env = os.environ | {"PIP_NO_INDEX": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_without_the_script_it_says_in_one_line_what_to_set(notebook, tmp_path):
    run = set_up(notebook, tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "set LAKHMIDI" in run.stderr


def test_only_what_is_missing_is_installed_and_never_torch_or_numpy(notebook, tmp_path):
    (tmp_path / "LakhMIDI.py").touch()
    (tmp_path / "requirements.txt").write_text("# why\ntorch==99\nnumpy==99  # arrays\nscipy==99\n")
    assert set_up(notebook, tmp_path).returncode == 0
    (tmp_path / "requirements.txt").write_text("torch==99\nno-such-package==1; python_version > '3'  # why\n")
    run = set_up(notebook, tmp_path)
    assert run.returncode == 1 and "could not install no-such-package==1" in run.stderr


def test_stored_outputs_are_of_a_run_without_errors_and_small(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs, "store a run: benchmarks/run_notebook.py"
    assert not {output.output_type for output in outputs} & {"error"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not re.search("can't|failed|\r", "".join(output.get("text", "") for output in outputs))
    assert NOTEBOOK.stat().st_size < 1_000_000 and "widgets" not in notebook.metadata


def test_it_runs_from_the_first_cell_to_the_last(notebook, tmp_path, midi_zip, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("LakhMIDI.py", "requirements.txt"):
        (tmp_path / name).symlink_to(NOTEBOOK.parent / name)
    run = nbformat.from_dict(notebook)
    knobs = f"LMD_ZIP_PATH={str(midi_zip)!r}, DEVICE='cpu'"
    knobs_cell(run).source = f"cfg = Cfg.smoke({str(tmp_path)!r}, {knobs})"
    client = nbclient.NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in code_cells(run) for output in cell.get("outputs", [])]
    assert (tmp_path / "runs_lakh" / "report.html").exists()
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.get("name") == "stderr"]
