"""Policies trained on two ranks under ZeRO-3, as they leave the learner: `python rank_program.py jobs.json`.

Every job names a policy's folder, a folder for what comes out, and a precision. One optimiser step is taken, and then
there are: `export`, as `LearnerRank.export` writes it; `source/model.safetensors`, what `TrainerWeights` yields to the
sender, and `wire/model.safetensors`, the same in bfloat16; and `seen.pt`, what the tests ask about.
"""

import json
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from prism_ray.config.learner import OptimiserSettings
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy, save_weights
from prism_ray.models.logprobs import response_logprobs
from prism_ray.records import Prompt
from prism_ray.weights.files import checkpoint_files, shapes_in
from prism_ray.weights.source import TrainerWeights

WORLD = 2


def surprise(module, batch):
    return -response_logprobs(module, batch)[0].mean() / WORLD


def trained(policy, precision):
    """An engine whose weights have left those of the folder, every tensor a little."""
    model = load_policy(policy, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * (index % 7 - 3) * parameter.abs().mean())
    engine = TrainEngine(model, OptimiserSettings(zero_stage=3, precision=precision, lr=1e-3))
    before = engine.weights()
    source = TrainerWeights(engine, shapes_in(checkpoint_files(policy)))
    first = dict(source)
    prompt = Encoder(policy, 100).prompt(Prompt("p", ({"role": "user", "content": " max of red"},), ()))
    engine.backward(engine.run(surprise, collate([Sample(prompt, torch.arange(260, 270))])))
    engine.step()
    for parameter in engine.module.parameters():
        parameter.partition()  # which ZeRO-3 spares parameters as small as these
    return engine, source, before, first


def send(source, rank):
    """What rank 0 would broadcast, through vLLM's own checks; rank 1 is a rank of vLLM's engine that does not send."""
    if rank == 0:
        return dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    info = NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=1, world_size=2, rank=rank)
    NCCLTrainerWeightTransferEngine.trainer_init(info, client=None, source=source).send_weights()  # pyright: ignore
    return {}


def run(job, rank):
    engine, source, before, first = trained(job["policy"], job["precision"])
    whole = [name for name, parameter in engine.module.named_parameters() if parameter.numel()]
    sent = send(source, rank)
    wire = dict(TrainerWeights(engine, shapes_in(checkpoint_files(job["policy"])), torch.bfloat16))
    weights = engine.weights()
    if rank == 0:
        out = Path(job["out"])
        save_weights(weights, out / "export", like=job["policy"])
        for name, tensors in (("source", sent), ("wire", wire)):
            (out / name).mkdir()
            save_file(tensors, out / name / "model.safetensors")
        declared = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        yielded = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()]
        seen = {"declared": declared, "yielded": yielded, "whole": whole, "first": first, "before": before}
        torch.save(seen | {"weights": weights}, out / "seen.pt")
    engine.destroy()


def rank_main(rank, port, jobs):
    torch.set_num_threads(1)
    init_process_group(rank, WORLD, "127.0.0.1", port, 60)
    for job in jobs:
        run(job, rank)


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_main, (port, json.loads(Path(sys.argv[1]).read_text())), nprocs=WORLD)


if __name__ == "__main__":
    main()
