"""Puts the built site into a folder of all versions: `python docs/tools/publish.py PAGES REF`.

REF is a tag (v0.2.1 becomes version 0.2, and "latest") or a branch (becomes "dev"). PAGES gets the layout of mike, which the version
menu reads: a folder per version, versions.json, and an index.html that leads to the newest.
"""

import json
import re
import shutil
import sys
from pathlib import Path

SITE = Path(__file__).parents[2] / "build" / "site"


def publish(site: Path, pages: Path, ref: str) -> str:
    """Copies `site` to its version's folder in `pages`; returns the version."""
    tag = re.fullmatch(r"v(\d+\.\d+)\.\d+", ref)
    version = tag[1] if tag else "dev"
    shutil.rmtree(pages / version, ignore_errors=True)
    shutil.copytree(site, pages / version)
    file = pages / "versions.json"
    known = {entry["version"]: entry for entry in json.loads(file.read_text())} if file.is_file() else {}
    known[version] = {"version": version, "title": version, "aliases": []}
    released = sorted((name for name in known if name != "dev"), key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    for name, entry in known.items():
        entry["aliases"] = ["latest"] if released[:1] == [name] else []
    file.write_text(json.dumps([known[name] for name in [*released, *(["dev"] if "dev" in known else [])]], indent=1))
    newest = released[0] if released else "dev"
    (pages / "index.html").write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={newest}/index.html">\n')
    (pages / ".nojekyll").touch()
    return version


if __name__ == "__main__":
    print(publish(SITE, Path(sys.argv[1]), sys.argv[2]))
