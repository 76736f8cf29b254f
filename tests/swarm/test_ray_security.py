"""Ray of other machines is joined only if it asks for a token and encrypts."""

import socket
from pathlib import Path

import pytest

from hf_layershuffle.swarm import ray_security
from hf_layershuffle.swarm.answers import SwarmError
from hf_layershuffle.swarm.ray_cluster import RayCluster
from hf_layershuffle.swarm.ray_security import check_joined_nodes, check_joining


ELSEWHERE = "192.0.2.1:6379"


@pytest.fixture
def environment(tmp_path):
    """What a safe Ray needs."""
    files = {
        "RAY_AUTH_TOKEN_PATH": "token",
        "RAY_TLS_SERVER_CERT": "cert.pem",
        "RAY_TLS_SERVER_KEY": "key.pem",
        "RAY_TLS_CA_CERT": "ca.pem",
    }
    for name in files.values():
        (tmp_path / name).touch(mode=0o600)
    paths = {variable: str(tmp_path / name) for variable, name in files.items()}
    return {"RAY_AUTH_MODE": "token", "RAY_USE_TLS": "1", **paths}


@pytest.mark.parametrize("address", [ELSEWHERE, "0.0.0.0:6379", "[2001:db8::1]:6379", "[::]:1"])
def test_elsewhere_a_token_and_tls_are_asked_for(address, environment):
    check_joining(address, environment)
    for name in environment:
        lacking = {key: value for key, value in environment.items() if key != name}
        with pytest.raises(ValueError, match=rf"not on this machine alone.*missing here: [^,]*{name}.*More machines"):
            check_joining(address, lacking | {"HOME": "/nowhere"})


@pytest.mark.parametrize("name, value", [("RAY_USE_TLS", "0"), ("RAY_AUTH_MODE", "disabled")])
def test_what_is_turned_off_is_missing(name, value, environment):
    with pytest.raises(ValueError, match=f"missing here: {name}"):
        check_joining(ELSEWHERE, environment | {name: value})


def test_all_that_is_missing_is_named():
    with pytest.raises(ValueError) as caught:
        check_joining(ELSEWHERE, {"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS", "_CERT", "_KEY", "_CA_CERT", "could run code"):
        assert name in str(caught.value)


def test_a_token_in_the_environment_is_one(environment):
    del environment["RAY_AUTH_TOKEN_PATH"]
    check_joining(ELSEWHERE, environment | {"RAY_AUTH_TOKEN": "a" * 64})


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_KEY"])
def test_secrets_that_others_can_read_are_refused(variable, environment):
    Path(environment[variable]).chmod(0o644)
    for address in (ELSEWHERE, "127.0.0.1:6379"):
        with pytest.raises(ValueError, match="has mode 0644, so that others can read it; run `chmod 600"):
            check_joining(address, environment)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379", "127.0.0.9:1", "localhost:6379"])
def test_on_this_machine_nothing_is_asked_for_unless_a_node_is_elsewhere(address):
    check_joining(address, {})
    check_joined_nodes(["127.0.0.1", "::1"], {})
    with pytest.raises(ValueError, match=r"The Ray that was joined has a node at 192\.0\.2\.1, .*RAY_USE_TLS=1"):
        check_joined_nodes(["127.0.0.1", "192.0.2.1"], {})


def test_a_name_with_an_address_elsewhere_is_elsewhere(monkeypatch):
    found = [(None, None, None, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(ray_security.socket, "getaddrinfo", lambda *_: found)
    with pytest.raises(ValueError, match="'both:6379', which is not on this machine alone"):
        check_joining("both:6379", {})


@pytest.mark.parametrize("address", ["auto", "192.0.2.1", ":6379", "a/b:1", "h:0", "h:65536", "h:x", "ray://h:1", ""])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="it must be host:port of a running Ray, such as"):
        check_joining(address, {})


def test_a_cluster_refuses_before_it_reaches_out(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    cluster = RayCluster(ELSEWHERE)
    for _ in range(2):
        with pytest.raises(ValueError, match="not on this machine alone"):
            cluster.start()
    cluster.stop()


def test_where_nothing_runs_is_said_at_once():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        cluster = RayCluster(f"127.0.0.1:{port}")
        with pytest.raises(SwarmError, match=rf"No Ray answers at '127\.0\.0\.1:{port}' \(.*start it there by"):
            cluster.start()
        cluster.stop()
