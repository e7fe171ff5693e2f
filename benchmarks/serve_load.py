"""Load on a reward server: many clients ask at the same instant, and every answer is compared with the reward's own.

    python benchmarks/serve_load.py                 1,000 at once, none may try twice
    python benchmarks/serve_load.py --kill          the server is killed in the midst and started again; clients are patient

Clients are threads of a few processes and use what a training run uses (`flowtilt.io.web.post_json`). Server
and clients share the machine, so latencies are of everything together. Every request carries images of its
own, so that an answer to another's request would be seen.
"""

import argparse
import base64
import itertools
import json
import multiprocessing
import os
import platform
import resource
import signal
import socket
import statistics
import sys
import threading
import time
import urllib.request
from pathlib import Path

import torch

from flowtilt.io.environment import processor
from flowtilt.io.images import to_png
from flowtilt.io.web import post_json
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.serving.server import serve
from flowtilt.seeding import generator

REWARD = "jpeg_incompressibility"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flowtilt.rewards.serving.server", "flowtilt.rewards.jpeg"])


def server(port: int, max_batch: int) -> None:
    torch.set_num_threads(1)
    serve({REWARD: {}}, port=port, max_batch=max_batch)


def requests_of(seed: int, first: int, number: int, images: int, size: int) -> list[tuple[dict, list[float]]]:
    """Bodies and the scores that the reward gives here: noise on a random share of each image."""
    reward = {REWARD: load_reward(REWARD, REWARD)}
    found = []
    for i in range(first, first + number):
        rng = generator(seed, "load", i)
        noise = torch.randint(0, 256, (images, 3, size, size), generator=rng).float() / 255
        share = torch.rand(images, 1, 1, 1, generator=rng)
        pictures = torch.where(torch.arange(size) < share * size, noise, 0.5)
        pictures = (pictures * 255).round() / 255
        scores = score(reward, pictures, [Prompt("")] * images)[0][REWARD].tolist()
        files = [base64.b64encode(to_png(picture, compress_level=1)).decode() for picture in pictures]
        found.append(({"reward": REWARD, "images": files, "prompts": [{"text": f"request {i}"}] * images}, scores))
    return found


def clients(url: str, args: argparse.Namespace, first: int, number: int, begin, results) -> None:
    """`number` threads, each of which asks `--rounds` times; puts (start, end, outcome, tries) of every request."""
    torch.set_num_threads(1)
    prepared = requests_of(args.seed, first, number, args.images, args.size)
    done: list[tuple[float, float, str, bool]] = []

    def client(body: dict, expected: list[float]) -> None:
        begin.wait()
        for _ in range(args.rounds):
            waited: list[str] = []
            start = time.monotonic()
            try:
                said = post_json(f"{url}/score", body, timeout=120, patience=300 if args.kill else 0, waiting=waited.append)
                outcome = "right" if said["scores"] == expected else "wrong"
            except Exception as error:
                outcome = f"lost: {error}"
            done.append((start, time.monotonic(), outcome, bool(waited)))

    threads = [threading.Thread(target=client, args=one) for one in prepared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(done)


def watch(url: str, seen: dict[str, float], stop: threading.Event) -> None:
    """Keeps the largest number of waiting images and the last count of answers."""
    while not stop.wait(0.05):
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
                lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        except OSError:
            continue
        figures = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
        seen["waiting"] = max(seen.get("waiting", 0), figures["flowtilt_waiting_images"])
        seen["answered"] = sum(n for name, n in figures.items() if name.startswith("flowtilt_requests_total"))
        batches = figures[f'flowtilt_batch_images_count{{reward="{REWARD}"}}']
        seen["batch"] = figures[f'flowtilt_batch_images_sum{{reward="{REWARD}"}}'] / batches if batches else 0
        seen["refused"] = sum(n for name, n in figures.items() if 'status="503"' in name)


def started(port: int, max_batch: int, url: str):
    process = CONTEXT.Process(target=server, args=(port, max_batch))
    process.start()
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return process
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not answer")


def load(args: argparse.Namespace) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = started(port, args.max_batch, url)
    shares = [args.clients * k // args.processes for k in range(args.processes + 1)]
    begin, results = CONTEXT.Barrier(args.clients + 1), CONTEXT.Queue()
    groups = [
        CONTEXT.Process(target=clients, args=(url, args, low, high - low, begin, results)) for low, high in itertools.pairwise(shares)
    ]
    for group in groups:
        group.start()
    seen: dict[str, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(url, seen, stop))
    watcher.start()
    begin.wait()
    entry: dict = {}
    if args.kill:
        while seen.get("answered", 0) < args.clients * args.rounds / 3:
            time.sleep(0.01)
        entry = {"answered_before_the_kill": int(seen["answered"]), "waiting_images_before_the_kill": int(seen["waiting"])}
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        time.sleep(args.away)
        process = started(port, args.max_batch, url)
    done = [one for _ in groups for one in results.get()]
    stop.set()
    watcher.join()
    process.terminate()
    process.join()
    return entry | figures(done, args, seen) | {"server_exit_status": process.exitcode}


def figures(done: list[tuple[float, float, str, bool]], args: argparse.Namespace, seen: dict[str, float]) -> dict:
    outcomes = [outcome for *_, outcome, _ in done]
    seconds = max(end for _, end, _, _ in done) - min(start for start, *_ in done)
    latencies = sorted(end - start for start, end, *_ in done)
    cuts = statistics.quantiles(latencies, n=100)
    for reason in sorted({outcome for outcome in outcomes if outcome != "right"})[:5]:
        print(reason)
    return {
        "requests": args.clients * args.rounds,
        "right": outcomes.count("right"),
        "wrong": outcomes.count("wrong"),
        "lost": sum(outcome.startswith("lost") for outcome in outcomes),
        "unanswered": args.clients * args.rounds - len(done),
        "tried_again": sum(again for *_, again in done),
        "answers_503_since_the_last_start": int(seen.get("refused", 0)),
        "most_waiting_images_seen": int(seen.get("waiting", 0)),
        "mean_images_of_a_call": round(seen.get("batch", 0), 1),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(done) * args.images / seconds),
        "latency": {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": latencies[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client, one after the other")
    parser.add_argument("--processes", type=int, default=4, help="that the clients are spread over")
    parser.add_argument("--images", type=int, default=4, help="of a request")
    parser.add_argument("--size", type=int, default=64, help="pixels, height and width of an image")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--kill", action="store_true", help="SIGKILL after a third of the answers")
    parser.add_argument("--away", type=float, default=2.0, help="seconds before the killed server is started again")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve_load.json")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    method = "served, killed once" if args.kill else "served"
    settings = {"clients": args.clients, "rounds": args.rounds, "images": args.images, "size": args.size, "reward": REWARD}
    entry = {"method": method, "seed": args.seed} | settings | load(args)
    entry |= {
        "command": "python " + " ".join(["benchmarks/serve_load.py", *sys.argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(entry, indent=1))
    others = json.loads(args.output.read_text()) if args.output.exists() else []
    kept = [other for other in others if other["method"] != method]
    args.output.write_text(json.dumps([*kept, entry], indent=1) + "\n")
    sys.exit(entry["right"] != entry["requests"])


if __name__ == "__main__":
    main()
