"""What the pages tell people to type works."""

import glob
import re
import shlex
from pathlib import Path

import pytest
from conftest import QUICK

from flowtilt.cli import main, parser
from flowtilt.config import load_recipe, recipe_names
from flowtilt.io.files import read_lines

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_the_page_on_rewards_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guides" / "add-a-reward.md"
    code, command = blocks(page, "python")[0], blocks(page, "bash")[0].strip()
    name = re.match(r"# (\S+)", code)
    assert name
    Path(name[1]).write_text(code)
    words = shlex.split(command)[1:]
    assert main([*words, *QUICK, "rollouts=1", "run=run"]) == 0
    record = read_lines(Path("run/metrics.jsonl"))[0]
    assert record["reward/total"] == pytest.approx(record["reward/brightness"]) and "reward/playground" not in record
    assert set(read_lines(Path("run/evaluations.jsonl"))[0]["rewards"]) == {"brightness"}


def test_the_readmes_commands_run_one_after_another(tmp_path, monkeypatch):
    """Those of the quick start and of one's own reward, in a folder where `make train` has been; training is cut down to a second."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "playground-fast", *QUICK]) == 0
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Ten lines of Python")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    Path("my_reward.py").write_text(code)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if "flowtilt " in line]
    for line in lines:
        words = [word for raw in shlex.split(line, comments=True) for word in (sorted(glob.glob(raw)) if "*" in raw else [raw])][1:]
        cut = QUICK if words[0] == "train" and "--resume" not in words else []
        assert main([*words, *cut]) == 0, line
    assert len(lines) == 7 and Path("runs/playground-fast/evaluation/report.html").is_file()


def test_the_pages_reward_with_a_model_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guides" / "add-a-reward.md"
    code = next(code for code in blocks(page, "python") if code.startswith("# sharpness.py"))
    recipe = blocks(page, "toml")[0]
    name = re.match(r"# (\S+)", code)
    assert name
    Path(name[1]).write_text(code)
    Path("mine.toml").write_text(f'base = "playground"\n{recipe}[evaluate]\nrewards = ["sharpness/contrast"]\n')
    assert main(["train", "mine.toml", *QUICK, "rollouts=1", "run=run"]) == 0
    record = read_lines(Path("run/metrics.jsonl"))[0]
    assert record["reward/total"] == pytest.approx(0.5 * record["reward/sharpness"]) and "reward/sharpness/contrast" in record
    assert read_lines(Path("run/evaluations.jsonl"))[0]["score"] == pytest.approx(
        read_lines(Path("run/evaluations.jsonl"))[0]["rewards"]["sharpness/contrast"]
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_the_command_line_knows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):  # a file that the page's commands name
            Path(name[1]).write_text(code)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["flowtilt"]:
                args = parser().parse_args(words[1:])
                if args.command == "train" and args.recipe and not args.resume and not args.recipe.endswith(".toml"):
                    load_recipe(args.recipe, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        path = target[0] or target[1]
        if not path.startswith("http"):
            assert (page.parent / path).exists(), path


def test_the_page_of_papers_names_every_recipe_and_files_that_speak_of_their_paper():
    page = (ROOT / "docs" / "reference" / "papers.md").read_text(encoding="utf-8")
    families = ("sd35m", "playground", "flux", "qwen", "z-image", "sana")
    assert {name for name in re.findall(r"`([a-z0-9-]+)`", page) if name.startswith(families)} == set(recipe_names())
    for row in re.findall(r"^\| .*arxiv.*", page, re.M):
        papers, file = re.findall(r"arxiv\.org/abs/([\d.]+)", row), re.findall(r"`([\w/.]+)`", row.split("|")[2])[0]
        path = ROOT / "src" / "flowtilt" / file
        found = path if path.is_file() else path.parent / f"{path.name.partition('.')[0]}.py"
        text = found.read_text(encoding="utf-8")
        assert papers and all(paper in text for paper in papers), row
        if not path.is_file():
            assert f"def {path.name.partition('.')[2]}(" in text


def test_every_page_that_the_code_names_is_there():
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.toml")]:
        for name in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path}: {name}"
