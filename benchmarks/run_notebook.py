"""Runs the notebook on the bundled corpus and stores it with its outputs: ten minutes on two idle cores.

    python benchmarks/run_notebook.py [FOLDER]     data and runs of the run stay in FOLDER, so it can go on

Stored are the sources as they are, The Session as the default included; the run itself takes the bundled folk
tunes, as the notebook says. Progress bars leave their last state only, and no state of widgets is kept.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "Machine_Learning_Project.ipynb"


def plain(text):
    """What is left of a text on a terminal after the carriage returns of progress bars."""
    lines = (line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", "\n".join(lines))


def merged(outputs):
    """Neighbouring pieces of printed text as one, without what bars have overwritten."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = plain(output.text)
    return [output for output in kept if output.get("text") != ""]


def main(folder):
    notebook = nbformat.read(NOTEBOOK, 4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        cell.source = cell.source.replace('DATASET="thesession", ', "")
    os.environ["PYTHONPATH"] = str(NOTEBOOK.parent)
    for name in ("LakhMIDI.py", "requirements.txt"):
        Path(folder, name).unlink(missing_ok=True)
        Path(folder, name).symlink_to(NOTEBOOK.parent / name)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()

    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size:,} bytes; data and runs are in {folder}")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
