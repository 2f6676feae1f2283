"""What the README shows runs."""

import re
from pathlib import Path

import torch

import deepspectra as ds

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"<!-- executed by tests/test_docs.py -->\n```python\n(.*?)```", README.read_text(), re.S
    )
    exec(compile(code, str(README), "exec"), {})
    assert "outlier" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()


def test_every_saved_variable_is_documented(tmp_path):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    problem = ds.Problem(torch.nn.Linear(4, 3), (x, torch.arange(40) % 3))
    saved = ds.analyze(problem, num_probes=1, num_steps=4, progress=False).dataset
    text = (README.parent / "docs" / "file-format.md").read_text()
    for name in (*saved.data_vars, *saved.coords, *saved.attrs):
        assert f"`{name}`" in text, f"{name} is saved and not described"
