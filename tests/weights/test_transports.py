"""Each transport's two sides understand each other: what the learner says is what vLLM's engines take.

Between GPUs nothing has ever been sent: of `nccl`, `sparse_nccl`, `ipc` and `sharded_rdt` everything is shown here but
the sending itself. `gloo` sends.
"""

import importlib.util
import threading
from types import SimpleNamespace

import pytest
import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import layerwise_groups
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLTrainerWeightTransferEngine
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from prism_ray.learner.group import _free_address
from prism_ray.models.load import load_policy
from prism_ray.weights import gloo, ipc, sharded_rdt
from prism_ray.weights.files import checkpoint_files, shapes_in
from prism_ray.weights.sparse_nccl import SparseNcclSender
from prism_ray.weights.staging import Staging
from prism_ray.weights.transports import TRANSPORTS, Wire, make_sender, merged
from tests.weights.test_source import EXPERT, SHAPES, Whole

LINK = "rollout engine 0"
HERE = SimpleNamespace(data_parallel_index=0, world_size=2, rank=1, distributed_executor_backend="ray")
VLLM = SimpleNamespace(parallel_config=HERE, model_config=None)


class Policy:
    """A trainer that holds a policy whole."""

    def __init__(self, folder):
        self.model = load_policy(folder)

    def weight_shapes(self):
        return {name: (tuple(p.shape), p.dtype) for name, p in self.model.named_parameters()}

    def stream_weights(self):
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())


def sender(transport, folder, rank=0, trainer=None):
    wire = Wire(transport, "float32", 100_000, 30.0)
    made = make_sender(wire, trainer or Policy(folder), folder, rank, lambda: ("127.0.0.1", 29_999))
    made.stage()
    return made


def worker(transport, model=None):
    """vLLM's own engine of the backend, as a worker has it, without a device."""
    backend = TRANSPORTS[transport].backend
    model = model or torch.nn.Linear(1, 1)
    config = WeightTransferConfig(backend=backend)
    return WeightTransferEngineFactory.create_engine(config, VLLM, torch.device("cpu"), model)  # pyright: ignore


@pytest.fixture
def handles(monkeypatch):
    """Handles of buckets, without the GPU that gives them their names."""
    monkeypatch.setattr(ipc, "handle", lambda buffer: {"GPU-of-this-rank": (len(buffer),)})


@pytest.mark.parametrize("transport", ["gloo", "nccl", "sparse_nccl", "ipc"])
def test_what_the_learner_says_is_what_vllms_engine_takes(policies, handles, transport):
    folder = policies["dense"]
    learner, engine = sender(transport, folder), worker(transport)
    info = engine.parse_init_info(learner.prepare(LINK, workers=2))
    if transport in ("nccl", "sparse_nccl"):
        assert (info.master_address, info.master_port, info.world_size, info.rank_offset) == ("127.0.0.1", 29_999, 3, 1)
    if transport == "nccl":
        assert info.packed and info.packed_buffer_size_bytes == 100_000
    updates = learner.updates(LINK)
    parsed = [engine.parse_update_info(update) for update in updates]
    shapes = {name: tuple(shape) for part in parsed for name, shape in zip(part.names, part.shapes, strict=True)}
    assert shapes == shapes_in(checkpoint_files(folder)), "not every weight of the checkpoint, in its own layout"
    assert {dtype for part in parsed for dtype in part.dtype_names} == {"float32"}
    assert len(updates) == (1 if "nccl" in transport else len(learner.staging.buckets)) and len(updates) != 2
    if transport == "sparse_nccl":
        assert parsed[0].num_updates_list == [torch.Size(shape).numel() for shape in parsed[0].shapes], "the first time"


def test_experts_travel_as_checkpoints_hold_them(policies):
    folder = policies["mixture"]
    shapes = shapes_in(checkpoint_files(folder))
    (update,) = sender("nccl", folder).updates(LINK)
    said = dict(zip(update["names"], map(tuple, update["shapes"]), strict=True))
    experts = [name for name in shapes if ".experts." in name]
    assert experts and all(said[name] == shapes[name] for name in experts)
    own = Policy(folder).weight_shapes()
    assert all(own[name][0] != shapes[name] for name in experts), "nothing had to be transposed"


def test_a_mixture_is_refused_where_single_numbers_are_set(policies):
    with pytest.raises(ValueError, match="sparse_nccl carries dense policies only .*experts.*use nccl"):
        sender("sparse_nccl", policies["mixture"])


def test_every_rank_offers_its_own_handle_and_an_engine_gets_all(policies, monkeypatch):
    assert TRANSPORTS["ipc"].every_rank and not TRANSPORTS["nccl"].every_rank
    said = []
    for rank in (0, 1):
        monkeypatch.setattr(ipc, "handle", lambda buffer, rank=rank: {f"GPU-{rank}": (len(buffer),)})
        said.append(sender("ipc", policies["dense"], rank).updates(LINK))
    engine = worker("ipc")
    for update, single in zip(merged(said), said[0], strict=True):
        info = engine.parse_update_info(update)
        assert info.ipc_handles.keys() == {"GPU-0", "GPU-1"} and info.names == single["names"]
        assert sum(info.tensor_sizes) == info.ipc_handles["GPU-0"][0]
    with pytest.raises(ValueError, match="ranks offer weights in .+ and .+ parts"):
        merged([said[0], said[1][1:]])


def test_other_ranks_keep_no_copy_where_rank_0_sends(policies):
    assert not sender("nccl", policies["dense"], rank=1).staging.buckets
    assert sender("ipc", policies["dense"], rank=1).staging.buckets


class Plain(torch.nn.Module):
    """A model whose loader copies whole tensors, as vLLM's sparse updates require."""

    def __init__(self, tensors):
        super().__init__()
        self.held = {name: tensor.clone() for name, tensor in tensors.items()}

    def load_weights(self, weights):
        loaded = set()
        for name, tensor in weights:
            self.held[name].copy_(tensor)
            loaded.add(name)
        return loaded


def test_a_change_is_what_differs_and_put_over_the_old_weights_it_gives_the_new():
    trainer = Whole()
    del trainer.weights[EXPERT], trainer.declared[EXPERT]
    shapes = {name: shape for name, shape in SHAPES.items() if name != EXPERT}
    learner = SparseNcclSender(Wire("sparse_nccl", "float32", 64, 30.0), trainer, shapes, 0, _free_local)
    learner.stage()
    before = {name: tensor.clone() for name, tensor in learner.staging}
    model = Plain(before)
    assert learner.updates(LINK)[0]["num_updates_list"] == [t.numel() for t in before.values()]
    trainer.weights["a"][0, 1] += 1
    trainer.weights["b"] += 1e-9  # too little for its type
    learner.stage()
    learner._holds[LINK] = 1  # it has taken the weights before these
    (update,) = learner.updates(LINK)
    assert (update["names"], update["num_updates_list"]) == (["a"], [1])
    patches = learner._patches[LINK]
    for patch in patches:
        SparseNCCLTrainerWeightTransferEngine._validate_patch(patch)
    given = [CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices) for p in patches]
    load_checkpoint_weight_patches(model, given)
    assert all(torch.equal(model.held[name], tensor) for name, tensor in learner.staging)
    assert not all(torch.equal(before[name], tensor) for name, tensor in learner.staging)


def test_an_engine_that_missed_weights_gets_every_number(policies):
    learner = sender("sparse_nccl", policies["dense"])
    everything = learner.updates(LINK)[0]["num_updates_list"]
    learner._holds[LINK] = 1
    learner.stage()
    assert learner.updates(LINK) == [], "nothing has changed"
    for held in (None, 1):
        learner._holds = {} if held is None else {LINK: held}
        learner.stage()
        assert learner.updates(LINK)[0]["num_updates_list"] == everything


def test_the_sliced_transport_needs_nixl_and_says_so(policies):
    if importlib.util.find_spec("nixl") is not None:
        pytest.skip("nixl is there")
    with pytest.raises(ValueError, match="sharded_rdt needs the package nixl"):
        sender("sharded_rdt", policies["dense"])


def test_the_sliced_transport_orders_weights_as_vllm_insists_on(policies):
    folder = policies["mixture"]
    staging = Staging(Policy(folder), shapes_in(checkpoint_files(folder)), torch.float32, 100_000)
    staging.fill()
    ordered = sharded_rdt.LayerByLayer(staging)
    names = [meta.name for meta in ordered.metadata()]
    assert [name for group in layerwise_groups(names) for name in group] == names
    assert names != [meta.name for meta in staging.metadata()], "the policy's own order would have done"
    everything = dict(staging)
    assert all(torch.equal(tensor, everything[name]) for name, tensor in ordered) and set(names) == everything.keys()
    for names, tensors in ordered.iter_groups():
        assert len(names) == len(tensors)


class Taking(torch.nn.Module):
    """Takes what it is given, as a vLLM model does."""

    def __init__(self):
        super().__init__()
        self.taken = {}

    def load_weights(self, weights):
        new = {name: tensor.clone() for name, tensor in weights}
        self.taken |= new
        return set(new)


def test_gloo_carries_every_weight_to_all_workers_of_an_engine(policies):
    """Rank 0 of the learner here, two workers in threads of their own."""
    wire = Wire("gloo", "float32", 100_000, 30.0)
    shapes = shapes_in(checkpoint_files(policies["dense"]))
    learner = gloo.GlooSender(wire, Policy(policies["dense"]), shapes, 0, _free_local)
    learner.stage()
    info = learner.prepare(LINK, workers=2)
    updates = learner.updates(LINK)
    models = [Taking(), Taking()]

    def take(rank):
        place = SimpleNamespace(data_parallel_index=0, world_size=2, rank=rank)
        config = SimpleNamespace(parallel_config=place, model_config=None)
        said = WeightTransferConfig(backend=gloo.BACKEND), config, torch.device("cpu"), models[rank]
        engine = gloo.GlooWeightTransferEngine(*said)  # pyright: ignore
        engine.init_transfer_engine(engine.parse_init_info(info))
        engine._loaded = set()
        for update in updates:
            engine.receive_weights(engine.parse_update_info(update))
        engine.shutdown()

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    learner.meet(LINK)
    learner.send(LINK)
    for thread in threads:
        thread.join(60)
    for model in models:
        assert model.taken.keys() == dict(learner.staging).keys()
        assert all(torch.equal(model.taken[name], tensor) for name, tensor in learner.staging)


def _free_local():
    return "127.0.0.1", _free_address()[1]
