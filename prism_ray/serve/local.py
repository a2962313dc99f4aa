"""The endpoint as `jobs/serve.py` runs it: on this machine's Ray (or one that is joined), until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from prism_ray.config.serve import ServeJobSettings, ServeSettings
from prism_ray.runtime import cluster
from prism_ray.serve.auth import TokenError, load_digests
from prism_ray.serve.deployment import application
from prism_ray.serve.scoring import version_of


class StartError(ValueError):
    """The endpoint cannot be started as it is configured."""


def serve_until_stopped(settings: ServeJobSettings) -> None:
    """Start the endpoint, say where it is, and return after SIGINT or SIGTERM, when all is ended.

    Raises StartError or ClusterError, with a sentence, for what is wrong before anything has started.
    """
    settings = _checked(settings)
    with _stopping() as stopped:
        cluster.start(settings.cluster)
        try:
            _start(settings)
            if not stopped.is_set():
                print(_where(settings), flush=True)
            stopped.wait()
        finally:
            serve.shutdown()
            ray.shutdown()


def _checked(settings: ServeJobSettings) -> ServeJobSettings:
    """The settings, usable as far as can be told; on the loopback address tokens may be missing."""
    if settings.checkpoint is None:
        raise StartError("checkpoint is not set; give --checkpoint with the folder of a trained discriminator")
    try:
        version_of(settings.checkpoint)
    except OSError as error:
        raise StartError(str(error)) from None
    if _is_loopback(settings.host):
        tokens = settings.tokens.model_copy(update={"anonymous": True})
        settings = settings.model_copy(update={"tokens": tokens})
    try:
        load_digests(settings.tokens)
    except TokenError as error:
        raise StartError(str(error)) from None
    _check_port(settings.host, settings.port)
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    """Serve itself would say only in a log that somebody else listens there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = "something else listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise StartError(f"port {port} of {host} cannot be used ({why}); choose another with port=NUMBER") from None


def _start(settings: ServeJobSettings) -> None:
    replicas = settings.replicas
    needs = {"CPU": replicas.least * replicas.cpus, "GPU": replicas.least * replicas.gpus}
    cluster.require({f"replicas.least = {replicas.least}": needs}, settings.cluster)
    quiet = LoggingConfig(log_level=logging.WARNING, enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config=quiet,
    )
    own = ServeSettings.model_validate({name: getattr(settings, name) for name in ServeSettings.model_fields})
    serve.run(application(own), name=settings.app, route_prefix="/", logging_config=quiet)


def _where(settings: ServeJobSettings) -> str:
    host = "localhost" if settings.host in ("0.0.0.0", "::", "127.0.0.1") else settings.host
    url = f"http://{host}:{settings.port}"
    who = "with a token" if load_digests(settings.tokens) else "everybody on this machine, no token needed"
    return f"serving {settings.checkpoint} at {url} ({who})\nAPI:     {url}/docs\nstop it with Ctrl-C"


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stopped = threading.Event()
    before = {n: signal.signal(n, lambda *_: stopped.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
