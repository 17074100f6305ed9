"""pytest from a notebook: its kernel has threads and has run things, so ranks are not forked from it."""

import os
import textwrap

import pytest

from tests.ranks.inner import HEADER, LOAD, ROOT

jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

CELL = f"""
import torch, pytest
torch.ones(64, 64) @ torch.ones(64, 64)
code = pytest.main(["-q", "-o", "rank_preload=", *{LOAD!r}, "test_inner.py"])
print("code", int(code))
"""


def test_two_ranks_run_from_a_notebook(tmp_path, monkeypatch):
    (tmp_path / "test_inner.py").write_text(HEADER + textwrap.dedent("def test_x(ranks): assert reduce()[0] == 2"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    said = []

    def listen(message):
        said.append(message["content"].get("text", "") or "\n".join(message["content"].get("traceback", [])))

    manager, client = jupyter_client.manager.start_new_kernel(cwd=tmp_path, env=dict(os.environ))
    try:
        client.execute_interactive(CELL, timeout=120, output_hook=listen)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "1 passed" in "".join(said), "".join(said)
    assert "code 0" in "".join(said)
