"""Runs `hf-layershuffle swarm serve` as a user does: refusals in this process, services in their own."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, assert_all_refused, run_cli
from support.processes import descendants, is_running, until
from support.texts import labelled_texts, save_with_tokenizer, text_classifier

import hf_layershuffle as ls
import hf_layershuffle_cli
from hf_layershuffle.swarm.answers import SwarmError
from hf_layershuffle.swarm.local_transport import LocalTransport


FOLDER = Path(ls.example_model())
DIGIT = (FOLDER / "examples" / "3.png").read_bytes()


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "open").write_text("a-token-that-others-can-read")
    os.chmod(tmp_path / "open", 0o644)
    (tmp_path / "short").touch(mode=0o600)
    (tmp_path / "empty").mkdir()
    taken = socket.create_server(("127.0.0.1", 0))

    def serve(*options, model=FOLDER):
        return ["swarm", "serve", *([] if model is None else [model]), "--transport", "local", *options]

    cases = {
        "Missing command. See --help.": ["swarm"],
        "`MODEL` is missing; give a folder or a Hub id, or --demo": serve(model=None),
        "There is no model folder './no-such-model'": serve(model="./no-such-model"),
        "config.json": serve(model=tmp_path / "empty"),
        "`workers` is 0; it must be an integer of at least 1.": serve("--workers", 0),
        "`replicas` is 5|5 replicas": serve("--replicas", 5),
        "`policy` is 'fast'; it must be one of free, strict.": serve("--policy", "fast"),
        "`max_skips` is -1": serve("--max_skips", -1),
        "`max_skips` is 6": serve("--max_skips", 6),
        "`deadline` is 0.0; it must be a number of seconds above 0 and below 1e9.": serve("--deadline", 0),
        "`skip_after` is -1.0": serve("--skip_after", -1),
        "`call_timeout` is 0.0": serve("--call_timeout", 0),
        "`hedge` is 0.0": serve("--hedge", 0),
        "`max_queue` is 0": serve("--max_queue", 0),
        "`transport` is 'tcp'; it must be 'ray', 'local'": serve("--transport", "tcp"),
        "`address` is '10.0.0.1:6379', which only": serve("--address", "10.0.0.1:6379"),
        "`device` is 'gpu'": serve("--device", "gpu"),
        "`port` is 70000; it must be an integer from 0": serve("--port", 70000),
        "cannot be used (Address already in use); choose another --port": serve("--port", taken.getsockname()[1]),
        "`host` is '0.0.0.0', which other machines reach; give a token": serve("--host", "0.0.0.0"),
        "`host` is 'no-such-host.invalid', which": serve(
            "--host", "no-such-host.invalid", "--token_file", tmp_path / "token"
        ),
        "has mode 0644, so that others may use it; run chmod 600": serve("--token_file", tmp_path / "open"),
        "holds no token of at least 16 letters": serve("--token_file", tmp_path / "short"),
        "HTTPS needs both --ssl_certfile and --ssl_keyfile": serve("--ssl_certfile", tmp_path / "open"),
        "`max_body_bytes` is 0": serve("--max_body_bytes", 0),
        "`max_pixels` is 0": serve("--max_pixels", 0),
        "`max_in_flight` is 0": serve("--max_in_flight", 0),
        "`rate` is 101.0; it must be a number from 0 to 100.": serve("--demo", "--rate", 101),
        "`layer_seconds` is -1.0": serve("--demo", "--layer_seconds", -1),
        "`dataset_name` is 'digits', which is for --demo": serve("--dataset_name", "digits"),
        "`rate` is '3.0', which is for --demo; add it": serve("--rate", 3),
        "`layer_seconds` is '0.0', which is for --demo": serve("--layer_seconds", 0),
        "No such option": serve("--no_such_option"),
    }
    with taken:
        assert_all_refused(run_cli, "hf-layershuffle", cases, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"open", "short", "empty", "token"}
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("hf_layershuffle.swarm.service")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert_all_refused(
        run_cli, "hf-layershuffle", {'pip install "hf-layershuffle[swarm]"': ["swarm", "serve", FOLDER]}, tmp_path
    )


class Served:
    """A service that answers.

    Args:
        address: Where it said that it does.
    """

    def __init__(self, address: str):
        self.host, port = re.fullmatch(r"http://(.*):(\d+)", address).groups()
        self.port = int(port)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(self, method, path, body=None, **headers):
        connection = self.connect()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def is_gone(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False


@pytest.fixture
def visited(monkeypatch, tmp_path):
    """Runs the command in this process, lets a function ask it from a thread, and ends it by a signal."""

    def run(visit, *options, by=signal.SIGINT):
        failures, threads = [], []

        def visiting(address: str) -> None:
            try:
                visit(Served(address))
            except BaseException as error:
                failures.append(error)
            finally:
                os.kill(os.getpid(), by)

        def announce(address: str) -> None:
            threads.append(threading.Thread(target=visiting, args=(address,)))
            threads[0].start()

        monkeypatch.setattr(hf_layershuffle_cli.swarm, "_announce", announce)
        result = run_cli("swarm", "serve", "--port", "0", "--transport", "local", *options, cwd=tmp_path)
        assert threads, result.stderr
        threads[0].join(60)
        if failures:
            raise failures[0]
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(r"Starting \d workers \(local\) for .*; this may take a minute\n", result.stdout)

    return run


def test_workers_of_ray_are_killed_and_come_back_and_nothing_is_left_at_the_end(tmp_path):
    command = [sys.executable, "-m", "hf_layershuffle_cli", "swarm", "serve", FOLDER, "--port", "0", "--workers", "2"]
    command += ["--demo", "--rate", "5", "--layer_seconds", "0", "--max_skips", "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, text=True, cwd=tmp_path, **pipes)
    started = set()
    try:
        assert process.stdout.readline() == f"Starting 2 workers (ray) for {FOLDER}; this may take a minute\n"
        line = process.stdout.readline()
        found = re.fullmatch(r"The swarm answers at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert found, (line, process.stderr.read())
        service = Served(found[1])
        status, answer = service.ask("POST", "/classify?top_k=2", DIGIT, Content_Type="image/png")
        assert status == 200 and answer["label"] == "3" and len(answer["scores"]) == 2
        assert sorted(answer["execution_order"]) == list(range(6)) and answer["skipped"] == []
        assert {hop["worker"] for hop in answer["trace"]} == {"worker-0", "worker-1"}
        status, health = service.ask("GET", "/health")
        assert status == 200 and health["status"] == "ok" and health["policy"]["max_skips"] == 3
        started = descendants(process.pid)
        (killed,) = (worker for worker in health["workers"] if worker["name"] == "worker-0")
        assert killed["process_id"] in started
        assert service.ask("POST", "/workers/worker-0/kill")[0] == 202
        until(lambda: not is_running(killed["process_id"]))
        without = until(lambda: service.ask("GET", "/health")[1]["layers_without_worker"])
        status, answer = service.ask("POST", "/classify", DIGIT, Content_Type="image/png")
        assert without == [0, 2, 4] and status == 200 and sorted(answer["execution_order"]) == [1, 3, 5]
        assert {skip["layer"] for skip in answer["skipped"]} == {0, 2, 4}
        until(lambda: service.ask("GET", "/health")[1]["status"] == "ok")
        started |= descendants(process.pid)
        watcher = service.connect()  # who watches does not hold up the end
        watcher.request("GET", "/events")
        watcher.getresponse().readline()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "") and re.fullmatch(r"worker-0 died .*\n", errors), errors
        assert service.is_gone()
        watcher.close()
        until(lambda: not any(map(is_running, started)))
    finally:
        process.kill()
        process.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_texts_takes_json(visited, tmp_path):
    def visit(service):
        text = json.dumps({"text": "the cat and the dog " * 50})  # longer than the model takes
        status, answer = service.ask("POST", "/classify", text, Content_Type="application/json")
        assert status == 200 and answer["label"] in ("animals", "colours", "numbers")
        assert len(answer["execution_order"]) == 4
        for body, message in (
            ("{}", "`text` is 'None'; it must be a text that is not empty."),
            ('{"text": " "}', "`text` is ' '"),
            ('{"text": 3}', "`text` is '3'"),
            ('{"text": "a", "texts": "b"}', "['texts'] are not known; send `text`, and `text_pair` if any."),
        ):
            status, answer = service.ask("POST", "/classify", body, Content_Type="application/json")
            assert status == 422 and message in answer["detail"], answer
        status, answer = service.ask("POST", "/classify", DIGIT, Content_Type="image/png")
        assert status == 415 and answer["detail"] == 'The model takes texts; send JSON such as {"text": "..."}.'

    folder = save_with_tokenizer(text_classifier(shuffle_mode="arbitrary"), tmp_path / "texts")
    visited(visit, folder, "--workers", "2")


def test_a_token_file_is_made_and_its_token_asked_for(visited, tmp_path):
    token_file = tmp_path / "token"

    def visit(service):
        assert service.ask("GET", "/health")[0] == 401
        bearer = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
        assert service.ask("GET", "/health", **bearer)[0] == 200
        assert service.ask("GET", "/health", Host="other.example", **bearer)[0] == 200

    # 0.0.0.0 is told as it is, and reached as this machine
    for _ in range(2):  # made, and read
        visited(visit, FOLDER, "--workers", "1", "--token_file", token_file, "--host", "0.0.0.0", by=signal.SIGTERM)
    assert token_file.stat().st_mode & 0o777 == 0o600


def test_answers_under_way_are_given_before_the_end(visited):
    answers = []

    def visit(service):
        connection = service.connect()
        connection.request("POST", "/classify?max_skips=0", DIGIT, {"Content-Type": "image/png"})
        while service.ask("GET", "/health")[1]["in_flight"] == 0:
            time.sleep(0.01)
        threading.Thread(target=lambda: answers.append(connection.getresponse())).start()

    visited(visit, "--demo", "--rate", "0", "--layer_seconds", "0.3")
    assert answers[0].status == 200 and sorted(json.loads(answers[0].read())["execution_order"]) == list(range(6))


def test_the_load_is_labelled_images_of_the_dataset(visited):
    def visit(service):
        connection = service.connect()
        connection.request("GET", "/events")
        for line in connection.getresponse():
            events = json.loads(line[6:]) if line.startswith(b"data: ") else []
            answers = [event for event in events if event["type"] == "classified"]
            if answers:
                break
        connection.close()
        assert answers[0]["expected"] in list("0123456789") and answers[0]["is_right"] in (True, False)

    visited(visit, "--demo", "--rate", "20", "--layer_seconds", "0")


def test_long_texts_of_a_dataset_are_cut_off(visited, tmp_path):
    def visit(service):
        connection = service.connect()
        connection.request("GET", "/events")
        for line in connection.getresponse():
            events = json.loads(line[6:]) if line.startswith(b"data: ") else []
            kinds = {event["type"] for event in events} & {"classified", "unanswered"}
            if kinds:
                break
        connection.close()
        assert kinds == {"classified"}

    folder = save_with_tokenizer(text_classifier(shuffle_mode="arbitrary"), tmp_path / "texts")
    long = labelled_texts(24).map(lambda row: {"text": " ".join([row["text"]] * 20)})
    long.save_to_disk(tmp_path / "long")
    visited(visit, folder, "--demo", "--dataset_name", tmp_path / "long", "--rate", "20", "--layer_seconds", "0")


def test_a_signal_while_workers_start_ends_it_too(monkeypatch, tmp_path):
    async def never_ready(transport, name, layers):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(3600)

    monkeypatch.setattr(LocalTransport, "start_worker", never_ready)
    result = run_cli("swarm", "serve", FOLDER, "--port", "0", "--transport", "local", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("Starting 4 workers (local)")
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # as the command found it


def test_workers_that_cannot_start_are_one_line(monkeypatch, tmp_path):
    async def broken(transport, name, layers):
        raise SwarmError("worker-0 could not load layers [0, 4]: no memory")

    monkeypatch.setattr(LocalTransport, "start_worker", broken)
    refused = {"no memory": ["swarm", "serve", FOLDER, "--port", "0", "--transport", "local"]}
    assert_all_refused(run_cli, "hf-layershuffle", refused, tmp_path)
