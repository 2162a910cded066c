"""`snapfusion serve` under load: its rate beside a bare loop, and 500 requests of which some clients leave.

pytest -m slow --capture=no tests/jobs/serving/test_serve_load.py
"""

import contextlib
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_app import Client, png, served, served_model

ROOT = Path(__file__).parents[3]
CLIENTS, IMAGES, STEPS, TURNS = 4, 24, 4, 5
LEAST_RATIO = 0.8
REQUESTS, LEAVING = 500, 0.5
MOST_GROWTH = 16 * 2**20
"""Bytes of memory, between the 100th request and the last."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]

LOOP = """
import sys, time
from types import SimpleNamespace
from jobs.evaluation.generators import load_model
model = load_model("mini", device="cpu", check_safety=True)
options = dict(steps={steps}, sampler=None, guidance=None, size=None, negative="", image=None)
generator = model.generator(SimpleNamespace(**options))
generator.images("a small red circle at the top on a white background", seed=0, count=1)
for line in sys.stdin:
    began = time.perf_counter()
    for seed in range({images}):
        generator.images("a small red circle at the top on a white background", seed=seed, count=1)
    print(time.perf_counter() - began, flush=True)
"""
"""Generates the images of a turn when it is given a line, and prints the seconds."""
CAPTION = "a small red circle at the top on a white background"


@contextlib.contextmanager
def command(*words):
    """A process of the command, and the address that it prints."""
    arguments = [sys.executable, "-m", "jobs.serve", *words, "--port", "0"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("http://"))
            yield process, line.split()[0]
        finally:
            process.terminate()


def seconds_by_clients(url):
    """Seconds in which four clients have all images of a turn."""
    client = Client(url)

    def request(seed):
        models = [{"name": "mini", "steps": STEPS}]
        status, _ = client.post({"caption": CAPTION, "seed": seed, "models": models})
        assert status == 200

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(request, range(IMAGES)))
    return time.perf_counter() - began


def test_four_clients_have_images_at_the_rate_of_a_loop():
    program = LOOP.format(steps=STEPS, images=IMAGES)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        command("mini") as (_, url),
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as loop,
    ):
        seconds_by_clients(url)
        served_seconds, bare_seconds = [], []
        for _ in range(TURNS):
            served_seconds.append(seconds_by_clients(url))
            loop.stdin.write("\n")
            loop.stdin.flush()
            bare_seconds.append(float(loop.stdout.readline()))
        loop.stdin.close()
    ratios = [bare / ours for bare, ours in zip(bare_seconds, served_seconds, strict=True)]
    rates = [IMAGES / statistics.median(seconds) for seconds in (served_seconds, bare_seconds)]
    print(
        f"\n{CLIENTS} clients: {rates[0]:.1f} images/s, bare loop: {rates[1]:.1f}, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {TURNS} turns)"
    )
    assert statistics.median(ratios) >= LEAST_RATIO


def resident_bytes(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def test_500_requests_with_clients_that_leave(tiny_teacher):
    with served([served_model(tiny_teacher)]) as url:
        expected = [png(images_of(Client(url), tiny_teacher, seed)) for seed in range(10)]
    resident, answered, lock = {}, [0, 0], threading.Lock()
    with command(tiny_teacher) as (process, url):
        client = Client(url)

        def request(number):
            draw = random.Random(number)
            if draw.random() < LEAVING:
                leave(client, tiny_teacher, after=draw.randrange(12))
            else:
                image = images_of(client, tiny_teacher, number % 10)
                assert png(image) == expected[number % 10]
            with lock:
                answered[0] += 1
                if answered[0] in (100, REQUESTS):
                    resident[answered[0]] = resident_bytes(process)

        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(request, range(REQUESTS)))
        counts = client.settled()
    growth = resident[REQUESTS] - resident[100]
    print(
        f"\n{REQUESTS} requests: {counts}; memory after 100: {resident[100] / 2**20:.0f} MiB, "
        f"after all: {growth / 2**20:+.1f} MiB"
    )
    assert counts["finished"] + counts["left"] == REQUESTS
    assert counts["left"] > REQUESTS * LEAVING / 4
    assert growth <= MOST_GROWTH


def images_of(client, name, seed):
    status, answer = client.post({"caption": "red", "seed": seed, "models": [{"name": name, "steps": STEPS}]})
    assert status == 200
    return answer["images"][0]


def leave(client, name, *, after):
    """Go away after so many events of a request."""
    with client.stream({"caption": "red", "models": [{"name": name, "steps": STEPS}]}) as events:
        for _ in range(after):
            next(events, None)
