"""What the README and the documents show runs."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import deepspectra as ds
from deepspectra.cli import app

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
PAGES = [
    DOCS / "index.md",
    DOCS / "tutorial.md",
    DOCS / "coming-from.md",
    DOCS / "gallery.md",
    DOCS / "planning.md",
    *sorted((DOCS / "howto").glob("*.md")),
]
PICTURE = re.compile(r"!\[[^]]*\]\((gallery/[^)]+)\)")
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.S | re.M)


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<!-- executed by tests/test_docs.py -->\n```python\n(.*?)```", README.read_text(), re.S)
    assert "per_class=30" in code
    exec(compile(code.replace("per_class=30", "per_class=10"), str(README), "exec"), {})  # in a third of the time
    assert "outlier" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow  # `make docs` runs them
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_documents_runs(page, tmp_path, monkeypatch):
    """Its blocks in their order, in one folder; Python shares its names, commands are those of the shell."""
    text = page.read_text()
    for needed in re.findall(r"^import (transformers|curvlinops|matplotlib)", text, re.M):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed; `make docs` installs it")
    (tmp_path / "gallery").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    for kind, code in BLOCK.findall(text):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            assert words[:2] == ["$", "deepspectra"], line
            outcome = CliRunner().invoke(app, words[2:])
            assert outcome.exit_code == 0, f"{line}\n{outcome.output}\n{outcome.exception!r}"
    with contextlib.suppress(KeyError):
        del sys.modules["mine"]
    pictures = PICTURE.findall(text)
    for name in pictures:
        assert (tmp_path / name).stat().st_size > 1000, name
        if os.environ.get("DEEPSPECTRA_DRAW"):  # `make docs`
            shutil.copy(tmp_path / name, DOCS / name)


def test_every_saved_variable_is_documented(tmp_path):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    problem = ds.Problem(torch.nn.Linear(4, 3), (x, torch.arange(40) % 3))
    saved = ds.analyze(problem, num_probes=1, num_steps=4, progress=False).dataset
    text = (README.parent / "docs" / "file-format.md").read_text()
    for name in (*saved.data_vars, *saved.coords, *saved.attrs):
        assert f"`{name}`" in text, f"{name} is saved and not described"
