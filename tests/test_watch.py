"""`flowtilt watch`: pages of runs that go on, are waited for, or ended; and the page that a run writes of itself."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("starlette")

from flowtilt.io.locks import Hold
from flowtilt.report import write_report
from flowtilt.report.watch.app import app
from flowtilt.report.watch.names import names_of


def get(application, path: str = "/", host: str = "127.0.0.1:8766") -> tuple[int, str]:
    """Status and body."""
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"scheme": "http", "server": ("127.0.0.1", 8766), "headers": [(b"host", host.encode())], "http_version": "1.1"}
    asyncio.run(application(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def log(run: Path, steps: int) -> None:
    """A run of 30 rollouts after some, evaluated every 5."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.toml").write_text('name = "mine"\nsteps = 30\nseed = 0\n')
    records = [
        {"rollout": k, "reward/total": 0.5 + 0.01 * k, "seconds": 2.0 * k, "network_evaluations": 900 * k} for k in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scored = [{"rollout": k, "score": 0.3 + 0.02 * k, "images": 8, "seconds": 2.0 * k} for k in range(0, steps + 1, 5)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in scored))


def test_a_run_is_waited_for_and_shown_as_it_goes_on_and_ends(tmp_path):
    run = tmp_path / "later"
    pages = app([run])
    assert "Waiting for" in get(pages)[1] and not run.exists()
    versions = [get(pages, "/version")[1]]
    log(run, 6)
    versions.append(get(pages, "/version")[1])
    assert "interrupted at 6 of 30 rollouts" in get(pages)[1]
    hold = Hold(run, "a training run")
    versions.append(get(pages, "/version")[1])
    status, page = get(pages)
    assert status == 200 and "running at 6 of 30 rollouts" in page and f'data-version="{versions[-1]}"' in page
    assert "connect-src 'self'" in page
    assert get(pages, "/version")[1] == versions[-1], "nothing happened"
    log(run, 7)
    versions.append(get(pages, "/version")[1])
    hold.release()
    versions.append(get(pages, "/version")[1])
    assert "interrupted at 7 of 30 rollouts" in get(pages)[1]
    assert len(set(versions)) == len(versions)


def test_several_runs_stand_side_by_side_and_each_has_its_own_page(tmp_path):
    log(tmp_path / "a" / "run", 6)
    log(tmp_path / "b" / "run", 12)
    pages = app([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"])
    page = get(pages)[1]
    assert "3 runs, side by side" in page and "2 interrupted, 1 waiting" in page
    assert all(f'<a href="{k}/">' in page for k in range(3)) and "a/run" in page and "12 of 30" in page
    assert page.count('type="radio"') == 3  # rollouts, time, network evaluations
    assert "interrupted at 12 of 30 rollouts" in get(pages, "/1/")[1]
    assert get(pages, "/3/")[0] == 404
    assert get(pages, "/1/version")[1] != get(pages, "/0/version")[1]


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1:8766", "127.0.0.1.evil.example", "["])
def test_another_name_that_points_here_is_refused_unless_all_may_read(tmp_path, host):
    log(tmp_path / "run", 1)
    assert get(app([tmp_path / "run"]), host=host)[0] == 403
    assert get(app([tmp_path / "run"], local=False), host=host)[0] == 200
    assert get(app([tmp_path / "run"]), host="localhost")[0] == 200


def test_the_page_on_disk_shows_itself_anew_only_while_a_trainer_is_at_work(tmp_path):
    log(tmp_path, 4)
    assert "data-every" not in write_report(tmp_path).read_text()
    hold = Hold(tmp_path, "a training run")
    page = write_report(tmp_path).read_text()
    assert re.search(r'<main data-touched="\d+" data-every="10">', page) and "connect-src" not in page
    assert "data-every" not in write_report(tmp_path, held=False).read_text()
    hold.release()


def test_names_are_as_long_as_they_must_be(tmp_path):
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert names_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_the_command_says_where_it_serves_and_ends_cleanly_on_ctrl_c(tmp_path):
    log(tmp_path / "run", 3)
    command = [sys.executable, "-m", "flowtilt", "watch", str(tmp_path / "run"), str(tmp_path / "later"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert url
        with urlopen(url[0] + "/0/") as answer:
            assert "interrupted at 3 of 30 rollouts" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == f"waiting for {tmp_path / 'later'}\n"
