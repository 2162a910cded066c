"""`snapfusion serve MODEL...` over HTTP: its images, its events, what it refuses, and the command line."""

import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image
from served_app import Client, png, served, served_model

from jobs import generate, serve
from jobs.evaluation.generators import load_programs
from jobs.serving import loopback
from jobs.serving.image_request import MAX_BODY_BYTES, Limits
from jobs.serving.served_models import ServedPrograms
from snapfusion.export import installed

LIMITS = Limits(steps=2_000, waiting=1)
FOLDED = {"steps": 2, "sampler": "ddim", "cfg_range": {"low": 1.0, "high": 1.0}}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def client(tiny_teacher, mobile_model):
    """Of a teacher, and of a student whose guidance is in its weights."""
    teacher = served_model(tiny_teacher, limits=LIMITS)
    student = served_model(mobile_model, limits=LIMITS, distillation=FOLDED)
    with served([teacher, student], limits=LIMITS) as url:
        yield Client(url)


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(png(event)))).astype(int)


def test_an_image_is_the_file_that_generate_writes(client, tiny_teacher, tmp_path):
    words = ["--steps", "2", "--seed", "3", "--guidance", "2", "--negative", "re", "--sampler", "dpm++"]
    file = tmp_path / "a.png"
    assert generate.main(["red", "--model", tiny_teacher, *words, "--size", "24", "--out", str(file)]) == 0
    options = {"name": tiny_teacher, "steps": 2, "guidance": 2, "sampler": "dpm++"}
    request = {"caption": "red", "negative": "re", "seed": 3, "size": 24, "models": [options]}
    status, answer = client.post(request)
    assert status == 200
    (image,) = answer["images"]
    assert png(image) == file.read_bytes()
    assert (image["size"], image["flagged"], image["difference"]) == (24, False, None)


def test_models_are_compared_with_the_first(client, tiny_teacher, mobile_model):
    models = [{"name": tiny_teacher, "steps": steps} for steps in (2, 3, 2)]
    _, answer = client.post({"caption": "red", "models": [*models, {"name": mobile_model}]})
    first, other, same, student = answer["images"]
    assert same["difference"] == {"to": 0, "largest": 0, "psnr_db": None}
    squares = (pixels(first) - pixels(other)) ** 2
    assert other["difference"]["largest"] == np.sqrt(squares.max())
    assert other["difference"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / squares.mean()))
    assert (student["steps"], student["guidance"]) == (2, 1.0)
    assert all(image["seconds"] > 0 for image in answer["images"])


def test_all_models_generate_unless_some_are_named(client, tiny_teacher, mobile_model):
    with client.stream({"caption": "red", "models": []}) as events:
        waiting = next(event for event in events if event["event"] == "step")
    assert (waiting["model"], waiting["steps"]) == (tiny_teacher, 50)


def test_each_step_is_an_event(client, tiny_teacher):
    client.settled()
    request = {"caption": "red red", "models": [{"name": tiny_teacher, "steps": 3}] * 2}
    with client.stream(request) as events:
        seen = [(event["event"], event.get("number"), event.get("step")) for event in events]
    steps = [[("step", number, step) for step in (1, 2, 3)] + [("image", number, None)] for number in (0, 1)]
    assert seen == [("begun", None, None), *steps[0], *steps[1], ("done", None, None)]


def test_notes_say_what_is_unusual(client, mobile_model):
    request = {"caption": "red " * 40, "models": [{"name": mobile_model, "steps": 3}]}
    (image,) = client.post(request)[1]["images"]
    assert image["notes"][0].startswith("distilled for 2 steps of ddim at guidance 1 to 1; this is 3 of ddim")
    assert image["notes"][1].startswith("the caption has 40 tokens")


def test_an_image_that_is_not_finite_is_an_error(client, mobile_model, tiny_teacher):
    models = [{"name": tiny_teacher, "steps": 1, "guidance": 100.0}, {"name": mobile_model}]
    broken = served_model(tiny_teacher)
    for weight in broken.loaded.bundle.unet.conv_out.parameters():
        weight.fill_(3e38)
    with served([broken, served_model(mobile_model, distillation=FOLDED)]) as url:
        status, answer = Client(url).post({"caption": "red", "models": models})
        failed, image = answer["images"]
        assert (status, failed["event"], image["event"]) == (200, "failed", "image")
        assert failed["error"].startswith(f"{tiny_teacher}: an image has values that are NaN")
        assert image["difference"] is None
        assert Client(url).post({"caption": "red", "models": models[:1]})[0] == 500


def test_models_are_listed_with_their_bounds(client, tiny_teacher, mobile_model):
    status, answer = client.get("/api/models")
    teacher, student = answer["models"]
    assert status == 200
    assert (teacher["name"], teacher["steps"], teacher["max_steps"]) == (tiny_teacher, 50, 2_000)
    assert (teacher["image_size"], teacher["max_size"], teacher["granularity"]) == (16, 32, 4)
    assert (teacher["guidance"], teacher["guidance_is_fixed"]) == (2.5, False)
    assert (student["name"], student["steps"]) == (mobile_model, 2)
    assert (student["guidance"], student["guidance_is_fixed"]) == (1.0, True)
    assert answer["limits"]["body_bytes"] == MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"name": "other"}]}, "models.0: no 'other'; {teacher}, {student} is served"),
        ({"models": [{"name": "{teacher}", "steps": 2_001}]}, "models.0: {teacher}: steps 2001: 1 to 2000"),
        ({"models": [{"name": "{teacher}", "steps": 0}]}, "models.0.steps: Input should be greater than"),
        (
            {"models": [{"name": "{teacher}", "steps": 1_001}]},
            "models.0: {teacher}: steps 1001: num_steps is",
        ),
        ({"models": [{"name": "{teacher}", "sampler": "x"}]}, "models.0.sampler: Input should be 'ddim', "),
        ({"models": [{"name": "{teacher}", "guidance": 0.5}]}, "models.0.guidance: Input should be greater"),
        ({"models": [{"name": "{teacher}"}] * 9}, "models: Tuple should have at most 8 items"),
        ({"size": 18}, "models.0: {teacher}: size is 18; multiples of 4 are accepted"),
        ({"size": 36}, "models.0: {teacher}: size 36: at most 32 is accepted"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**53}, "seed: Input should be less than or equal to"),
        ({"seed": "3"}, "seed: Input should be a valid integer"),
        ({"caption": ""}, "caption: String should have at least 1 character"),
        ({"caption": "x" * 2_001}, "caption: String should have at most 2000 characters"),
        ({"caption": "\ud800"}, "ImageRequest: Invalid JSON"),
        ({"steps": 4}, "steps: no such setting"),
        (
            {"models": [{"name": "{student}", "guidance": 3}]},
            "models.0: {student}: guidance 3: its teacher's guidance is in the weights of this student",
        ),
        (
            {"models": [{"name": "{student}"}], "negative": "blue"},
            "models.0: {student}: negative 'blue': this model takes none at guidance 1",
        ),
        (b"[" * 60_000, "the body is no JSON: "),
        (b"\xff", "the body is no JSON: "),
        (b"[1]", "the body is [1]; a JSON object is accepted"),
    ],
)
def test_a_wrong_request_is_one_line(change, message, client, tiny_teacher, mobile_model):
    def named(text):
        return text.replace("{teacher}", tiny_teacher).replace("{student}", mobile_model)

    body = change
    if isinstance(change, dict):
        body = json.loads(named(json.dumps({"caption": "red", **change})))
    status, answer = client.post(body)
    assert status == 400
    assert answer["error"].startswith(named(message))
    assert "\n" not in answer["error"]


def test_a_large_body_is_refused_and_answered(client):
    status, answer = client.post(b'{"caption": "' + b"x" * 10_000_000 + b'"}')
    assert (status, answer["error"]) == (
        413,
        f"a body of 10000015 bytes: at most {MAX_BODY_BYTES} are accepted",
    )


def test_other_hosts_and_their_pages_are_refused(client):
    assert client.post({"caption": "red"}, Host="evil.example:80")[0] == 400
    status, answer = client.send("POST", "/api/images", b"{}", {"Content-Type": "text/plain"})
    assert (status, answer["error"]) == (415, "content-type text/plain: application/json is accepted")
    assert client.send("OPTIONS", "/api/images")[0] == 405
    assert client.get("/api/images")[0] == 405
    assert client.get("/../../etc/passwd")[0] == 404
    assert client.get("/compare.html")[0] == 404


def test_the_queue_is_bounded_and_freed_by_who_leaves(client, tiny_teacher):
    before = client.settled()
    long = {"caption": "red", "models": [{"name": tiny_teacher, "steps": 1_000}]}
    with client.stream(long) as running:
        next(event for event in running if event["event"] == "step")
        with client.stream(long) as second:
            assert next(second) == {"event": "waiting", "ahead": 1}
            status, answer = client.post(long)
            assert (status, answer["error"]) == (
                503,
                "--max-waiting 1: as many requests wait already; try again later",
            )
    after = client.settled()
    changes = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changes == {"left": 2, "refused": 1}


def test_a_bundle_generates_beside_a_model(mobile_bundle, tiny_teacher, tmp_path):
    file, bundle = tmp_path / "a.png", str(mobile_bundle)
    assert generate.main(["red", "--bundle", bundle, "--guidance", "3", "--out", str(file)]) == 0
    programs = ServedPrograms(loaded=load_programs(bundle, variant=None))
    with served([served_model(tiny_teacher), programs]) as url:
        client = Client(url)
        models = [{"name": tiny_teacher, "steps": 2}, {"name": bundle, "guidance": 3}]
        _, answer = client.post({"caption": "red", "models": models})
        assert png(answer["images"][1]) == file.read_bytes()
        assert answer["images"][1]["difference"]["largest"] > 0
        facts = client.get("/api/models")[1]["models"][1]
        assert (facts["runtime"], facts["steps"], facts["samplers"]) == (
            "ExecuTorch, executorch",
            3,
            ["ddim"],
        )
        _, answer = client.post({"caption": "red", "models": [{"name": bundle, "steps": 4}]})
        assert answer["error"] == (
            f"models.0: {bundle}: steps 4: a bundle has its own, compiled into it; leave it out"
        )


def test_the_command_serves_until_it_is_ended(tiny_teacher, monkeypatch, capsys):
    servers, real = [], loopback.uvicorn_server
    monkeypatch.setattr(loopback, "uvicorn_server", lambda app: servers.append(real(app)) or servers[0])
    codes = []
    command = threading.Thread(
        target=lambda: codes.append(serve.main([tiny_teacher, "--port", "0", "--max-steps", "7"]))
    )
    command.start()
    while not servers:
        time.sleep(0.01)
    line = capsys.readouterr().out.splitlines()[-1]
    url, _, rest = line.partition(" ")
    assert rest == f"generates by {tiny_teacher}; Ctrl-C ends it"
    assert Client(url).get("/api/models")[1]["models"][0]["max_steps"] == 7
    servers[0].should_exit = True
    command.join()
    assert codes == [0]


def refused(words, capsys):
    assert serve.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_port_in_use_is_one_line_before_models_load(tiny_teacher, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused([tiny_teacher, "--port", str(port)], capsys)
    assert line == f"serve: --port {port}: address already in use; give another, or 0 for any free one"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "serve: give a MODEL, such as mini, to compare models, or --bundle DIR for its page"),
        ("/nowhere --port 0", "serve: MODEL /nowhere: "),
        ("mini --bundle /nowhere --port 0", "serve: --bundle /nowhere"),
        ("mini --device abacus --port 0", "serve: --device abacus: "),
        ("mini --onnxruntime-web dist", "serve: --onnxruntime-web: it has an effect without MODEL only"),
        ("--bundle b --max-steps 3", "serve: --max-steps: it has an effect with MODEL only"),
        ("--bundle b --no-safety-checker", "serve: --no-safety-checker: it has an effect with MODEL only"),
    ],
)
def test_a_wrong_command_is_one_line(words, message, capsys):
    assert refused(words.split(), capsys).startswith(message)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(installed, "_is_installed", lambda package: package != "uvicorn")
    assert refused(["mini"], capsys) == (
        "serve: uvicorn is not installed; install snapfusion-ray[serve], in a checkout by "
        "pip install -c infra/constraints.txt -e '.[serve]'"
    )
