"""Variants of the judge: dense, without images, routed by view; and what a saved folder of each gives back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from prism_ray.config.discriminator import SCORING_FIELDS
from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.model import (
    CARD_FILE,
    HEAD_FILE,
    create_discriminator,
    load_discriminator,
    save_discriminator,
)
from prism_ray.discriminator.scorer import group_views, judge, score_sequences
from prism_ray.discriminator.segments import judged_batch, judged_of
from prism_ray.models.batch import collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy

TAGS = ("caption", "think", "answer")
THREE = tuple(ViewSettings(name=f"{tag}_view", tags=(tag,), context="none") for tag in TAGS)
VARIANTS = {
    "moe": {},
    "dense": {"backbone": "dense"},
    "text-only": {"sees_images": False},
    "routed by view": {"routing": "view"},
    "three views": {"views": THREE, "routing": "view"},
}
EACH = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


class ByteEncoder(Encoder):
    """Tokenises responses byte by byte: tags are then many tokens, as they are for Qwen3-VL's own tokenizer."""

    def response(self, text: str) -> list[int]:
        return [*(self.pieces.index(bytes([byte])) for byte in text.encode()), self.end_id]


@pytest.fixture
def some(group_of, response):
    texts = [response(" blue", " two"), response(), response(" red one", " count two"), response(" blue", " count")]
    return [group_of(seed, response(), *texts) for seed in range(2)]


def stirred(model):
    """The model with a view embedding that matters."""
    if model.view_embedding is not None:
        with torch.no_grad():
            model.view_embedding.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    return model


def all_sequences(groups, encoder, settings):
    cut = group_views(groups, encoder, settings)
    return [s for views in cut for r in (views.reference, *views.rollouts) for s in r.sequences.values()]


def verdicts(model, encoder, groups):
    return [v for j in judge(model, encoder, groups, 0) for v in j.group.verdicts]


@EACH
def test_a_saved_folder_alone_gives_identical_verdicts(build, encoder, some, tiny_folder, tmp_path, changes):
    model = stirred(build(**changes))
    save_discriminator(dict(model.named_parameters()), model, tmp_path, like=tiny_folder)
    again = load_discriminator(tmp_path).eval()
    assert again.settings == model.settings
    assert verdicts(again, Encoder(tmp_path, 128), some) == verdicts(model, encoder, some)


@EACH
def test_a_judge_created_in_a_folder_is_the_one_built_in_memory(settings, build, tiny_folder, tmp_path, changes):
    create_discriminator(tiny_folder, tmp_path, settings.model_copy(update=changes), seed=0)
    found = dict(load_discriminator(tmp_path).named_parameters())
    expected = dict(build(**changes).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@EACH
def test_every_variant_trains_and_goes_on_from_what_it_exported(train, groups, tiny_folder, tmp_path, changes):
    trainer = train(**changes)
    made = groups()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.learn(made, warming=True)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert {"head.weight", "backbone.model.language_model.layers.0.self_attn.q_proj.weight"} <= moved
    assert ("view_embedding.weight" in moved) == (trainer.settings.routing == "view")
    trainer.export(tmp_path, like=tiny_folder)
    again = load_discriminator(tmp_path).eval()
    assert verdicts(again, trainer.encoder, made) == verdicts(trainer.model, trainer.encoder, made)


def test_a_dense_judge_is_the_policy_itself_and_has_no_router(build, tiny_folder, train, groups):
    model, policy = build(backbone="dense"), load_policy(tiny_folder)
    assert type(model.backbone) is type(policy)
    weights = policy.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in model.backbone.state_dict().items())
    metrics = train(backbone="dense").learn(groups(), warming=True)
    assert metrics["discriminator/loss"] > 0 and not [name for name in metrics if "router" in name]


def test_a_text_only_judge_sees_no_image_and_another_judge_does(build, encoder, group_of, response):
    for sees, differ in ((True, True), (False, False)):
        model = build(sees_images=sees)
        one, other = (verdicts(model, encoder, [group_of(seed, response(), response(" blue"))])[0] for seed in (0, 1))
        assert (one.scores != other.scores) == differ
    blind = build(sees_images=False)
    (views,) = group_views([group_of(0, response(), response())], encoder, blind.settings)
    prompt = views.reference.sequences["perception"].prompt
    assert not len(prompt.visual_spots) and not len(prompt.grid_thw)
    text = b"".join(encoder.pieces[i] for i in prompt.token_ids).decode()
    assert "count red" in text and "<image>" not in text


def test_a_new_view_embedding_changes_no_score(build, encoder, some):
    plain, routed = build(), build(routing="view")
    assert verdicts(routed, encoder, some) == verdicts(plain, encoder, some)


def test_the_router_goes_by_the_view_and_the_experts_by_what_they_read(build, encoder, some):
    model = build(routing="view")
    judged = judged_batch(all_sequences(some, encoder, model.settings))
    before: list[torch.Tensor] = []
    model(judged, before)
    after: list[torch.Tensor] = []
    stirred(model)(judged, after)
    labelled = judged.labels_N >= 0
    assert {-1, 0, 1} == set(judged.labels_N.tolist())
    gate = model.backbone.model.language_model.layers[0].mlp.gate.weight
    assert model.view_embedding is not None
    shift_NE = model.view_embedding(judged.labels_N.clamp(min=0)) @ gate.T
    torch.testing.assert_close((after[0] - before[0])[labelled], shift_NE[labelled], rtol=1e-4, atol=1e-5)
    assert torch.equal(after[0][~labelled], before[0][~labelled]), "the first layer: later ones read other states"


@pytest.mark.parametrize("context", ["none", "own", "reference"])
@pytest.mark.parametrize("kind", [Encoder, ByteEncoder], ids=["tags as tokens", "tags as bytes"])
def test_sharing_and_packing_move_no_score_that_is_routed_by_view(build, tiny_folder, some, kind, context):
    views = tuple(v.model_copy(update={"context": context}) for v in THREE)
    model = stirred(build(views=views, routing="view", max_segment_tokens=40))
    sequences = all_sequences(some, kind(tiny_folder, 128), model.settings)
    with torch.no_grad():
        alone = torch.cat([model(judged_of(collate([s.sample]), [s])).score_B for s in sequences])
        padded = model(judged_of(collate([s.sample for s in sequences]), sequences)).score_B
        packed = model(judged_batch(sequences)).score_B
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score_sequences(model, sequences), alone, rtol=1e-5, atol=1e-5)
    scores = score_sequences(build(views=views, routing="token", max_segment_tokens=40), sequences)
    assert (scores - alone).abs().max() > 1e-3, "the embedding matters"


def test_gradient_checkpointing_computes_the_shift_anew(build, encoder, some):
    model = stirred(build(routing="view"))
    judged = judged_batch(all_sequences(some, encoder, model.settings))
    other = judged_batch(all_sequences(some[:1], encoder, model.settings))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(judged).score_B.sum()
        model(other)  # what came last must not be what is computed anew
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.train()
    model.dropout.p = 0.0
    model.backbone.gradient_checkpointing_enable()
    found = gradients()
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(build, tiny_folder, tmp_path):
    model = build()
    save_discriminator(dict(model.named_parameters()), model, tmp_path / "judge", like=tiny_folder)
    return tmp_path / "judge"


def test_the_folder_holds_views_and_template(saved, encoder):
    card = json.loads((saved / CARD_FILE).read_text())
    assert card["views"] == [
        {"name": "perception", "tags": ["caption"], "weight": 1.0, "context": "own"},
        {"name": "reasoning", "tags": ["think", "answer"], "weight": 1.0, "context": "own"},
    ]
    assert card["template"]["chat_template"] == encoder.processor.chat_template
    assert "the head reads the end token" in card["template"]["sequence"]
    assert card["template"]["end_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "views", [THREE, (ViewSettings(name="whole", tags=TAGS),), (ViewSettings(name="perception", tags=("caption",)),)]
)
def test_other_views_are_refused(saved, settings, views):
    with pytest.raises(
        ValueError, match=r"discriminator.views are .* trained with perception \(caption; own\), .*again"
    ):
        load_discriminator(saved, settings.model_copy(update={"views": views}))


def test_other_weights_of_the_views_are_not(saved, settings):
    lighter = tuple(v.model_copy(update={"weight": 0.5 * i}) for i, v in enumerate(settings.views))
    assert load_discriminator(saved, settings.model_copy(update={"views": lighter})).settings.views == lighter


@pytest.mark.parametrize(
    ("field", "value"),
    [("backbone", "dense"), ("routing", "view"), ("sees_images", False), ("head_weight", 2.0), ("score_clip", 1.0),
     ("likelihood_weight", 0.0), ("length_debias", 0.1), ("max_segment_tokens", 7)],
)  # fmt: skip
def test_what_else_decides_a_score_is_refused_by_name(saved, settings, field, value):
    assert field in SCORING_FIELDS
    with pytest.raises(ValueError, match=f"discriminator.{field} is {value} but .* warm up again"):
        load_discriminator(saved, settings.model_copy(update={field: value}))


def test_a_folder_whose_template_was_changed_is_refused(saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    (template,) = other.glob("chat_template*")
    template.write_text("Hello. " + template.read_text())
    with pytest.raises(ValueError, match="its chat template is not the one that it was trained with"):
        load_discriminator(other)


def test_a_card_or_head_that_does_not_fit_is_refused(saved):
    card = json.loads((saved / CARD_FILE).read_text())
    (saved / CARD_FILE).write_text(json.dumps(card | {"settings": card["settings"] | {"reasoning_context": "own"}}))
    with pytest.raises(ValueError, match=r"settings are not of this version \(reasoning_context: .*\); warm up again"):
        load_discriminator(saved)
    (saved / CARD_FILE).write_text(json.dumps(card | {"settings": card["settings"] | {"routing": "view"}}))
    with pytest.raises(ValueError, match=f"{HEAD_FILE} holds .*, which is not what its card says"):
        load_discriminator(saved)
