# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle swarm`: layers on workers that are slow, fail and come back."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import inputs, options, swarm_simulate


if TYPE_CHECKING:
    from hf_layershuffle.swarm.demonstration import LabelledInput
    from hf_layershuffle.swarm.request_inputs import RequestInputs

app = typer.Typer(
    name="swarm",
    rich_markup_mode=None,
)


@app.callback()
def swarm() -> None:
    """Layers on workers that are slow, fail and come back."""


app.command()(swarm_simulate.simulate)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder or Hub id. With --demo it defaults to the model of digits that comes along."
    ),
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that the layers are spread over, at least 1.")]
Replicas = Annotated[int, typer.Option("--replicas", help="Workers that hold each layer, from 1 to --workers.")]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help="free: the next free worker among the layers still missing. strict: one layer after the other.",
    ),
]
MaxSkips = Annotated[
    int | None,
    typer.Option(
        "--max_skips", help="Most layers that may be missing in an answer, whatever the cause. Defaults to 0; with "
        "--demo to 2."
    ),
]  # fmt: skip
SkipAfter = Annotated[
    float | None,
    typer.Option(
        "--skip_after",
        help="Seconds that a request waits for busy workers before it skips the layers it still lacks, if --max_skips "
        "allows. Defaults to as long as they are there; with --demo to 1.",
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline",
        help="Seconds from acceptance to the answer, which is then given without the layers still missing, or refused "
        "if they are more than --max_skips.",
    ),
]
CallTimeout = Annotated[
    float,
    typer.Option(
        "--call_timeout",
        help="Seconds that a worker has for one layer, before it is suspected and the layer is asked elsewhere.",
    ),
]
Hedge = Annotated[
    float | None,
    typer.Option("--hedge", help="Seconds after which a second worker that is free is asked for the same layer."),
]
MaxWait = Annotated[
    float,
    typer.Option(
        "--max_wait",
        help="Seconds that a request waits for a layer that no worker holds, such as for a restart, before it fails.",
    ),
]
MaxQueue = Annotated[int, typer.Option("--max_queue", help="Requests that wait or run; beyond them, 429.")]
TransportName = Annotated[
    str,
    typer.Option("--transport", help="ray: workers are processes. local: workers are threads, for trials."),
]
ClusterAddress = Annotated[
    str | None,
    typer.Option("--address", help="A running Ray cluster to join. Defaults to one of its own, on this machine only."),
]
Journal = Annotated[
    Path | None,
    typer.Option(
        "--journal",
        help="Folder that keeps accepted requests until they have run. The next start runs those that a crash left, "
        "but their answers are not kept: a client whose connection broke sends its request again.",
    ),
]
Host = Annotated[
    str, typer.Option("--host", help="Address to listen on. One that other machines reach needs --token_file.")
]
Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0 for a free one.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token_file", help="File of the token that every request must bear; made, for you alone, if it is missing."
    ),
]
MaxBodyBytes = Annotated[int, typer.Option("--max_body_bytes", help="Bytes of a request at most.")]
MaxPixels = Annotated[int, typer.Option("--max_pixels", help="Pixels of an image at most.")]
MaxInFlight = Annotated[int, typer.Option("--max_in_flight", help="Requests that are read or answered at once.")]
Demo = Annotated[
    bool,
    typer.Option(
        "--demo",
        help="For show: sends labelled images or texts of --dataset_name to itself, slows workers down so that the "
        "eye can follow, and lets the page kill them.",
    ),
]
Rate = Annotated[
    float | None, typer.Option("--rate", help="With --demo: of these, how many a second at first. Defaults to 3.")
]
LayerSeconds = Annotated[
    float | None,
    typer.Option(
        "--layer_seconds",
        help="With --demo: seconds that a layer takes longer than it needs, at random, on average. Defaults to 0.12.",
    ),
]


@app.command()
def serve(
    model: Model = None,
    workers: Workers = 4,
    replicas: Replicas = 1,
    policy: PolicyName = "free",
    max_skips: MaxSkips = None,
    skip_after: SkipAfter = None,
    deadline: Deadline = None,
    call_timeout: CallTimeout = 30.0,
    hedge: Hedge = None,
    max_wait: MaxWait = 30.0,
    max_queue: MaxQueue = 256,
    transport: TransportName = "ray",
    address: ClusterAddress = None,
    journal: Journal = None,
    device: options.Device = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    ssl_certfile: Annotated[Path | None, typer.Option("--ssl_certfile", help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option("--ssl_keyfile", help="Key of the certificate.")] = None,
    max_body_bytes: MaxBodyBytes = 10 * 2**20,
    max_pixels: MaxPixels = 25_000_000,
    max_in_flight: MaxInFlight = 64,
    demo: Demo = False,
    rate: Rate = None,
    layer_seconds: LayerSeconds = None,
    dataset_name: options.DatasetName = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serves a model whose layers are on workers.

    POST /classify takes an image (or a text, as JSON), GET /health and /metrics say how it is, and / shows the workers
    and the requests as they move. Ctrl-C ends it, after the answers under way.
    """
    from hf_layershuffle.common.checks import check_number
    from hf_layershuffle.swarm.answers import SwarmError
    from hf_layershuffle.swarm.demonstration import MOST_RATE, PacedTransport
    from hf_layershuffle.swarm.policy import Policy
    from hf_layershuffle.swarm.request_inputs import Limits, RequestInputs
    from hf_layershuffle.swarm.service_runner import Address, read_token, run_service
    from hf_layershuffle.swarm.swarm import Swarm
    from hf_layershuffle.swarm.transports import transport_of

    if not demo:
        _refuse_without_demo(dataset_name=dataset_name, rate=rate, layer_seconds=layer_seconds)
    model, dataset = _chosen_model(model, dataset_name, demo, revision)
    rate = 3.0 if rate is None else rate
    layer_seconds = 0.12 if layer_seconds is None else layer_seconds
    if demo:  # a worker that is lost or slow is then seen to cost layers, not answers
        max_skips = 2 if max_skips is None else max_skips
        skip_after = 1.0 if skip_after is None else skip_after
    rules: dict[str, Any] = {
        "max_skips": max_skips or 0, "skip_after": skip_after, "deadline": deadline, "call_timeout": call_timeout,
        "hedge": hedge, "max_wait": max_wait,
    }  # fmt: skip
    Policy(policy, **rules)
    limits = Limits(max_body_bytes, max_pixels, max_in_flight)
    token = None if token_file is None else read_token(token_file)
    listen = Address(host, port, token, ssl_certfile, ssl_keyfile)
    inputs.check_model(model, revision)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    made = RequestInputs.from_pretrained(model, limits, trust_remote_code=trust_remote_code, **hub)
    check_number("rate", rate, 0.0, MOST_RATE)
    hub |= {"device": str(inputs.choose_device(device))}
    reached = PacedTransport(transport_of(transport, model, address, hub), layer_seconds) if demo else None
    swarm = Swarm.from_pretrained(
        model, workers=workers, replicas=replicas, transport=reached or transport, policy=policy, max_queue=max_queue,
        address=address, journal=journal, **rules, **hub,
    )  # fmt: skip
    made.cut_texts_for(swarm.model.model)
    items = [] if dataset is None else _labelled_inputs(made, dataset)
    _announce_start(f"Starting {workers} workers ({transport}) for {model}; this may take a minute")
    try:
        asyncio.run(run_service(swarm, made, listen, items=items, rate=rate, paced=reached, announce=_announce))
    except SwarmError as error:  # of the swarm's start
        raise OSError(str(error)) from error


def _announce_start(line: str) -> None:
    print(line, flush=True)


def _announce(address: str) -> None:
    print(f"The swarm answers at {address} (Ctrl-C ends it)", flush=True)


def _refuse_without_demo(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` is '{value}', which is for --demo; add it, or leave this out.")


def _chosen_model(
    model: str | None, dataset_name: str | None, demo: bool, revision: str | None
) -> tuple[str, str | None]:
    """The model, and for show the dataset whose images or texts are sent to it.

    Raises:
        `ValueError`: if there is no model, or no dataset is known.
    """
    from hf_layershuffle.bundled import example_model

    if model is None and not demo:
        raise ValueError("`MODEL` is missing; give a folder or a Hub id, or --demo for the model that comes along.")
    model = model or example_model()
    if not demo:
        return model, None
    if dataset_name is None and Path(model).resolve() == Path(example_model()).resolve():
        return model, "digits"
    return model, inputs.dataset_of([model], dataset_name, revision)


def _labelled_inputs(made: "RequestInputs", dataset_name: str) -> "list[LabelledInput]":
    """Some of the images or texts that models are evaluated on, with the names of their classes."""
    from hf_layershuffle.data.datasets import load_image_datasets, match_labels
    from hf_layershuffle.data.text_datasets import load_text_datasets

    load = load_text_datasets if made.kind == "text" else load_image_datasets
    splits = load(dataset_name, class_names=made.labels)
    return made.labelled(match_labels(splits["test"], made.config, dataset_name))
