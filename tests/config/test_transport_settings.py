"""A transport that cannot work with the rest of the configuration is refused in a sentence."""

import pytest

from prism_ray.config.load import ConfigError, load_config
from prism_ray.config.run import RunSettings
from prism_ray.weights.transports import TRANSPORTS, Wire

GPUS = ["rollout.gpus_per_engine=1", "learner.gpus_per_rank=1"]
COLOCATED = [
    "cluster.layout=colocated", "rollout.sleep_level=1", "rollout.kv_cache_gb=1", "align.loop.max_staleness=0",
    "rlvr.loop.max_staleness=0",
]  # fmt: skip


@pytest.mark.parametrize("way", ["nccl", "sparse_nccl", "ipc", "sharded_rdt"])
def test_what_needs_gpus_says_which_side_has_none(way):
    with pytest.raises(ConfigError, match=f"{way} carries weights between GPUs, but rollout.gpus_per_engine is 0 and "):
        load_config(RunSettings, None, [f"rollout.weights={way}"])
    with pytest.raises(ConfigError, match="but learner.gpus_per_rank is 0; set it to shared_memory or gloo"):
        load_config(RunSettings, None, [f"rollout.weights={way}", GPUS[0]])
    shared = COLOCATED if way == "ipc" else []
    settings = load_config(RunSettings, None, [f"rollout.weights={way}", *GPUS, *shared])
    wire = Wire.of(settings.rollout)
    assert wire is not None and wire.transport == way in TRANSPORTS


def test_ipc_needs_the_layout_in_which_rank_and_engine_share_a_gpu():
    ipc = ["rollout.weights=ipc", *GPUS]
    with pytest.raises(ConfigError, match="ipc works within a GPU .* cluster.layout is split: .* set it to colocated"):
        load_config(RunSettings, None, ipc)
    with pytest.raises(ConfigError, match=r"learner.ranks is 1 and rollout.engines 2; make them equal"):
        load_config(RunSettings, None, [*ipc, *COLOCATED, "rollout.engines=2"])


def test_an_unknown_transport_is_refused_by_name():
    with pytest.raises(ConfigError, match="The setting rollout.weights is \"rdma\" but should be 'shared_memory', 'g"):
        load_config(RunSettings, None, ["rollout.weights=rdma"])


def test_what_works_anywhere_is_taken_and_carries_the_engines_own_numbers():
    assert Wire.of(load_config(RunSettings, None, []).rollout) is None
    settings = load_config(RunSettings, None, ["rollout.weights=gloo", "rollout.dtype=bfloat16"]).rollout
    assert Wire.of(settings) == Wire("gloo", "bfloat16", 256 * 2**20, settings.control_timeout_s)
