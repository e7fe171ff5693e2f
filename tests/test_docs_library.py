"""docs/guides/library.md: its code runs as it stands, in one process, block after block."""

import pytest
from test_docs import ROOT, blocks

import flowtilt as ft
from flowtilt.io.files import read_lines


def test_the_pages_code_runs_block_after_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, *others = blocks(ROOT / "docs" / "guides" / "library.md", "python")
    compile(first, "library.md", "exec")  # twenty rollouts; the others have its calls with few
    space = {"ft": ft}
    for code in others:
        exec(code, space)
    assert len(read_lines(tmp_path / "runs" / "red" / "metrics.jsonl")) == 4  # resumed
    assert (tmp_path / "runs" / "playground" / "summary.json").is_file() and (tmp_path / "runs" / "playground-2" / "report.html").is_file()
    assert (tmp_path / "latest.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "mine" / "pytorch_lora_weights.safetensors").is_file()
    assert "'before'" in capsys.readouterr().out


def test_the_pages_cell_that_is_run_twice_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "red").mkdir(parents=True)
    (tmp_path / "runs" / "red" / "recipe.toml").write_text("")
    code = next(code for code in blocks(ROOT / "docs" / "guides" / "library.md", "python") if 'run="runs/red"' in code)
    with pytest.raises(ft.UserError, match=r"run runs/red: not empty; go on with"):
        exec(code, {"ft": ft})
