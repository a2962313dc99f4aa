"""The endpoint as `jobs/serve.py` runs it: on this machine's Ray (or one that is joined), until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from prism_ray.config.serve import ServeJobSettings, ServeSettings
from prism_ray.planning import layout
from prism_ray.runtime import cluster, placement
from prism_ray.runtime.sharing import require_shared
from prism_ray.serve.admission import CALLBACK
from prism_ray.serve.auth import TokenError, load_digests
from prism_ray.serve.deployment import application
from prism_ray.serve.scoring import version_of

_POLL_S = 0.5


class StartError(ValueError):
    """The endpoint cannot be started as it is configured."""


def serve_until_stopped(settings: ServeJobSettings) -> None:
    """Start the endpoint, say where it is, and return after SIGINT or SIGTERM, when all is ended.

    Raises StartError or ClusterError, with a sentence, for what is wrong before anything has started.
    """
    settings = checked(settings)
    with _stopping() as stopped, listening(settings, stopped) as url:
        if not stopped.is_set():
            who = "to who has a token" if _digests(settings) else "to this machine, without tokens"
            print(f"serving {settings.checkpoint} at {url} {who}\nAPI:     {url}/docs\nstop it with Ctrl-C", flush=True)
        stopped.wait()


@contextmanager
def listening(settings: ServeJobSettings, stopped: threading.Event) -> Iterator[str]:
    """The endpoint's address while it listens, of settings that are `checked`; it is not waited for once it is to be
    stopped. ClusterError where the cluster has no room, RuntimeError where it cannot be started."""
    cluster.start(settings.cluster)
    try:
        _start(settings, stopped)
        host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host
        yield f"http://{host}:{settings.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def checked(settings: ServeJobSettings) -> ServeJobSettings:
    """The settings, usable as far as can be told; on the loopback address tokens may be missing. Raises StartError."""
    if settings.checkpoint is None:
        raise StartError("checkpoint is not set; give --checkpoint with the folder of a trained discriminator")
    try:
        version_of(settings.checkpoint)
    except OSError as error:
        raise StartError(str(error)) from None
    if _is_loopback(settings.host):
        settings = settings.model_copy(update={"tokens": settings.tokens.model_copy(update={"anonymous": True})})
    _digests(settings)
    _check_port(settings.host, settings.port)
    return settings


def _digests(settings: ServeJobSettings) -> tuple[str, ...]:
    try:
        return load_digests(settings.tokens)
    except TokenError as error:
        raise StartError(str(error)) from None


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


def _start(settings: ServeJobSettings, stopped: threading.Event) -> None:
    replicas = settings.replicas
    bundles = (layout.Bundle(replicas.cpus, replicas.gpus),) * replicas.least
    groups = layout.Group("replica", bundles, "anywhere", f"replicas.least = {replicas.least}")
    placement.check([layout.Layout("serve", (groups,))], settings.cluster)
    named = {"checkpoint": settings.checkpoint, "tokens.file": settings.tokens.file}
    read = {setting: [path] for setting, path in named.items() if path is not None}
    require_shared(None, read, settings.cluster.pending_timeout_s)
    quiet = LoggingConfig(log_level=logging.WARNING, enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        controller_options={"runtime_env": {"env_vars": dict(CALLBACK)}},
        logging_config=quiet,
    )
    own = ServeSettings.model_validate({name: getattr(settings, name) for name in ServeSettings.model_fields})
    target = serve.RunTarget(application(own), settings.app, logging_config=quiet)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_running(settings, stopped)


def _await_running(settings: ServeJobSettings, stopped: threading.Event) -> None:
    """Return when the application runs, or is to be stopped; RuntimeError where it cannot run."""
    deadline = time.monotonic() + settings.start_timeout_s
    while not stopped.wait(_POLL_S):
        found = serve.status().applications.get(settings.app)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(f"the discriminator could not be served: {_last_line(found)}")
        if time.monotonic() > deadline:
            state = found.status.value if found else "not known to Serve"
            raise RuntimeError(
                f"waited {settings.start_timeout_s:g} s (start_timeout_s) for the discriminator to be served; the "
                f"application is {state}: has the cluster what replicas.cpus and replicas.gpus ask for?"
            )


def _last_line(found: ApplicationStatusOverview) -> str:
    """What Serve knows of the cause: the last line of the last traceback."""
    messages = [found.message, *(deployment.message for deployment in found.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["Serve does not say why"])[-1]


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
