"""What the endpoint's tests share: a tiny real discriminator in its folder, and the application in this process."""

from __future__ import annotations

import asyncio
import io
import queue
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.serve import ServeSettings
from prism_ray.discriminator.model import build_discriminator, save_discriminator
from prism_ray.models.tiny import build_tiny
from prism_ray.response import render
from prism_ray.serve.app import create_app
from prism_ray.serve.auth import digest_of
from prism_ray.serve.service import Service

TOKEN = "a-token-of-the-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "max", "count", "square", "colour", "is", "the"]


@pytest.fixture(scope="session")
def token() -> str:
    """The one that is let in."""
    return TOKEN


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve_policy")
    sizes = TinyModelSettings(hidden_size=64, layers=2, heads=2, key_value_heads=1, mlp_size=96, vision_mlp_size=64)
    build_tiny(folder, WORDS, sizes, seed=0)
    return folder


@pytest.fixture(scope="session")
def make_folder(policy_folder) -> Callable[..., Path]:
    """Write a discriminator: where, from which seed, with what other settings."""

    def make(folder: Path, seed: int = 0, **changes: Any) -> Path:
        settings = DiscriminatorSettings(max_segment_tokens=64).model_copy(update=changes)
        model = build_discriminator(policy_folder, settings, seed)
        with torch.no_grad():
            model.head.weight.mul_(20)  # an untrained head says next to nothing
        save_discriminator(dict(model.named_parameters()), model, folder, like=policy_folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folder(make_folder, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("served") / "discriminator")


@pytest.fixture(scope="session")
def other_folder(make_folder, tmp_path_factory) -> Path:
    """Another discriminator of the same shape."""
    return make_folder(tmp_path_factory.mktemp("served") / "discriminator", seed=1)


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """A random image of this width and height."""

    def make(seed: int = 0, width: int = 64, height: int = 32) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return data.getvalue()

    return make


@pytest.fixture(scope="session")
def response() -> Callable[..., str]:
    """A response from its three parts."""

    def make(caption: str = " red one", think: str = " count one", answer: str = " one") -> str:
        return render(caption, think, answer)

    return make


@pytest.fixture(scope="session")
def serving(folder) -> Callable[..., Any]:
    """A client of an application in this process, over its own service; keyword arguments are settings."""

    @contextmanager
    def serve(where: Path | None = None, **settings: Any) -> Iterator[TestClient]:
        made = ServeSettings(**settings)
        service = Service(made)
        app = create_app(made, [digest_of(TOKEN)], service)
        with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
            client.service = service
            client.portal.call(service.load, where or folder)
            yield client
            client.portal.call(service.close)

    return serve


@pytest.fixture(scope="module")
def client(serving) -> Iterator[TestClient]:
    with serving() as made:
        yield made


@dataclass
class Endpoint:
    """A real HTTP server in a thread of this process."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    def call(self, made: Coroutine[Any, Any, Any]) -> Any:
        """What a coroutine of the server's event loop returns."""
        return asyncio.run_coroutine_threadsafe(made, self.loop).result(60)


@pytest.fixture(scope="session")
def listening(folder) -> Callable[..., Any]:
    """An endpoint; keyword arguments are settings."""

    @contextmanager
    def listen(where: Path | None = None, **settings: Any) -> Iterator[Endpoint]:
        started: queue.Queue[tuple[Endpoint, uvicorn.Server]] = queue.Queue()

        async def run() -> None:
            made = ServeSettings(**settings)
            service = Service(made)
            await service.load(where or folder)
            server = uvicorn.Server(uvicorn.Config(create_app(made, [digest_of(TOKEN)], service), log_level="error"))
            with socket.create_server(("127.0.0.1", 0)) as listener:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                started.put((Endpoint(url, service, asyncio.get_running_loop()), server))
                await server.serve([listener])
            await service.close()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        endpoint, server = started.get(timeout=120)
        try:
            yield endpoint
        finally:
            server.should_exit = True
            thread.join(60)

    return listen


@pytest.fixture(scope="module")
def endpoint(listening) -> Iterator[Endpoint]:
    with listening() as made:
        yield made
