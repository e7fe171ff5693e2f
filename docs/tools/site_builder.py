"""Builds the documentation site: `make docs`, or `python docs/tools/site_builder.py`. The site is in build/site and opens from disk.

Pages are staged in build/docs: the README as the first page, the pages of docs/, and those that `reference` generates from the code.
On the way formulas become MathML, and links to files outside of docs/ become links to copies. Nothing is loaded from a network.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
STAGED, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`|<!--.*?-->)", re.S | re.M)
BLOCK, INLINE = re.compile(r"\$\$(.+?)\$\$", re.S), re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")
LINK = re.compile(r"(\]\(|src=\")([^)\"#\s]+)((?:#[^)\"\s]*)?[)\"])")
WORKER = "https://unpkg.com/iframe-worker/shim"


def main() -> int:
    """Builds the site; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", action="store_true", help="stop before the pages become HTML")
    args = parser.parse_args()
    stage()
    if args.stage:
        return 0
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=ROOT)
    if built.returncode == 0:
        for page in SITE.rglob("*.html"):
            up = "/".join([".."] * (len(page.relative_to(SITE).parts) - 1)) or "."
            page.write_text(page.read_text(encoding="utf-8").replace(WORKER, f"{up}/assets/worker.js"), encoding="utf-8")
        print(f"{SITE / 'index.html'}")
    return built.returncode


def stage() -> None:
    """Fills build/docs."""
    import reference

    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGED, ignore=shutil.ignore_patterns("tools", "*.md"))
    for page in sorted((ROOT / "docs").rglob("*.md")):
        write(page.relative_to(ROOT / "docs"), page.read_text(encoding="utf-8"), page.parent)
    write(Path("index.md"), "---\nhide: [navigation]\n---\n" + (ROOT / "README.md").read_text(encoding="utf-8"), ROOT)
    write(Path("changelog.md"), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), ROOT)
    for name, text in reference.pages().items():
        write(Path(name), text, ROOT / "docs" / Path(name).parent)


def write(name: Path, text: str, home: Path) -> None:
    """Writes one staged page whose links are relative to `home`."""
    staged = STAGED / name
    staged.parent.mkdir(parents=True, exist_ok=True)
    parts = [part if number % 2 else formulas(links(part, name, home)) for number, part in enumerate(CODE.split(text))]
    staged.write_text("".join(parts), encoding="utf-8")


def links(text: str, name: Path, home: Path) -> str:
    """Links to files of docs/ stay inside the site; other files of the repository are copied to files/."""

    def follow(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (home / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            there = path.relative_to(ROOT / "docs")
        elif path == ROOT / "README.md" or path == ROOT / "CHANGELOG.md":
            there = Path("index.md" if path.name == "README.md" else "changelog.md")
        else:
            path = path / "README.md" if path.is_dir() else path
            there = Path("files") / path.relative_to(ROOT)
            if there.suffix == ".md":  # read as it is, not as a page of the site
                there = there.with_suffix(".txt")
            (STAGED / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, STAGED / there)
        return match[1] + Path(*[".."] * (len(name.parts) - 1), there).as_posix() + match[3]

    return LINK.sub(follow, text)


def formulas(text: str) -> str:
    """$...$ and $$...$$ as MathML, which browsers show without a script."""
    text = BLOCK.sub(lambda match: f"\n\n{mathml(match[1], 'block')}\n\n", text)
    # in a span, since a line that begins with <math> would be a block of its own
    return INLINE.sub(lambda match: f'<span class="math">{mathml(match[1], "inline")}</span>', text)


def mathml(latex: str, display: str) -> str:
    """One formula on one line."""
    return convert(" ".join(latex.split()), display=display).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")


if __name__ == "__main__":
    sys.exit(main())
