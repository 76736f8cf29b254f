"""The web service: what it answers, what it refuses, and the page, over a real connection."""

import asyncio
import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
import uvicorn
from PIL import Image

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.swarm.answers import (
    DeadlineError,
    Hop,
    MissingLayersError,
    Skip,
    SwarmAnswer,
    SwarmBusyError,
    SwarmClosedError,
)
from hf_layershuffle.swarm.demonstration import LabelledInput, PacedTransport
from hf_layershuffle.swarm.request_inputs import Limits, RequestInputs
from hf_layershuffle.swarm.service import create_app
from hf_layershuffle.swarm.watched_swarm import WatchedSwarm


FOLDER = Path(ls.example_model())
DIGIT = (FOLDER / "examples" / "3.png").read_bytes()


class StandIn:
    """What the service needs of a swarm, with the model itself in the place of workers."""

    def __init__(self, model):
        self.model = model
        self.asked, self.killed, self.cancelled = [], [], []
        self.fault = None
        self.layers = list(range(len(self.model.free_layers)))
        self.without = set()  # layers
        self.is_closed = False
        self.is_held = False
        self.told = asyncio.Queue()

    def status(self):
        there = [layer for layer in self.layers if layer not in self.without]
        worker = {"name": "worker-0", "layers": there, "state": "healthy", "busy_with": None, "num_calls": 1}
        policy = {"name": "free", "max_skips": 1}
        return {"model": "m", "layers": self.layers, "policy": policy, "workers": [worker], "closed": self.is_closed}

    def prometheus(self):
        return "# TYPE swarm_answers_total counter\nswarm_answers_total 3.0\n"

    async def subscribe(self):
        while True:
            yield await self.told.get()

    async def kill_worker(self, name):
        self.killed.append(name)

    async def classify(self, inputs, *, deadline=None, max_skips=None, request_id=None):
        self.asked.append({"deadline": deadline, "max_skips": max_skips, "inputs": inputs})
        self.told.put_nowait({"type": "accepted", "request": request_id})
        if self.fault is not None:
            raise self.fault
        try:
            while self.is_held:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        order = [5, 3, 1, 0, 2]
        with torch.no_grad():
            logits = self.model(**inputs, execution_order=order).logits
        trace = [Hop(layer, "worker-0", 0.01) for layer in order]
        return SwarmAnswer(logits, order, [Skip(4, "worker-1 died")], trace, 0.05, request_id)


class Service:
    """A service that runs, and requests to it."""

    def __init__(self, port: int, swarm: StandIn, watched: WatchedSwarm):
        self.port, self.swarm, self.watched = port, swarm, watched

    def ask(self, method, path, body=None, **headers):
        """Status, headers and content, of JSON as objects."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(data) if is_json else data.decode()

    def classify(self, image: bytes = DIGIT, kind: str = "image/png", headers=None, **query):
        status, _, content = self.ask(
            "POST", f"/classify?{urlencode(query)}", image, Content_Type=kind, **headers or {}
        )
        return status, content

    def events(self, until, **headers):
        """Events from the beginning to the first of a type."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/events", headers=headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        heard = []
        for line in response:
            if line.startswith(b"data: "):
                for event in json.loads(line[6:]):
                    heard.append(event)
                    if event["type"] == until:
                        connection.close()
                        return heard
        connection.close()
        return heard


@contextmanager
def running(inputs: RequestInputs, token=None, items=(), paced=None, model=None):
    """A service on a free port, in a thread of its own."""
    ready, made, failed = threading.Event(), [], []
    # In this thread: one that a test interrupted may hold the lock of progress bars, which loading a model asks for
    model = model or load_classifier(FOLDER).eval()

    async def serve():
        swarm = StandIn(model)
        watched = WatchedSwarm(swarm, inputs.labels, items=items, rate=20.0, paced=paced)
        app = create_app(watched, inputs, token=token)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none", http="h11"))
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            if task.done():
                failed.append(task.exception() or "the server ended")
                ready.set()
                return
            await asyncio.sleep(0.01)
        made.extend([server, Service(server.servers[0].sockets[0].getsockname()[1], swarm, watched)])
        ready.set()
        while not server.should_exit:
            await asyncio.sleep(0.01)
        watched.end()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(60) and not failed, failed
    try:
        yield made[1]
    finally:
        made[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def inputs():
    limits = Limits(max_body_bytes=200_000, max_pixels=40_000, max_in_flight=2, body_timeout=0.5)
    return RequestInputs.from_pretrained(str(FOLDER), limits)


@pytest.fixture(scope="module")
def shared(inputs):
    with running(inputs) as service:
        yield service


@pytest.fixture
def service(shared):
    """The same for all tests, as new."""
    yield shared
    swarm = shared.swarm
    swarm.fault, swarm.is_held, swarm.is_closed = None, False, False
    swarm.asked.clear()
    swarm.without.clear()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def form(name: str, data: bytes, file_name: str | None = "a.png") -> tuple[bytes, str]:
    file = f'; filename="{file_name}"' if file_name else ""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
    return head + data + b"\r\n--xyz--\r\n", "multipart/form-data; boundary=xyz"


def test_an_image_is_classified_as_the_model_does(service):
    status, answer = service.classify(max_skips=1, deadline=2.5, top_k=3)
    assert status == 200 and answer["label"] == "3" and 0.5 < answer["score"] <= 1
    assert answer["scores"][0]["label"] == "3" and len(answer["scores"]) == 3
    assert sorted((each["score"] for each in answer["scores"]), reverse=True) == [s["score"] for s in answer["scores"]]
    assert answer["execution_order"] == [5, 3, 1, 0, 2] and len(answer["request_id"]) == 32
    assert answer["skipped"] == [{"layer": 4, "reason": "worker-1 died"}]
    assert answer["trace"][0] == {"layer": 5, "worker": "worker-0", "seconds": 0.01} and answer["seconds"] == 0.05
    asked = service.swarm.asked[-1]
    assert (asked["deadline"], asked["max_skips"]) == (2.5, 1)
    # What the model's evaluation makes of the file
    processor = load_image_processor(FOLDER)
    expected = processor(Image.open(io.BytesIO(DIGIT)).convert("RGB"), return_tensors="pt").pixel_values
    assert torch.equal(asked["inputs"]["pixel_values"], expected)
    body, kind = form("file", DIGIT)
    assert service.classify(body, kind)[1]["scores"][:3] == answer["scores"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of two colours, of few bytes whatever its size."""
    return encoded(Image.new("1", (width, height)))


def test_what_is_no_image_or_too_large_is_refused(service):
    cut = DIGIT[: len(DIGIT) - 40]
    cases = [
        (b"", 415, "The 0 bytes are not an image of a known format; send one of PNG, JPEG"),
        (b"not an image", 415, "The 12 bytes are not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", 415, "not an image of a known format"),
        (cut, 422, "The image cannot be decoded: "),
        (bomb(300, 200), 413, "The image has 300 × 200 pixels; at most 40,000 are taken."),
        (bomb(20_000, 20_000), 413, "image is too large|20000 × 20000 pixels"),
        (bomb(1, 101), 422, "The image has 1 × 101 pixels; one side may be at most 100 times the other."),
        (bomb(64, 64) + b"x" * 200_000, 413, "The request is larger than 200,000 bytes, the most that is taken."),
    ]
    for body, expected, message in cases:
        status, answer = service.classify(body)
        assert status == expected, (message, answer)
        assert any(part in answer["detail"] for part in message.split("|")), answer
    assert service.swarm.asked == []
    assert service.classify(bomb(200, 200))[0] == 200
    assert service.classify(bomb(1, 100))[0] == 200


def test_what_is_sent_in_a_wrong_form_is_refused(service):
    json_kind = "application/json"
    cases = [
        (DIGIT, "text/plain", 415, "The content type is 'text/plain'; send an image as the file `file`"),
        (DIGIT, "application/x-www-form-urlencoded", 415, "The content type is 'application/x-www-form-urlencoded'"),
        (b'{"text": "a"}', json_kind, 415, "The model takes images, and this is JSON; send an image file."),
        (b"{", json_kind, 422, "The body is not JSON"),
        (b"[" * 100_000, json_kind, 422, "The body is not JSON"),
        (b"[1]", json_kind, 422, "The JSON is a list; send an object"),
        (*form("image", DIGIT), 422, "The form holds image; send an image as the file `file`."),
        (*form("file", b"text", None), 422, "The form holds file; send an image as the file `file`."),
        (b"--xyz\r\nbroken", "multipart/form-data", 400, "Missing boundary"),
    ]
    for body, kind, expected, message in cases:
        status, answer = service.classify(body, kind)
        assert status == expected and message in answer["detail"], (kind, answer)
    assert service.swarm.asked == []


def test_parameters_out_of_range_are_refused(service):
    cases = {
        "`deadline` is '0'": {"deadline": 0},
        "`deadline` is 'nan'": {"deadline": "nan"},
        "`deadline` is 'soon'": {"deadline": "soon"},
        "`max_skips` is '-1'": {"max_skips": -1},
        "`max_skips` is '1.5'": {"max_skips": 1.5},
        "`top_k` is '0'": {"top_k": 0},
        "The parameter 'topk' is not known; known are deadline, max_skips, top_k.": {"topk": 2},
    }
    for message, query in cases.items():
        status, answer = service.classify(**query)
        assert status == 422 and message in answer["detail"], answer
    assert service.swarm.asked == []
    status, answer = service.classify(top_k=100)
    assert status == 200 and len(answer["scores"]) == 10


def test_errors_of_the_swarm_have_a_status_of_their_own(service):
    cases = [
        (SwarmBusyError("256 requests wait"), 429, {}),
        (SwarmClosedError("it drains"), 503, {}),
        (MissingLayersError("no worker for layers 1, 4", [1, 4]), 503, {"missing_layers": [1, 4]}),
        (DeadlineError("3 of 6 layers ran in 0.1 s", [0]), 504, {"missing_layers": [0]}),
        (ValueError("`max_skips` is 7; the model has 6 layers."), 422, {}),
    ]
    for fault, expected, more in cases:
        service.swarm.fault = fault
        status, headers, answer = service.ask("POST", "/classify", DIGIT, Content_Type="image/png")
        assert status == expected and answer == {"detail": str(fault), **more}
        assert headers["Retry-After"] == ("1" if expected == 429 else None)
    totals = service.watched.numbers.totals
    assert totals["refused"] >= 1 and totals["failed"] >= 3


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_more_requests_than_the_limit_are_refused_and_come_through_later(service):
    service.swarm.is_held = True
    first = [threading.Thread(target=service.classify) for _ in range(2)]
    for thread in first:
        thread.start()
    wait_until(lambda: len(service.swarm.asked) == 2)
    status, headers, answer = service.ask("POST", "/classify", DIGIT, Content_Type="image/png")
    assert status == 429 and headers["Retry-After"] == "1"
    assert answer["detail"] == "2 requests are in flight; send it again later."
    service.swarm.is_held = False
    for thread in first:
        thread.join(30)
    assert service.classify()[0] == 200


def test_a_client_that_goes_away_is_no_longer_worked_for(service):
    service.swarm.is_held = True
    before = len(service.swarm.cancelled)
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("POST", "/classify", DIGIT, {"Content-Type": "image/png"})
    wait_until(lambda: len(service.swarm.asked) == 1)
    connection.close()
    wait_until(lambda: len(service.swarm.cancelled) == before + 1)
    service.swarm.is_held = False
    assert service.classify()[0] == 200 and service.classify()[0] == 200


def test_a_body_without_length_is_counted_and_one_that_never_ends_is_given_up(service):
    def send(parts, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        try:
            connection.request("POST", "/classify", parts, {"Content-Type": "image/png", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (BrokenPipeError, ConnectionResetError):  # it stopped reading
            return 413, {"detail": "The request is larger than 200,000 bytes"}
        finally:
            connection.close()

    assert send(iter([DIGIT]))[0] == 200  # in chunks, with no length
    status, answer = send(iter([b"x" * 50_000] * 5))
    assert status == 413 and "The request is larger than 200,000 bytes" in answer["detail"]
    # It says that more comes, and sends no more
    status, answer = send(DIGIT, **{"Content-Length": str(len(DIGIT) + 10)})
    assert status == 408 and answer["detail"] == "The request was not sent in 0.5 seconds."
    status, answer = send(DIGIT, **{"Content-Length": "200001"})
    assert status == 413
    assert service.classify()[0] == 200


def test_health_says_whether_each_layer_has_a_worker_or_may_be_skipped(service):
    status, _, answer = service.ask("GET", "/health")
    assert (status, answer["status"], answer["layers_without_worker"]) == (200, "ok", [])
    assert answer["workers"][0]["name"] == "worker-0"
    service.swarm.without = {2}
    status, _, answer = service.ask("GET", "/health")
    assert (status, answer["status"], answer["layers_without_worker"]) == (200, "degraded", [2])
    service.swarm.without = {2, 3}
    status, _, answer = service.ask("GET", "/health")
    assert (status, answer["status"]) == (503, "unavailable")
    service.swarm.without, service.swarm.is_closed = set(), True
    assert service.ask("GET", "/health")[0] == 503


def test_metrics_are_text_that_prometheus_reads(service):
    from prometheus_client.parser import text_string_to_metric_families

    status, headers, text = service.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert [family.name for family in text_string_to_metric_families(text)] == ["swarm_answers"]


def test_pages_of_other_sites_get_nothing(service):
    here = f"127.0.0.1:{service.port}"
    for path in ("/", "/health", "/metrics", "/events"):
        status, _, answer = service.ask("GET", path, Host="evil.example")
        assert status == 403 and "The host 'evil.example' is not this machine" in answer["detail"]
    for host in (f"localhost:{service.port}", f"[::1]:{service.port}", "127.0.0.1", "LOCALHOST"):
        assert service.ask("GET", "/health", Host=host)[0] == 200
    for host in ("127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example", ""):
        assert service.ask("GET", "/health", Host=host)[0] == 403
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        status, answer = service.classify(headers={"Origin": origin})
        assert (
            status == 403
            and answer["detail"] == f"The request comes from a page of '{origin}', which may not send any."
        )
    assert service.classify(headers={"Origin": f"http://{here}"})[0] == 200
    assert service.classify(headers={"Sec_Fetch_Site": "cross-site"})[0] == 403
    assert service.classify(headers={"Sec_Fetch_Site": "same-origin"})[0] == 200
    assert service.ask("GET", "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link to the page
    assert len(service.swarm.asked) == 2


def test_a_token_is_asked_for_by_all_but_the_page(inputs):
    with running(inputs, token="a-token-of-this-service") as service:
        for method, path in (("GET", "/health"), ("GET", "/metrics"), ("GET", "/events"), ("POST", "/classify")):
            for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "a-token-of-this-service"}):
                status, headers, answer = service.ask(method, path, **header)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
                assert answer["detail"] == "Send the token of this service: 'Authorization: Bearer TOKEN'."
        assert service.ask("GET", "/", Host="other.example")[0] == 200
        bearer = {"Authorization": "Bearer a-token-of-this-service"}
        assert service.ask("GET", "/health", Host="other.example", **bearer)[0] == 200
        assert service.classify(headers=bearer)[0] == 200
        assert service.events("beginning", **bearer)[0]["type"] == "beginning"


def test_the_page_holds_all_it_needs_and_may_reach_nothing_else(service):
    status, headers, page = service.ask("GET", "/")
    assert status == 200 and headers.get_content_type() == "text/html"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "'sha256-" in policy
    for address in ("http:", "https:", "//cdn", "@import", 'src="', "url("):
        assert address not in page.replace("http://www.w3.org/2000/svg", ""), address
    assert "innerHTML" not in page  # names of workers and labels are text, whatever they hold
    for path in ("/docs", "/openapi.json", "/load", "/workers/worker-0/kill"):
        assert service.ask("POST", path)[0] in (404, 405)
    assert service.swarm.killed == []


def test_events_tell_of_a_request_with_its_picture(service):
    heard = []
    listener = threading.Thread(target=lambda: heard.extend(service.events("classified")))
    listener.start()
    wait_until(lambda: service.watched.events.num_listeners == 1)
    service.classify()
    listener.join(30)
    begin, *between, answer = heard
    assert begin["type"] == "beginning" and begin["settings"] is None and begin["status"]["layers"] == list(range(6))
    (accepted,) = [event for event in between if event["type"] == "accepted"]
    assert accepted["image"].startswith("data:image/png;base64,") and accepted["expected"] is None
    assert answer["request"] == accepted["request"] and answer["label"] == "3" and answer["is_right"] is None
    assert answer["execution_order"] == [5, 3, 1, 0, 2]
    wait_until(lambda: service.watched.events.num_listeners == 0)


def test_a_page_that_does_not_read_does_not_hold_up_others(service):
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("GET", "/events")
    connection.getresponse().read(10)
    wait_until(lambda: service.watched.events.num_listeners == 1)
    large = {"type": "x", "text": "x" * 10_000}
    for _ in range(5000):
        service.watched.events.publish(large)
    assert service.classify()[0] == 200
    connection.close()
    wait_until(lambda: service.watched.events.num_listeners == 0)


def labelled(count: int, inputs: RequestInputs) -> list[LabelledInput]:
    image = inputs.read_image(DIGIT)
    return [
        LabelledInput(inputs.of_image(image), {"image": "data:,"}, label) for label in ["3", "3", "3", "8"][:count]
    ]


def test_a_load_of_labelled_images_gives_an_accuracy_and_can_be_changed(inputs):
    with running(inputs, items=labelled(4, inputs), paced=PacedTransport(None, 0.0)) as service:
        heard = service.events("second")
        assert heard[0]["settings"] == {"rate": 20.0, "max_skips": 1}
        wait_until(lambda: service.watched.numbers.totals["answered"] >= 12)
        summary = service.watched.numbers.summary()
        assert 0.5 < summary["accuracy"] < 1 and summary["num_labelled"] >= 12
        assert {asked["max_skips"] for asked in service.swarm.asked} == {1}
        status, _, answer = service.ask(
            "POST", "/load", '{"rate": 0, "max_skips": 3}', Content_Type="application/json"
        )
        assert (status, answer) == (200, {"rate": 0.0, "max_skips": 3})
        for body, message in (
            ('{"rate": 101, "max_skips": 3}', "`rate` is 101.0; it must be a number from 0 to 100."),
            ('{"rate": NaN, "max_skips": 3}', "`rate` is nan"),
            ('{"rate": 1, "max_skips": -1}', "`max_skips` is -1; it must be an integer of at least 0."),
            ('{"rate": 1, "max_skips": 6}', "`max_skips` is 6, but only 6 layers run"),
            ('{"rate": 1}', "`max_skips` is"),
        ):
            status, _, answer = service.ask("POST", "/load", body, Content_Type="application/json")
            assert status == 422 and message in answer["detail"], answer
        wait_until(lambda: not service.watched._shown)
        before = len(service.swarm.asked)
        time.sleep(0.2)
        assert len(service.swarm.asked) == before
        assert service.ask("POST", "/workers/worker-0/kill")[0] == 202 and service.swarm.killed == ["worker-0"]
        status, _, answer = service.ask("POST", "/workers/worker-7/kill")
        assert status == 404 and answer["detail"] == "There is no worker 'worker-7'; there are worker-0."
        pace = "/workers/worker-0/pace"
        assert service.ask("POST", pace, '{"factor": 5}', Content_Type="application/json")[0] == 200
        assert service.watched.paced.factors == {"worker-0": 5.0}
        status, _, answer = service.ask("POST", pace, '{"factor": 0}', Content_Type="application/json")
        assert status == 422 and answer["detail"] == "`factor` is 0.0; it must be a number from 1 to 100."
        assert service.ask("POST", "/workers/worker-0/kill", Origin="http://evil.example")[0] == 403
        assert service.swarm.killed == ["worker-0"]
