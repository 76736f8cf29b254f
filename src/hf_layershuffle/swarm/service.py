# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A swarm as a web service: `POST /classify`, `GET /health`, `GET /metrics`, and a live page at `/`."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from typing import Annotated, Any, TypeVar

import torch

from .answers import DeadlineError, MissingLayersError, SwarmAnswer, SwarmBusyError, SwarmClosedError, SwarmError
from .intake import check_max_skips
from .live_events import as_server_sent
from .request_inputs import RefusedInputError, RequestInputs, excerpt, thumbnail
from .watched_swarm import WatchedSwarm, outcome_of


try:
    from fastapi import Body, FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.datastructures import UploadFile
    from starlette.requests import ClientDisconnect

    from .service_guard import Guard
except ImportError as error:
    raise ImportError(
        f'the service needs FastAPI ({error}); pip install "hf-layershuffle[swarm]"', name=error.name
    ) from error

_T = TypeVar("_T")
# Of each error of the swarm, the status of HTTP
STATUSES: dict[type[SwarmError], int] = {
    SwarmError: 503,
    SwarmBusyError: 429,
    SwarmClosedError: 503,
    MissingLayersError: 503,
    DeadlineError: 504,
}
RETRY_AFTER = {"Retry-After": "1"}  # seconds
NUM_DECODERS = 2  # images in memory at the same time, whatever the number of requests
PAGE = "live_page.html"


def create_app(watched: WatchedSwarm, inputs: RequestInputs, *, token: str | None = None) -> FastAPI:
    """The web application of a swarm that has been started. It does not end the swarm.

    Where the swarm has a load of its own, for show, whoever may ask may also change it, kill workers and slow them
    down.

    Args:
        watched: The swarm.
        inputs: Makes the model's inputs of what is sent, and says the limits.
        token: That requests must bear, all but that of the page; None for none. Without one it answers only who asks
            for it as 127.0.0.1 or localhost.
    """
    routes = _Routes(watched, inputs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with watched.watching():
            yield
        routes.decoders.shutdown(wait=False, cancel_futures=True)

    # Its pages of documentation would load their scripts from elsewhere
    app = FastAPI(title="hf-layershuffle swarm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/classify", routes.classify, methods=["POST"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/events", routes.events, methods=["GET"])
    app.add_api_route("/", routes.page, methods=["GET"])
    if watched.load is not None:
        app.add_api_route("/workers/{name}/kill", routes.kill, methods=["POST"])
        app.add_api_route("/workers/{name}/pace", routes.pace, methods=["POST"])
        app.add_api_route("/load", routes.change_load, methods=["POST"])
    app.add_exception_handler(SwarmError, _swarm_error)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    app.add_middleware(Guard, max_body_bytes=inputs.limits.max_body_bytes, token=token)
    return app


class _Routes:
    """What is answered at each address."""

    def __init__(self, watched: WatchedSwarm, inputs: RequestInputs):
        self.watched = watched
        self.inputs = inputs
        self.in_flight = 0
        self.decoders = ThreadPoolExecutor(NUM_DECODERS, "decoder")
        self._page = resources.files(__package__).joinpath(PAGE).read_text(encoding="utf-8")
        self._content_policy = _content_policy(self._page)

    async def classify(
        self,
        request: Request,
        deadline: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        max_skips: Annotated[int | None, Query(ge=0)] = None,
        top_k: Annotated[int, Query(ge=1)] = 5,
    ) -> JSONResponse:
        _check_names(request, "deadline", "max_skips", "top_k")
        limits = self.inputs.limits
        if self.in_flight >= limits.max_in_flight:
            raise HTTPException(429, f"{self.in_flight} requests are in flight; send it again later.", RETRY_AFTER)
        self.in_flight += 1
        try:
            try:
                sent = await asyncio.wait_for(_read(request), limits.body_timeout)
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise HTTPException(408, f"The request was not sent in {limits.body_timeout:g} seconds.") from error
            with _refusing_values():
                loop = asyncio.get_running_loop()
                prepared, shown = await loop.run_in_executor(self.decoders, self._prepare, sent)
                asked = self.watched.classify(prepared, shown, deadline=deadline, max_skips=max_skips)
                answer = await _while_connected(request, asked)
        finally:
            self.in_flight -= 1
        return JSONResponse(self._described(answer, top_k))

    def _prepare(self, sent: "bytes | dict") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if isinstance(sent, dict):
            unknown = sent.keys() - {"text", "text_pair"}
            if unknown:
                raise RefusedInputError(f"{sorted(unknown)} are not known; send `text`, and `text_pair` if any.")
            prepared = self.inputs.of_text(sent.get("text"), sent.get("text_pair"))
            return prepared, excerpt(sent["text"])
        self.inputs.check_takes_images()
        image = self.inputs.read_image(sent)
        return self.inputs.of_image(image), thumbnail(image)

    def _described(self, answer: SwarmAnswer, top_k: int) -> dict[str, Any]:
        labels = self.watched.labels
        best = answer.logits[0].float().softmax(-1).topk(min(top_k, len(labels)))
        scores = [
            {"label": labels[index], "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist())
        ]
        return {**scores[0], "scores": scores, **outcome_of(answer), "request_id": answer.request_id}

    async def health(self) -> JSONResponse:
        status = self.watched.swarm.status()
        missing = self.watched.now()["without_worker"]
        can_answer = not status["closed"] and len(missing) <= status["policy"]["max_skips"]
        word = "unavailable" if not can_answer else "degraded" if missing else "ok"
        said = {"status": word, "layers_without_worker": missing, **status}
        return JSONResponse(said, 200 if can_answer else 503)

    async def metrics(self) -> PlainTextResponse:
        text = self.watched.swarm.prometheus()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def events(self) -> StreamingResponse:
        events = self.watched.events
        if events.is_closed or events.num_listeners >= events.most_listeners:
            raise HTTPException(503, f"{events.num_listeners} pages watch already; close one.", RETRY_AFTER)

        async def stream() -> AsyncIterator[str]:
            async for batch in events.listen(self.watched.beginning):
                yield as_server_sent(batch)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def page(self) -> HTMLResponse:
        headers = {
            "Content-Security-Policy": self._content_policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(self._page, headers=headers)

    async def kill(self, name: str) -> JSONResponse:
        self._check_worker(name)
        await self.watched.swarm.kill_worker(name)
        return JSONResponse({"killed": name}, 202)

    async def pace(self, name: str, factor: Annotated[float, Body(embed=True)]) -> JSONResponse:
        self._check_worker(name)
        if self.watched.paced is None:
            raise HTTPException(404, "The workers of this swarm cannot be slowed down.")
        with _refusing_values():
            self.watched.paced.slow_down(name, factor)
        return JSONResponse({"worker": name, "factor": factor})

    async def change_load(self, rate: Annotated[float, Body()], max_skips: Annotated[int, Body()]) -> JSONResponse:
        load = self.watched.load
        if load is None:
            raise HTTPException(404, "This swarm has no load of its own.")
        with _refusing_values():
            check_max_skips(max_skips, self.watched.swarm.status()["layers"])
            load.change(rate, max_skips)
        return JSONResponse({"rate": load.rate, "max_skips": load.max_skips})

    def _check_worker(self, name: str) -> None:
        names = [worker["name"] for worker in self.watched.swarm.status()["workers"]]
        if name not in names:
            raise HTTPException(404, f"There is no worker '{name[:100]}'; there are {', '.join(names)}.")


def _content_policy(page: str) -> str:
    """Lets a browser run the script that the page holds, reach this service, and nothing else."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _read(request: Request) -> bytes | dict:
    """The file that was sent, or the JSON object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=1) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                names = ", ".join(sorted(form)) or "nothing"
                raise HTTPException(422, f"The form holds {names[:100]}; send an image as the file `file`.")
            return await file.read()
    if kind != "application/json" and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(
            415,
            f"The content type is '{kind[:100]}'; send an image as the file `file` of a form, or as the body with a "
            'content type such as image/png, and a text as JSON: {"text": "..."}.',
        )
    data = await request.body()
    if kind != "application/json":
        return data
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"The body is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise HTTPException(422, f'The JSON is a {type(value).__name__}; send an object such as {{"text": "..."}}.')
    return value


async def _while_connected(request: Request, asked: Coroutine[Any, Any, _T]) -> _T:
    """What is asked, which is given up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(asked), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _check_names(request: Request, *known: str) -> None:
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        raise HTTPException(422, f"The parameter '{unknown[0][:100]}' is not known; known are {', '.join(known)}.")


@contextmanager
def _refusing_values() -> Iterator[None]:
    """Makes of a `ValueError` the answer that what was sent is not right."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(getattr(error, "status", 422), str(error)) from error


async def _swarm_error(request: Request, error: Exception) -> JSONResponse:
    status = next(STATUSES[each] for each in type(error).__mro__ if each in STATUSES)
    missing = {"missing_layers": error.missing} if isinstance(error, MissingLayersError) else {}
    return JSONResponse({"detail": str(error), **missing}, status, RETRY_AFTER if status == 429 else None)


async def _bad_parameter(request: Request, error: Exception) -> JSONResponse:
    problems: Any = error.errors() if isinstance(error, RequestValidationError) else []
    said = [f"`{problem['loc'][-1]}` is {str(problem['input'])[:100]!r}: {problem['msg']}" for problem in problems]
    return JSONResponse({"detail": "; ".join(said) + "."}, 422)


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=400)
