"""Results in a notebook: executed in a kernel, each shows a table or a picture and not its tensors."""

import html
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PROBLEM = """
import torch
import deepspectra as ds
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
problem = ds.Problem(net, (torch.randn(60, 4), torch.arange(60) % 3))
H = ds.Hessian(problem)
parts = ds.decompose(problem, effects="two-way")
"""
SHOWN = {  # what is asked for, and words of what is seen
    "ds.eigenpairs(H, 3)": "error of λ",
    "ds.trace(H, 8)": "standard error",
    "ds.density(H, 2, 8)": "Hessian",
    "ds.attribute(H, parts)": "bulk's edge",
    "ds.layers(problem)": "features and errors",
    "ds.gram_spectrum(problem)": "class",
    "ds.kronecker_quality(problem)": "errors relative to G's block",
    "ds.analyze(problem, num_probes=1, num_steps=4, progress=False)": "<svg",
}


@pytest.mark.filterwarnings("ignore")  # of the kernel's own, and its event loop's
def test_every_result_shows_itself():
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (PROBLEM, *SHOWN)])
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    for (code, words), cell in zip(SHOWN.items(), book.cells[1:], strict=True):
        (found,) = (output.data for output in cell.outputs if output.output_type == "execute_result")
        assert words in html.unescape(found["text/html"]), code
        assert len(found["text/plain"]) < 200, code
        assert "tensor(" not in found["text/html"]
        assert re.search(r"<(pre|svg)", found["text/html"]), code
