# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What is asked of a running Ray before a swarm joins it: who may reach it can run code on all its machines."""

import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path


_TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_DOCS = 'See "More machines" in docs/swarm.md.'


def check_joining(address: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Refuses to join a Ray that others can reach, unless it asks for a token and encrypts. Returns host and port.

    Raises:
        `ValueError`: if the address is not `host:port`, or is not on loopback and token or TLS are missing; or if a
            file with a token or key can be read by others.
    """
    host, port = _host_and_port(address)
    if not _is_loopback(host):
        _check_token_and_tls(f"`address` is '{address}', which is not on this machine alone", environment)
    _check_secrets(environment)
    return host, port


def check_joined_nodes(addresses: Iterable[str], environment: Mapping[str, str]) -> None:
    """Refuses a Ray that is reached on loopback, but has nodes that listen elsewhere, as [`check_joining`]."""
    for address in addresses:
        if not _is_loopback(address):
            _check_token_and_tls(f"The Ray that was joined has a node at {address}", environment)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"`address` is '{address}'; it must be host:port of a running Ray, such as 192.0.2.1:6379.")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    """Whether all addresses of a host are on this machine alone."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ValueError(f"`address` names the host '{host}', which is not known ({error}).") from error
    return all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def _check_token_and_tls(what: str, environment: Mapping[str, str]) -> None:
    missing = []
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        missing.append("RAY_AUTH_MODE=token")
    if not environment.get("RAY_AUTH_TOKEN") and not _token_file(environment).is_file():
        missing.append("a token (RAY_AUTH_TOKEN_PATH, a file of mode 0600)")
    if environment.get("RAY_USE_TLS") != "1":
        missing.append("RAY_USE_TLS=1")
    missing += [name for name in _TLS_FILES if not Path(environment.get(name, "")).is_file()]
    if missing:
        raise ValueError(
            f"{what}, and whoever reaches it could run code on all its machines. It must ask for a token and encrypt; "
            f"missing here: {', '.join(missing)}. {_DOCS}"
        )


def _check_secrets(environment: Mapping[str, str]) -> None:
    files = [Path(environment["RAY_TLS_SERVER_KEY"])] if environment.get("RAY_TLS_SERVER_KEY") else []
    if environment.get("RAY_AUTH_MODE", "").lower() == "token" and not environment.get("RAY_AUTH_TOKEN"):
        files.append(_token_file(environment))
    for file in files:
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            mode = stat.S_IMODE(file.stat().st_mode)
            raise ValueError(f"'{file}' has mode {mode:04o}, so that others can read it; run `chmod 600 {file}`.")


def _token_file(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
