"""The endpoint's Python client: `Client` and `AsyncClient`.

It lives in `prism_ray.endpoint`, a floor below, because training runs ask a served discriminator through it too.
"""

from __future__ import annotations

from prism_ray.endpoint.client import AsyncClient, Client
from prism_ray.endpoint.wire import EndpointError

__all__ = ["AsyncClient", "Client", "EndpointError"]
