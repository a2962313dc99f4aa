import pytest
import torch

from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.forward import final_hidden
from prism_ray.models.logprobs import response_logprobs


@pytest.fixture(scope="module")
def encoder(dense_folder):
    return Encoder(dense_folder, 300)


@pytest.fixture(scope="module")
def batch(encoder, prompts):
    generator = torch.Generator().manual_seed(0)
    encoded = encoder.prompts(prompts)
    sizes = [(0, 3), (1, 9), (3, 5), (1, 0)]
    return collate([Sample(encoded[p], torch.randint(260, 300, (n,), generator=generator)) for p, n in sizes])


def prompt_length(batch, b):
    """Of row b of a padded batch."""
    return int(batch.real_mask_BT[b].sum() - batch.response_mask_BR[b].sum())


def naive(model, batch, temperature=1.0, banned=()):
    """All logits at once, then picked row by row."""
    logits = model.lm_head(final_hidden(model, batch)) / temperature
    logits[..., list(banned)] = -torch.inf
    logp_BTV = logits.log_softmax(-1)
    logp_BR = torch.zeros(batch.response_ids_BR.shape)
    entropy_BR = torch.zeros(batch.response_ids_BR.shape)
    for b, r in batch.response_mask_BR.nonzero().tolist():
        row = logp_BTV[b, prompt_length(batch, b) - 1 + r]
        logp_BR[b, r] = row[batch.response_ids_BR[b, r]]
        entropy_BR[b, r] = torch.distributions.Categorical(logits=row).entropy()
    return logp_BR, entropy_BR


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_naive_form(policy, batch, temperature, chunk):
    ours, entropy = response_logprobs(policy, batch, temperature, chunk_tokens=chunk, entropy=True)
    expected, expected_entropy = naive(policy, batch, temperature)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=1e-4)
    assert not entropy.requires_grad
    assert response_logprobs(policy, batch)[1] is None


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_equal_the_naive_form(policy, batch, chunk):
    weights = torch.randn(batch.response_ids_BR.shape, generator=torch.Generator().manual_seed(0))
    (response_logprobs(policy, batch, chunk_tokens=chunk)[0] * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    (naive(policy, batch)[0] * weights).sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_of_entropies_equal_the_naive_form(policy, batch, chunk, encoder):
    banned = encoder.banned_ids
    weights = torch.randn(batch.response_ids_BR.shape, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.7, "chunk_tokens": chunk, "banned_ids": banned, "entropy": True}
    entropy = response_logprobs(policy, batch, entropy_gradient=True, **options)[1]
    (entropy * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    logits = (policy.lm_head(final_hidden(policy, batch)) / 0.7).index_fill(2, torch.tensor(banned), -1e9)
    rows = [(b, prompt_length(batch, b) - 1 + r) for b, r in batch.response_mask_BR.nonzero().tolist()]
    expected = torch.stack([torch.distributions.Categorical(logits=logits[b, t]).entropy() for b, t in rows])
    (expected * weights[batch.response_mask_BR]).sum().backward()
    torch.testing.assert_close(entropy[batch.response_mask_BR], expected, atol=1e-5, rtol=1e-5)
    for name, parameter in policy.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
        assert parameter.grad.norm() > 1e-4, name


def test_banned_tokens_take_no_probability(policy, batch, encoder):
    ours, entropy = response_logprobs(policy, batch, entropy=True, banned_ids=encoder.banned_ids)
    expected, expected_entropy = naive(policy, batch, banned=encoder.banned_ids)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=1e-4)
    assert (ours - response_logprobs(policy, batch)[0])[batch.response_mask_BR].min() > 0


def test_another_image_gives_other_logprobs(policy, encoder, ask, picture):
    one, other = encoder.prompts([ask("a", picture(0)), ask("a", picture(1))])
    response = torch.arange(260, 270)
    with torch.no_grad():
        logp = response_logprobs(policy, collate([Sample(one, response), Sample(other, response)]))[0]
    assert (logp[0] - logp[1]).abs().max() > 1e-2


def test_a_batch_without_response_tokens_gives_no_logprobs(policy, encoder, ask):
    batch = collate([Sample(encoder.prompt(ask("a")), torch.zeros(0, dtype=torch.int64))])
    logp, entropy = response_logprobs(policy, batch, entropy=True)
    assert logp.shape == (1, 0) and entropy.shape == (1, 0)
    logp.sum().backward()
