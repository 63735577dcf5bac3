"""RefTRModel and RefTRForVisualGrounding: invariances of the answer, freezing, parameter counts, learning."""

import pytest
import torch
from torch import nn

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRModel
from tests.helpers.tiny import TINY_MODEL, TINY_TEXT
from training_reftr.data import GroundingCollator


@pytest.fixture
def batch(shapes, processor):
    """Collate three images with their sentences, one phrase or several."""
    return GroundingCollator(processor)([shapes["test"][index] for index in range(3)])


def model_inputs(batch):
    return {name: value for name, value in batch.items() if name not in ("targets", "labels")}


def single_inputs(processor, shapes):
    rows = [shapes["test"][index] for index in range(3)]
    texts = [[sentence["text"] for sentence in row["sentences"][:3]] for row in rows]
    return dict(processor([row["image"] for row in rows], texts))


def assert_same_boxes(outputs, expected, where=None):
    ours, theirs = outputs.pred_boxes, expected.pred_boxes
    where = expected.phrase_mask if where is None else where
    torch.testing.assert_close(ours[:, : theirs.shape[1]][where], theirs[where], atol=1e-5, rtol=0)


# inputs that do not change an answer


def test_model_ignores_text_padding(processor, shapes, make_model):
    model, inputs = make_model(), single_inputs(processor, shapes)
    padded = {**inputs}
    for name in ("input_ids", "attention_mask"):
        padded[name] = nn.functional.pad(inputs[name], (0, 7))
    assert_same_boxes(model(**padded), model(**inputs))


def test_model_ignores_phrase_padding(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    padded = {**inputs}
    padded["phrase_input_ids"] = nn.functional.pad(inputs["phrase_input_ids"], (0, 2, 0, 3))
    padded["phrase_attention_mask"] = nn.functional.pad(inputs["phrase_attention_mask"], (0, 2, 0, 3))
    padded["phrase_attention_mask"][:, -3:, :2] = 1  # [CLS] [SEP]
    padded["phrase_spans"] = nn.functional.pad(inputs["phrase_spans"], (0, 0, 0, 3))
    padded["phrase_spans"][:, -3:, 1] = 1
    outputs = model(**padded)
    assert outputs.phrase_mask[:, -3:].any().item() is False
    assert_same_boxes(outputs, model(**inputs))
    padded.pop("phrase_index")  # it lists the real phrases
    outputs = model(**padded)
    assert outputs.phrase_mask[:, -3:].any().item() is False
    assert_same_boxes(outputs, model(**inputs))


def test_model_gives_same_boxes_for_grouped_and_repeated_images(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    repeated = {**inputs}
    image_index = repeated.pop("image_index")
    for name in ("pixel_values", "pixel_mask"):
        repeated[name] = inputs[name][image_index]
    assert_same_boxes(model(**repeated), model(**inputs))


def test_model_answers_sentences_of_batch_independently(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    expected = model(**inputs)
    for index in range(len(inputs["input_ids"])):
        alone = {name: value[index : index + 1] for name, value in inputs.items() if not name.startswith("pixel")}
        alone["image_index"] = torch.zeros(1, dtype=torch.long)
        alone.pop("phrase_index", None)  # it numbers the phrases of the complete batch
        image = inputs["image_index"][index]
        alone |= {name: inputs[name][image : image + 1] for name in ("pixel_values", "pixel_mask")}
        torch.testing.assert_close(
            model(**alone).pred_boxes[0], expected.pred_boxes[index], atol=1e-5, rtol=0, msg=str(index)
        )


def test_expression_gives_same_boxes_as_single_phrase(processor, shapes, make_model):
    model, row = make_model(), shapes["test"][0]
    texts = [sentence["text"] for sentence in row["sentences"]]
    single = processor(row["image"], texts)
    phrases = processor(row["image"], texts, phrases=[[text] for text in texts])
    assert_same_boxes(model(**phrases), model(**single))


# inputs that change an answer


def test_model_answer_depends_on_text_and_image(processor, shapes, make_model):
    model = make_model()
    answers = [
        model(**processor(shapes["test"][index]["image"], text)).pred_boxes
        for index, text in ((0, "the red star"), (0, "the leftmost circle"), (1, "the red star"))
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    assert (answers[0] - answers[2]).abs().max() > 1e-4


# freezing


def frozen_names(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize(
    ("backbone_config", "boundaries"),
    [
        ({"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}, ("_backbone.layer1.", "_backbone.layer2.")),
        ({"backbone": "test_convnext", "out_indices": [0, 1, 2, 3]}, ("_backbone.stages_0.", "_backbone.stages_1.")),
        (
            {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            ("encoder.stages.0.", "encoder.stages.1."),
        ),
    ],
)
def test_model_freezes_stem_and_stages_also_after_loading(make_model, tmp_path, backbone_config, boundaries, stages):
    model = make_model(
        backbone_config=backbone_config, num_frozen_backbone_stages=stages, freeze_backbone_batch_norm=True
    )
    frozen = frozen_names(model)
    backbone = [name for name, _ in model.named_parameters() if name.startswith("model.backbone.")]
    later = boundaries[stages:]
    assert frozen <= set(backbone)
    assert not any(name.startswith(f"model.backbone.{prefix}") for prefix in later for name in frozen)
    if stages == 0:
        assert not frozen
    else:
        assert backbone[0] in frozen  # the stem
        inside = [name for name in backbone if name.startswith(f"model.backbone.{boundaries[stages - 1]}")]
        assert inside
        assert set(inside) <= frozen
    model.save_pretrained(tmp_path)
    assert frozen_names(RefTRForVisualGrounding.from_pretrained(tmp_path)) == frozen
    loaded, info = RefTRForVisualGrounding.from_pretrained(tmp_path, output_loading_info=True)
    assert frozen_names(loaded) == frozen
    assert not info["missing_keys"]
    assert {f"model.{name}" for name in frozen_names(RefTRModel.from_pretrained(tmp_path))} == frozen


def test_model_rejects_too_many_frozen_stages(make_model):
    with pytest.raises(ValueError, match="num_frozen_backbone_stages=7, but 4 stages"):
        make_model(num_frozen_backbone_stages=7)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_never_trains(processor, shapes, make_model, frozen):
    backbone = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4], "output_stride": 8}
    model = make_model(backbone_config=backbone, freeze_backbone_batch_norm=frozen)
    inputs = single_inputs(processor, shapes)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name or ".bn" in name}
    evaluated = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    model.train()
    model.model.backbone.train()
    trained = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    boxes = torch.rand(len(inputs["input_ids"]), 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=[{"boxes": box} for box in boxes]).loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert before
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    assert same is frozen
    assert torch.allclose(evaluated, trained) is frozen


# published parameter counts


@pytest.mark.parametrize(
    ("backbone", "text", "total", "trainable"),
    [
        ("resnet50", {"model_type": "bert"}, 151_981_508, 151_759_108),
        ("resnet101", {"model_type": "bert"}, 170_921_412, None),
        (
            "resnet50",
            {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
            167_144_900,
            None,
        ),
    ],
)
def test_model_has_published_parameter_counts(backbone, text, total, trainable):
    config = RefTRConfig(backbone_config={"backbone": backbone, "out_indices": [1, 2, 3, 4]}, text_config=text)
    with torch.device("meta"):
        model = RefTRForVisualGrounding(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    if trainable is not None:
        assert model.num_parameters(only_trainable=True) == trainable


# edge cases


def test_model_with_empty_text_gives_finite_masked_answers(processor, make_model):
    model = make_model().train()
    tokenizer = processor.tokenizer
    empty = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    pixel_values = torch.randn(1, 3, 1, 1)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        single = model(
            pixel_values=pixel_values, input_ids=torch.tensor([empty]), labels=[{"boxes": torch.rand(1, 4)}]
        )
        several = model(
            pixel_values=pixel_values,
            input_ids=torch.tensor([empty]),
            phrase_input_ids=torch.tensor([[empty, empty]]),
            phrase_spans=torch.tensor([[[0, 1], [0, 0]]]),
            labels=[{"boxes": torch.rand(2, 4)}],
        )
        for outputs in (single, several):
            assert outputs.pred_boxes.isfinite().all()
            assert not outputs.phrase_mask.any()
            assert outputs.loss == 0
            outputs.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_give_same_boxes(batch, make_model, attention):
    model, inputs = make_model(), model_inputs(batch)
    expected = model(**inputs)
    model.set_attn_implementation(attention)
    assert_same_boxes(model(**inputs), expected)


def test_learned_positions_index_row_and_column_and_reject_large_maps(processor, shapes, make_model):
    model = make_model(position_embedding_type="learned", max_image_positions=8)
    assert model(**single_inputs(processor, shapes)).pred_boxes.isfinite().all()
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    embedding = model.model.image_position_embedding
    cells = embedding(mask)[0].unflatten(0, (3, 5))
    assert torch.equal(
        cells[2, 4], torch.cat((embedding.column_embeddings.weight[4], embedding.row_embeddings.weight[2]))
    )
    for size in ((80, 64), (64, 80)):
        with pytest.raises(ValueError, match="max_image_positions=8"):
            model(pixel_values=torch.zeros(1, 3, *size), input_ids=torch.tensor([[2, 5, 3]]))


def test_model_returns_hidden_states_and_attentions_on_request(batch, make_model):
    model = make_model()
    model.set_attn_implementation("eager")
    outputs = model(**model_inputs(batch), output_hidden_states=True, output_attentions=True)
    sentences, slots = outputs.phrase_mask.shape
    tokens = outputs.encoder_last_hidden_state.shape[1]
    assert [len(outputs.encoder_hidden_states), len(outputs.decoder_hidden_states)] == [2, 3]
    assert outputs.encoder_attentions[0].shape == (sentences, 2, tokens, tokens)
    assert outputs.decoder_attentions[1].shape == (sentences, 2, slots, slots)
    assert outputs.cross_attentions[1].shape == (sentences, 2, slots, tokens)
    plain = model(**model_inputs(batch))
    assert plain.encoder_attentions is None
    assert len(plain.to_tuple()) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "`input_ids` of shape .* is required"),
        ({"image_index": None}, "give `image_index`, or one sentence per image"),
        ({"image_index": torch.zeros(2, dtype=torch.long)}, "`image_index` must have shape"),
        ({"attention_mask": torch.ones(1, 1)}, "must both have shape"),
        ({"pixel_mask": torch.ones(1, 2, 2)}, "for `pixel_values` of shape"),
        ({"pixel_values": torch.ones(3, 64, 64)}, "must have shape \\(images, channels, height, width\\)"),
        ({"phrase_spans": None}, "belong together"),
        ({"phrase_spans": torch.zeros(1, 1, 2)}, "must have shape \\(sentences, phrases, 2\\)"),
        ({"phrase_attention_mask": torch.ones(1, 1, 1)}, "must have the shape of `phrase_input_ids`"),
        ({"labels": [{"boxes": torch.rand(1, 4)}]}, "1 labels for"),
    ],
)
def test_model_rejects_inconsistent_inputs(batch, make_model, change, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**model_inputs(batch), **change})


def test_model_rejects_too_many_boxes_and_tokens(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    labels = [{"boxes": torch.rand(9, 4)} for _ in inputs["input_ids"]]
    with pytest.raises(ValueError, match="at most 3 phrases"):
        model(**inputs, labels=labels)
    tokens = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="65 tokens per sentence, more than max_text_positions=64"):
        model(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=tokens)
    assert model(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=tokens[:, :64]).phrase_mask.all()


def test_model_without_pixel_mask_assumes_no_padding(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    inputs["pixel_mask"] = torch.ones_like(inputs["pixel_mask"])
    expected = model(**inputs)
    del inputs["pixel_mask"]
    assert torch.equal(model(**inputs).pred_boxes, expected.pred_boxes)


def test_model_rejects_text_encoder_without_pooled_output():
    with pytest.raises(ValueError, match="no pooled output"):
        RefTRForVisualGrounding(
            RefTRConfig(**{**TINY_MODEL, "text_config": {"model_type": "distilbert", "n_layers": 1}})
        )


# losses


def test_loss_counts_real_phrases_and_divides_by_sentences(batch, make_model):
    model, inputs, labels = make_model(), model_inputs(batch), batch["labels"]
    outputs = model(**inputs, labels=labels)
    expected = sum(
        (outputs.pred_boxes[index, slot] - box).abs().sum()
        for index, label in enumerate(labels)
        for slot, box in enumerate(label["boxes"])
    )
    torch.testing.assert_close(outputs.loss_dict["loss_bbox"], expected / len(labels))
    assert set(outputs.loss_dict) == {"loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0"}
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    halved = model(**inputs, labels=labels, num_items_in_batch=2 * len(labels))
    torch.testing.assert_close(halved.loss, outputs.loss / 2)
    without_last = [{"boxes": label["boxes"][:-1]} for label in labels]
    assert model(**inputs, labels=without_last).loss < outputs.loss


def test_saved_model_gives_same_answer(batch, make_model, tmp_path):
    model, inputs = make_model(), model_inputs(batch)
    model.save_pretrained(tmp_path)
    loaded = RefTRForVisualGrounding.from_pretrained(tmp_path).eval()
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in saved.items())
    assert_same_boxes(loaded(**inputs), model(**inputs))
    assert not list(tmp_path.glob("*.bin"))


def test_model_is_initialized_as_published():
    torch.manual_seed(0)
    model = RefTRForVisualGrounding(RefTRConfig(**{**TINY_MODEL, "d_model": 64, "text_config": TINY_TEXT}))
    last = model.box_head.layers[-1]
    assert not last.weight.any()
    assert not last.bias.any()
    attention = model.model.encoder.layers[0].self_attn
    # Xavier-uniform bounds of the published, packed query, key and value (192, 64), and of (64, 64)
    assert attention.q_proj.weight.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.02)
    assert attention.o_proj.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.02)
    assert not attention.q_proj.bias.any()
    assert model.model.level_embedding.std().item() == pytest.approx(1, rel=0.4)
    assert model.model.query_encoder.query_embedding.weight.std().item() == pytest.approx(1, rel=0.4)
    projection = model.model.image_projection[0].weight  # a 1 x 1 convolution
    fans = projection.shape[0] + projection.shape[1]
    assert projection.abs().max().item() == pytest.approx((6 / fans) ** 0.5, rel=0.02)
    linear = model.model.text_projection.linear1
    assert linear.weight.abs().max().item() == pytest.approx(linear.in_features**-0.5, rel=0.02)
    assert linear.bias.any()


def test_init_xavier_std_scales_initial_weights(make_model):
    model, wide = (make_model(init_xavier_std=gain).model for gain in (1.0, 3.0))
    (layer, wide_layer), (decoder, wide_decoder) = (
        [(part.layers[0]) for part in parts]
        for parts in ((model.encoder, wide.encoder), (model.decoder, wide.decoder))
    )
    pairs = [
        (layer.self_attn.q_proj, wide_layer.self_attn.q_proj),
        (layer.self_attn.o_proj, wide_layer.self_attn.o_proj),
        (decoder.cross_attn.v_proj, wide_decoder.cross_attn.v_proj),
        (layer.mlp.fc1, wide_layer.mlp.fc1),
        (decoder.mlp.fc2, wide_decoder.mlp.fc2),
        (model.image_projection[0], wide.image_projection[0]),
        (model.text_position_embeddings, wide.text_position_embeddings),
        (model.token_type_embeddings, wide.token_type_embeddings),
    ]
    for narrow, other in pairs:
        torch.testing.assert_close(other.weight, 3 * narrow.weight)


def test_box_head_init_std_sets_initial_deviation():
    config = RefTRConfig(**{**TINY_MODEL, "d_model": 64, "text_config": TINY_TEXT, "box_head_init_std": 0.3})
    last = RefTRForVisualGrounding(config).box_head.layers[-1]  # make_model gives it other weights
    assert last.weight.std().item() == pytest.approx(0.3, rel=0.2)
    assert not last.bias.any()


# learning


@pytest.mark.parametrize(
    "several", [pytest.param(False, marks=pytest.mark.slow, id="single"), pytest.param(True, id="several_phrases")]
)
def test_model_overfits_sixteen_samples(processor, shapes, make_model, several):
    """The loss of 16 sentences falls below a fifth of its first value within 150 steps."""
    rows = []
    for row in shapes["train"]:
        fitting = [sentence for sentence in row["sentences"] if (len(sentence["phrases"]) > 1) == several]
        rows.append({**row, "sentences": fitting[:1]})
    rows = [row for row in rows if row["sentences"]][:16]
    assert len(rows) == 16
    batch = GroundingCollator(processor)(rows)
    assert ("phrase_input_ids" in batch) == several
    model = make_model().train()
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=150)
    losses = []
    for _ in range(150):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])


def test_positions_are_added_to_image_tokens_if_configured(make_model, batch):
    model, published = make_model(add_positions_to_image_tokens=True).eval(), make_model().eval()
    published.load_state_dict(model.state_dict())
    inputs = model_inputs(batch)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"])
        (tokens, positions, _), (without, same_positions, _) = (
            part.model.embed_images(features, inputs["image_index"], torch.device("cpu"))
            for part in (model, published)
        )
        expected = features.image_position_embeddings[inputs["image_index"]]
        torch.testing.assert_close(tokens - without, expected.expand_as(tokens), rtol=1e-4, atol=1e-5)
        assert torch.equal(positions, same_positions)
        assert (model(**inputs).pred_boxes - published(**inputs).pred_boxes).abs().max() > 1e-5


def copy_attention(ours, theirs):
    """Copy the weights of RefTR's attention to PyTorch's."""
    for kind in ("weight", "bias"):
        parts = [getattr(projection, kind) for projection in (ours.q_proj, ours.k_proj, ours.v_proj)]
        getattr(theirs, f"in_proj_{kind}").data.copy_(torch.cat(parts))
        getattr(theirs.out_proj, kind).data.copy_(getattr(ours.o_proj, kind))


def copy_layer(ours, theirs, norms):
    """Copy the feed-forward block and layer norms of one of RefTR's layers, randomized, to one of PyTorch's."""
    copy_attention(ours.self_attn, theirs.self_attn)
    theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
    theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())
    for number, name in enumerate(norms, start=1):
        norm = getattr(ours, name)
        nn.init.normal_(norm.weight, mean=1, std=0.2)
        nn.init.normal_(norm.bias, std=0.2)
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_normalize_as_those_of_pytorch(make_model, pre_norm):
    model = make_model(pre_norm=pre_norm).model
    config, features = model.config, torch.randn(2, 7, model.config.d_model)
    sizes = {"d_model": config.d_model, "batch_first": True, "norm_first": pre_norm}
    layer = model.encoder.layers[0]
    theirs = nn.TransformerEncoderLayer(
        nhead=config.encoder_attention_heads, dim_feedforward=config.encoder_ffn_dim, **sizes
    ).eval()
    copy_layer(layer, theirs, ("self_attn_layer_norm", "final_layer_norm"))
    nowhere = torch.zeros(())
    torch.testing.assert_close(layer(features, nowhere), theirs(features), atol=1e-5, rtol=1e-4)

    layer, queries = model.decoder.layers[0], torch.randn(2, 3, config.d_model)
    theirs = nn.TransformerDecoderLayer(
        nhead=config.decoder_attention_heads, dim_feedforward=config.decoder_ffn_dim, **sizes
    ).eval()
    copy_layer(layer, theirs, ("self_attn_layer_norm", "cross_attn_layer_norm", "final_layer_norm"))
    copy_attention(layer.cross_attn, theirs.multihead_attn)
    found = layer(queries, nowhere, features, nowhere)
    torch.testing.assert_close(found, theirs(queries, features), atol=1e-5, rtol=1e-4)


def test_pre_norm_encoder_returns_normalized_states(make_model, batch):
    memory = make_model(pre_norm=True).model(**model_inputs(batch)).encoder_last_hidden_state
    torch.testing.assert_close(memory.mean(-1), torch.zeros(memory.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.std(-1, correction=0), torch.ones(memory.shape[:2]), atol=1e-3, rtol=0)
