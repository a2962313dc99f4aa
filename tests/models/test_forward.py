import pytest
import torch

from prism_ray.models.batch import Sample, collate, microbatches
from prism_ray.models.encode import Encoder
from prism_ray.models.forward import final_hidden


@pytest.fixture(scope="module")
def samples(dense_folder, prompts):
    encoded = Encoder(dense_folder, 300).prompts(prompts)
    generator = torch.Generator().manual_seed(0)
    sizes = [(0, 3), (1, 9), (2, 1), (3, 5), (1, 4), (1, 0)]
    return [Sample(encoded[p], torch.randint(20, 300, (n,), generator=generator)) for p, n in sizes]


def hugging_face_hidden(model, sample):
    """The model's own forward on one sample."""
    ids = torch.cat((sample.prompt.token_ids, sample.response_ids))[None]
    kinds = torch.zeros_like(ids)
    kinds[0, sample.prompt.visual_spots] = 1
    model.model.rope_deltas = None
    images = {}
    if len(sample.prompt.grid_thw):
        images = {
            "pixel_values": sample.prompt.pixel_values,
            "image_grid_thw": sample.prompt.grid_thw,
            "mm_token_type_ids": kinds,
        }
    return model.model(input_ids=ids, use_cache=False, **images).last_hidden_state[0]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_batch_equals_one_by_one_values_and_gradients(policy, samples):
    hidden_BTD = final_hidden(policy, collate(samples))
    weights = torch.randn(hidden_BTD.shape[-1], generator=torch.Generator().manual_seed(1))
    sum((hidden_BTD[i, : s.length] @ weights).tanh().sum() for i, s in enumerate(samples)).backward()
    ours = gradients(policy)
    policy.zero_grad()
    for row, sample in enumerate(samples):
        alone = hugging_face_hidden(policy, sample)
        torch.testing.assert_close(hidden_BTD[row, : sample.length], alone, atol=1e-5, rtol=1e-5)
        (alone @ weights).tanh().sum().backward()
    theirs = gradients(policy)
    for name, gradient in theirs.items():
        scale = gradient.abs().max() + 1e-3
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: n + m)


def test_microbatches_equal_the_whole_batch(policy, samples):
    with torch.no_grad():
        whole = final_hidden(policy, collate(samples))
        for batch in microbatches(samples, 64):
            part = final_hidden(policy, batch)
            for row, index in enumerate(batch.indices):
                size = samples[index].length
                torch.testing.assert_close(part[row, :size], whole[index, :size], atol=1e-5, rtol=1e-5)


def test_the_image_matters_and_only_to_its_own_sample(policy, dense_folder, ask, picture):
    encoder = Encoder(dense_folder, 300)
    one, other = encoder.prompts([ask("a", picture(0)), ask("a", picture(1))])
    response = torch.arange(30, 40)
    with torch.no_grad():
        before = final_hidden(policy, collate([Sample(one, response), Sample(one, response)]))
        after = final_hidden(policy, collate([Sample(one, response), Sample(other, response)]))
    assert torch.allclose(before[0], after[0], atol=1e-5)
    assert (before[1] - after[1]).abs().max() > 1e-2


def test_text_alone_still_reaches_the_vision_tower_with_gradient_zero(policy, samples):
    final_hidden(policy, collate(samples[:1])).sum().backward()
    vision = [p.grad for p in policy.model.visual.parameters()]
    reached = [g for g in vision if g is not None]
    assert len(reached) == len(vision)
    assert all(g.abs().max() == 0 for g in reached)


def test_text_alone_runs_the_vision_tower_without_gradients_too(policy, samples):
    """Under ZeRO-3 its weights are gathered by all ranks at once, whatever their batches hold."""
    runs = []
    policy.model.visual.merger.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        final_hidden(policy, collate(samples[:1]))
    assert runs == [1]


def test_gradient_checkpointing_reaches_the_batched_vision_tower(policy, dense_folder, ask, picture):
    """The tower's blocks run again in the backward pass, and the gradients are the same."""
    prompts = Encoder(dense_folder, 300).prompts([ask("a", picture(0)), ask("b", picture(1))])
    batch = collate([Sample(prompt, torch.arange(30, 40)) for prompt in prompts])
    runs = []
    blocks = policy.model.visual.blocks
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    found = []
    for passes in (1, 2):
        runs.clear()
        final_hidden(policy, batch).tanh().sum().backward()
        assert len(runs) == passes * len(blocks)
        found.append(gradients(policy))
        policy.zero_grad()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_router_logits_of_every_layer_come_out(moe_folder, samples):
    from prism_ray.models.load import load_policy

    logits = []
    batch = collate(samples)
    hidden = final_hidden(load_policy(moe_folder), batch, logits)
    assert hidden.shape[:2] == batch.input_ids_BT.shape
    assert [tuple(x.shape) for x in logits] == [(batch.computed_tokens, 4)] * 4
