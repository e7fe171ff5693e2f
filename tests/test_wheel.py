"""What pip installs from a built wheel: the whole library with the playground's weights inside."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import QUICK

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a source distribution and a wheel."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--sdist", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_the_wheel_is_small_and_holds_weights_recipes_and_the_reports_style(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for inside in (
        "playground/weights/model_index.json",
        "recipes/playground.toml",
        "recipes/sd35m-geneval.toml",
        "report/page.css",
        "report/page.js",
        "report/evaluation.css",
        "report/compare.css",
        "py.typed",
    ):
        assert f"flowtilt/{inside}" in names
    assert sum(name.endswith(".safetensors") for name in names) == 5
    assert wheel.stat().st_size < 10 * 2**20
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_first_run_works_from_the_wheel_alone(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    inside = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    where = [sys.executable, "-c", "import flowtilt; print(flowtilt.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, env=inside, cwd=tmp_path)
    assert found.stdout.startswith(str(tmp_path / "site")), found
    command = [sys.executable, "-m", "flowtilt", "train", "playground", *QUICK, "rollouts=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=inside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout and "->" in done.stdout and "runs/playground/report.html" in done.stdout
    assert (tmp_path / "runs" / "playground" / "report.html").is_file()
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert all(line.startswith(("runs/playground: its page is ", "after ", "1/1")) for line in lines), lines  # no library greets


def test_the_source_distribution_has_every_file_of_the_repository(built):
    """Above all those that its own tests and pages read."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {".ci/run", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "README.md", "constraints.txt"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "examples").iterdir() if path.is_file()} <= names
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            assert path.is_dir() or str(path.relative_to(ROOT)) in names, target
    named = re.search(r"sdist\]\ninclude = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert named and all((ROOT / name).exists() for name in re.findall(r'"(.*?)"', named[1]))
