"""The application of `snapfusion serve MODEL...` on a free port, and a client of its JSON API."""

import base64
import http.client
import json
import threading
import time
from contextlib import closing, contextmanager

from jobs.evaluation.generators import load_model
from jobs.serving.comparison_app import comparison_app
from jobs.serving.image_request import Limits
from jobs.serving.loopback import listening, url_of, uvicorn_server
from jobs.serving.served_models import ServedModel

SECONDS = 60


def served_model(source, *, limits=None, distillation=None):
    """A model as `serve` opens it, maybe as one that was distilled."""
    loaded = load_model(source, device="cpu", check_safety=True)
    loaded.bundle.distillation = distillation
    return ServedModel(loaded=loaded, limits=limits or Limits())


@contextmanager
def served(models, *, limits=None):
    """The address at which models are served."""
    with listening(0) as server:
        url, running = url_of(server), uvicorn_server(comparison_app(models, limits=limits or Limits()))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [server]})
        thread.start()
        try:
            yield url
        finally:
            running.should_exit = True
            thread.join()


class Client:
    """Sends requests to an address, each over a connection of its own."""

    def __init__(self, url):
        self.host = url.removeprefix("http://").rstrip("/")

    def get(self, path):
        return self.send("GET", path)

    def post(self, values, path="/api/images", **headers):
        """The status, and the answer as JSON."""
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        return self.send("POST", path, body, {"Content-Type": "application/json", **headers})

    def send(self, method, path, body=None, headers=None):
        with closing(http.client.HTTPConnection(self.host, timeout=SECONDS)) as connection:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def settled(self):
        """The counts of requests when none is left that generates."""
        for _ in range(600):
            counts = self.get("/api/queue")[1]
            if not counts["generating"]:
                return counts
            time.sleep(0.05)
        raise TimeoutError(counts)

    @contextmanager
    def stream(self, values):
        """The events of a request, as they arrive; the client goes away when the body ends."""
        headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
        with closing(http.client.HTTPConnection(self.host, timeout=SECONDS)) as connection:
            connection.request("POST", "/api/images", body=json.dumps(values), headers=headers)
            with closing(connection.getresponse()) as answer:
                assert answer.status == 200
                yield (json.loads(line) for line in answer)


def png(event):
    """The file of an image."""
    return base64.b64decode(event["png"])
