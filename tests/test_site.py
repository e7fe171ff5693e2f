"""What the documentation site is made of: generated pages are whole, figures and the README's scores are those of the results."""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pytest

from flowtilt.cli import parser
from flowtilt.config import known_keys, recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def tools():
    sys.path.insert(0, str(ROOT / "docs" / "tools"))
    yield
    sys.path.remove(str(ROOT / "docs" / "tools"))


def test_generated_pages_have_every_key_recipe_command_and_option():
    import reference

    keys, recipes, commands, api = reference.pages().values()
    for key in known_keys():
        assert f"| `{key.name.rpartition('.')[2]}` |" in keys, key.name
    assert re.findall(r"^## (\S+)$", recipes, re.M) == recipe_names()
    named = next(action.choices for action in parser()._actions if action.dest == "command")
    assert named and re.findall(r"^## flowtilt (\S+)$", commands, re.M) == list(named)
    options = {option for command in named.values() for action in command._actions for option in action.option_strings[-1:]}
    assert all(option in commands for option in options - {"--help"})
    assert "::: flowtilt.training.trainer.Trainer" in api


def test_links_leave_the_site_only_for_copies_and_formulas_outside_of_code_become_mathml(tmp_path, monkeypatch):
    pytest.importorskip("latex2mathml")
    import site_builder as site

    monkeypatch.setattr(site, "STAGED", tmp_path)
    text = "$x_t$ and `$not$` [a](../reference/metrics.md#rewards) [b](../../examples/minimal.py) [c](https://example.com)"
    site.write(Path("explain/page.md"), text, ROOT / "docs" / "explain")
    page = (tmp_path / "explain" / "page.md").read_text()
    assert "<math" in page and "`$not$`" in page and "$x_t$" not in page
    assert "](../reference/metrics.md#rewards)" in page and "](https://example.com)" in page
    assert "](../files/examples/minimal.py)" in page and (tmp_path / "files" / "examples" / "minimal.py").is_file()


def test_figures_are_those_of_the_results():
    import figures

    for name, lines in figures.figures().items():
        assert (ROOT / "docs" / "images" / "methods" / f"{name}.svg").read_text() == figures.svg(lines), name


def test_the_readmes_scores_are_those_of_the_comparison():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| .*?`playground(?:-(\w+|grpo-fast))?` \|.*\| (\.\d+) \|$", text, re.M)
    named = re.findall(r"\(`playground-(\w+)` (\.\d+)\)", text)
    assert len(named) == 5
    told = {method or "nft": score for method, score in [*rows, *named]}
    scores: dict[str, list[float]] = {}
    for entry in json.loads((ROOT / "benchmarks" / "results" / "head_to_head.json").read_text())["entries"]:
        scores.setdefault(entry["method"], []).append(entry["final_score"])
    measured = {method: f"{median(own):.3f}".removeprefix("0") for method, own in scores.items()}
    assert told == {method: measured[method] for method in told} and told["nft"] == ".925"


def test_published_versions_have_folders_a_menu_and_an_entry(tmp_path):
    import publish

    site, pages = tmp_path / "site", tmp_path / "pages"
    site.mkdir()
    pages.mkdir()
    (site / "index.html").write_text("first")
    assert [publish.publish(site, pages, ref) for ref in ("main", "v0.2.1", "v0.10.0", "v0.2.2")] == ["dev", "0.2", "0.10", "0.2"]
    menu = json.loads((pages / "versions.json").read_text())
    assert [(entry["version"], entry["aliases"]) for entry in menu] == [("0.10", ["latest"]), ("0.2", []), ("dev", [])]
    assert "0.10/index.html" in (pages / "index.html").read_text() and (pages / "0.2" / "index.html").read_text() == "first"
