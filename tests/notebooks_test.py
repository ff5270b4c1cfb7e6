"""The notebooks run from top to bottom, with fewer epochs."""

import os
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parent.parent / 'notebooks').glob('*.ipynb')
)


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, data_dir, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = nbformat.read(path, as_version=4)
  assert not any(c.get('outputs') for c in notebook.cells)
  for cell in notebook.cells:
    cell.source = cell.source.replace('EPOCHS = 15', 'EPOCHS = 1')
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute(env=dict(os.environ))
  text = str(notebook.cells)
  assert '80 % pruned, int8' in text and 'image/png' in text
