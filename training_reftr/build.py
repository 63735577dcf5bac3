"""Build the model and processor of a run and initialize their weights. Nothing here is a collective."""

import logging
from pathlib import Path

import datasets
import timm
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import SizeDict

from data_scripts.quoting import quote
from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from modeling_reftr.configuration_reftr import check_config_file
from modeling_reftr.convert_reftr_checkpoint import (
    IGNORED,
    config_from_shapes,
    convert_state_dict,
    describe_assumptions,
    load_tokenizer,
    place_weights,
    read_published_checkpoint,
    read_weights,
)
from modeling_reftr.detr_reftr import init_from_detr, resnet_name
from modeling_reftr.loading_reftr import CONFIG_FILES, TOKENIZER_FILES, DamagedFilesError, check_index, naming_files
from modeling_reftr.loading_reftr import WEIGHT_FILES as SAVED_WEIGHTS
from modeling_reftr.locating_reftr import check_source
from training_reftr.arguments import merge
from training_reftr.locating import WEIGHT_FILES
from training_reftr.preflight import part_of, refuse_untrained_parts
from training_reftr.settings import DataSettings, InitializationSettings, TrainingSettings, check_names
from training_reftr.streams import StreamedRows
from training_reftr.tokenizer_training import all_sentences, train_tokenizer


logger = logging.getLogger(__name__)

QUERY_NOISE = 0.1  # of new queries, in standard deviations of the weights
LEFT_FROM_TEXT = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")


def build_model(
    settings: TrainingSettings, train_rows: datasets.Dataset | StreamedRows
) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """
    Build the initial model of a run and its processor, the same on all processes. Log loaded and random weights.

    Raises:
        OSError: if something that a setting names does not exist.
        ValueError: if it does not fit, `model` has an unknown field or changes a loaded backbone, the vocabulary is
            smaller than the tokenizer's, or a part with random weights would not be trained.
    """
    # Sources of weights; a line takes precedence over those below it.
    # 1. resume: the run's own checkpoint. It replaces the result of this function.
    # 2. init_from: a RefTR, all of it; what `model` adds to it (masks) is random.
    # 3. init_detr: image backbone and encoder; with init_text, the published start.
    # 4. init_backbone and init_text: the image backbone alone, and the text backbone with its tokenizer.
    # 5. nothing: random weights, and a tokenizer trained on the dataset.
    initialization = settings.initialization
    if initialization.init_from is not None:
        refuse_tokenizer(initialization)
        model, processor, random_weights = load_weights(initialization.init_from, settings, initialization.model)
        refuse_untrained_parts(model, random_weights, settings.optimization)
        return model, processor
    model, processor = new_model(settings, train_rows)
    taken = ()
    if initialization.init_detr is not None:
        start = init_from_detr(model, initialization.init_detr)
        logger.info(
            f"init_detr: {len(start.taken)} weights of image backbone and encoder from {initialization.init_detr}."
        )
        taken += ("model.backbone.", "model.encoder.")
    if initialization.init_backbone is not None:
        load_image_backbone(model, initialization.init_backbone)
        taken += ("model.backbone.",)
    if initialization.init_text is not None:
        load_text_backbone(model, initialization.init_text)
        taken += ("model.text_backbone.",)
    random_weights = {name for name in model.state_dict() if not name.startswith(taken)}
    parts = ", ".join(sorted({part_of(name) for name in random_weights}))
    logger.info(f"Random weights, because no setting initializes them: {parts}.")
    refuse_untrained_parts(model, random_weights, settings.optimization)
    return model, processor


def refuse_tokenizer(initialization: InitializationSettings) -> None:
    """Raise a ValueError where a tokenizer is named together with a RefTR in `init_from` that brings its own."""
    if initialization.tokenizer is not None and not is_weights_file(initialization.init_from):
        raise ValueError(
            f"tokenizer={quote(initialization.tokenizer)} has no effect on init_from="
            f"{quote(initialization.init_from)}, which has its own: remove tokenizer."
        )


def is_weights_file(source: str | Path) -> bool:
    """Return whether a name has the suffix of a weights file."""
    return Path(source).suffix in WEIGHT_FILES


def local_or_hub(name: str | Path, what: str = "RefTR") -> Path | str:
    """
    Return a name as a path, or the name itself if it is a Hub id.

    A `Path`, `./folder` and a file of weights are always local.

    Raises:
        OSError: if there is nothing at either.
    """
    check_source(Path(name) if is_weights_file(name) else name, what=what)
    return Path(name) if Path(name).exists() else str(name)


def load_reftr(source: str | Path, settings: TrainingSettings) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """
    Return a trained RefTR, as it was saved, with its processor.

    Args:
        source (`str` or `Path`): a folder, a Hub id, or a published file, which is converted in memory.
        settings ([`TrainingSettings`]): `tokenizer` for a published file; `image_size`, `max_text_length` and
            `size_divisor`, where they are given; `attn_implementation`.

    Raises:
        OSError: if there is nothing at `source`.
        ValueError: if it is refused or lacks weights, or a size does not fit.
    """
    model, processor, random_weights = load_weights(source, settings, {})
    if random_weights:
        raise ValueError(
            f"{str(source)!r} lacks {len(random_weights)} of the weights that its config.json describes, the first is "
            f"{min(random_weights)!r}: it cannot be evaluated. Save or convert it again."
        )
    return model, processor


def load_weights(
    source: str | Path, settings: TrainingSettings, changes: dict
) -> tuple[RefTRForVisualGrounding, RefTRProcessor, set[str]]:
    """
    Return a trained RefTR, its processor, and the names of weights that `source` does not have and that are random.

    Args:
        source, settings: see `load_reftr`.
        changes (`dict`): fields of its configuration to change, see `change_config`.

    Raises:
        OSError, ValueError: see `load_reftr`, or if `changes` do not fit.
    """
    location = local_or_hub(source, "RefTR")
    if is_weights_file(location):
        published = read_published_checkpoint(location)
        config = config_from_shapes(published)
        logger.info(
            f"{source}: assumed as published, because shapes do not determine them: {describe_assumptions(config)}."
        )
        with torch.device("meta"):
            expected = RefTRForVisualGrounding(config).state_dict()
        weights = {"pretrained_model_name_or_path": None, "state_dict": convert_state_dict(published, expected)}
        processor = RefTRProcessor(RefTRImageProcessor(), load_tokenizer(settings.initialization.tokenizer, config))
    else:
        config = RefTRConfig.from_pretrained(location)
        weights = {"pretrained_model_name_or_path": location, "use_safetensors": True}
        processor = RefTRProcessor.from_pretrained(location)
    changed = change_config(config, changes)
    num_queries, changed.num_queries_per_phrase = changed.num_queries_per_phrase, config.num_queries_per_phrase
    model, info = RefTRForVisualGrounding.from_pretrained(
        **weights,
        config=changed,
        dtype=torch.float32,
        attn_implementation=settings.initialization.attn_implementation,
        output_loading_info=True,
    )
    if num_queries != config.num_queries_per_phrase:
        add_queries(model, num_queries)
    new = {part_of(name) for name in info["missing_keys"]}
    left = {part_of(name) for name in info["unexpected_keys"]}
    logger.info(
        f"RefTR from {source}: {len(model.state_dict()) - len(info['missing_keys'])} weights. Random weights: "
        f"{', '.join(sorted(new)) or 'none'}. Left: {', '.join(sorted(left)) or 'none'}."
    )
    set_sizes(processor, settings.data, model.config)
    return model, processor, set(info["missing_keys"])


def add_queries(model: RefTRForVisualGrounding, num_queries: int) -> None:
    """
    Give a model more queries per phrase. The first ones keep their weights; each new one starts as a copy of one of
    them with a little noise, without which both would learn the same.

    Args:
        model ([`RefTRForVisualGrounding`]): changed in place.
        num_queries (`int`): queries per phrase.

    Raises:
        ValueError: if the model has more already.
    """
    query_encoder, known = model.model.query_encoder, model.config.num_queries_per_phrase
    if num_queries < known:
        raise ValueError(
            f"model.num_queries_per_phrase={num_queries}, but init_from has {known}: queries can be added only."
        )
    weight = query_encoder.query_embedding.weight.detach()
    rows = weight[torch.arange(num_queries) % known]
    noise = torch.randn_like(rows) * QUERY_NOISE * weight.std()
    noise[:known] = 0
    query_encoder.query_embedding = torch.nn.Embedding.from_pretrained(rows + noise, freeze=False)
    model.config.num_queries_per_phrase = num_queries
    model.freeze_parameters()


def new_model(
    settings: TrainingSettings, train_rows: datasets.Dataset | StreamedRows
) -> tuple[RefTRForVisualGrounding, RefTRProcessor]:
    """Return a model with random weights as `model` and `init_text` configure it, and its processor."""
    initialization = settings.initialization
    fields = dict(initialization.model)
    if initialization.init_text is not None:
        fields["text_config"] = text_config_of(initialization.init_text, fields.get("text_config", {}))
    tokenizer = initialization.tokenizer or initialization.init_text
    if tokenizer is not None:
        tokenizer = read_tokenizer(tokenizer)
    else:
        max_length = fields.get("max_text_positions", RefTRConfig.max_text_positions)
        tokenizer = train_tokenizer(all_sentences(train_rows), max_length)
        text_config = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        fields["text_config"] = {**text_config, **fields.get("text_config", {})}
    config = RefTRConfig(**fields)
    for part in ("backbone_config", "text_config"):
        check_names(initialization.model.get(part, {}), type(getattr(config, part))().to_dict(), f"model.{part}")
    if config.text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.text_config.vocab_size={config.text_config.vocab_size} is smaller than the tokenizer's "
            f"{len(tokenizer)} tokens."
        )
    processor = RefTRProcessor(RefTRImageProcessor(), tokenizer)
    set_sizes(processor, settings.data, config)
    return RefTRForVisualGrounding._from_config(
        config, attn_implementation=initialization.attn_implementation
    ), processor


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """
    Return the tokenizer of a folder or Hub id.

    Raises:
        OSError: if there is none. (transformers returns one without a vocabulary if it finds only a config.json.)
    """
    location = local_or_hub(source, "tokenizer")
    try:
        check_config_file(location)
        with naming_files(location, TOKENIZER_FILES + CONFIG_FILES, {}):
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except DamagedFilesError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(f"There is no tokenizer {source!r} to be loaded, as a folder or from the Hub.") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise OSError(f"There is no tokenizer in {source!r}: nothing there has a vocabulary.")
    return tokenizer


def text_config_of(source: str, changes: dict) -> dict:
    """
    Return the configuration of a pretrained text model, with changes that do not affect its weights (dropout).

    Raises:
        OSError: if there is none.
        ValueError: if the changes are of another type of model.
    """
    location = local_or_hub(source, "text model")
    check_config_file(location)
    with naming_files(location, CONFIG_FILES, {}):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    wanted = changes.get("model_type", config.model_type)
    if wanted != config.model_type:
        raise ValueError(
            f"model.text_config.model_type={quote(wanted)}, but init_text={quote(source)} is of type "
            f"{config.model_type!r}."
        )
    values = {name: value for name, value in config.to_diff_dict().items() if name not in LEFT_FROM_TEXT}
    return merge({"model_type": config.model_type, **values}, changes)


def load_text_backbone(model: RefTRForVisualGrounding, source: str) -> None:
    """
    Give a model's text backbone the weights of a text model; a pooler that it lacks stays random.

    Raises:
        OSError: if there is none.
        ValueError: if a weight is missing or of another shape.
    """
    backbone = model.model.text_backbone
    location = local_or_hub(source, "text model")
    weights = {"pretrained_model_name_or_path": location, "use_safetensors": True}
    check_index(location)
    if isinstance(location, Path) and not any(location.glob("*.safetensors")):  # read here, for a pickle can run code
        files = sorted(location.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"init_text={source!r} has no model.safetensors and no pytorch_model.bin.")
        state_dict = {key: value for file in files for key, value in read_weights(file).items()}
        weights = {"pretrained_model_name_or_path": None, "state_dict": state_dict}
    with naming_files(location, SAVED_WEIGHTS, {}):
        text, info = type(backbone).from_pretrained(
            **weights,
            config=backbone.config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    wrong = sorted(
        [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        + [name for name, *_ in info["mismatched_keys"]]
    )
    if wrong:
        raise ValueError(
            f"init_text={source!r} does not fit the text backbone: {len(wrong)} weights "
            f"are missing or of another shape, the first are {', '.join(wrong[:3])}."
        )
    backbone.load_state_dict(text.state_dict())
    new = ", ".join(sorted(info["missing_keys"])) or "none"
    logger.info(
        f"init_text: {len(text.state_dict()) - len(info['missing_keys'])} weights of the text backbone from {source}. "
        f"Random weights in it: {new}."
    )


def load_image_backbone(model: RefTRForVisualGrounding, source: str) -> None:
    """
    Give a model's image backbone weights that were trained on ImageNet.

    Args:
        model ([`RefTRForVisualGrounding`]): changed in place.
        source (`str`): a file of timm's or torchvision's names, or "timm", which fetches what timm has for it.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is refused or does not fit.
    """
    backbone, config = model.model.backbone, model.config.backbone_config
    if source == "timm":
        source, file = fetch_from_timm(config)
    else:
        file = Path(source)
        if not (file.is_file() and is_weights_file(file)):
            raise FileNotFoundError(
                f"init_backbone={source!r} is neither a weights file ({', '.join(WEIGHT_FILES)}) nor 'timm'."
            )
    # not every file has counters of batch norms, which start from 0
    weights = {name: value for name, value in read_weights(file).items() if not IGNORED.fullmatch(name)}
    is_timm = config.model_type == "timm_backbone"
    # timm writes stages_0 for stages.0 in models that return features
    own_names, expected = {}, {}
    for name, value in backbone.state_dict().items():
        if IGNORED.fullmatch(name):
            continue
        common = (name.removeprefix("_backbone.") if is_timm else resnet_name(name)).replace("_", ".")
        own_names[common], expected[common] = name, value
    taken = {key: value for key, value in weights.items() if key.replace("_", ".") in expected}
    try:
        placed = place_weights(taken, expected, lambda key: [key.replace("_", ".")])
    except ValueError as error:
        raise ValueError(f"init_backbone={source!r} does not fit the image backbone. {error}") from error
    backbone.load_state_dict({own_names[name]: value for name, value in placed.items()}, strict=False)
    left = ", ".join(sorted(weights.keys() - taken.keys())) or "none"
    logger.info(f"init_backbone: {len(taken)} weights of the image backbone from {source}. Left: {left}.")


def fetch_from_timm(config: PreTrainedConfig) -> tuple[str, Path]:
    """
    Return the Hub id and the weights file of a timm backbone.

    Raises:
        OSError: if the Hub does not give it.
        ValueError: if timm has none.
    """
    name = getattr(config, "backbone", None)
    pretrained = timm.get_pretrained_cfg(name) if name and timm.is_model(name) else None
    if pretrained is None or not pretrained.hf_hub_id:
        raise ValueError(f"init_backbone='timm', but timm has no weights for the image backbone {name!r}.")
    return pretrained.hf_hub_id, Path(hf_hub_download(pretrained.hf_hub_id, "model.safetensors"))


def change_config(config: RefTRConfig, changes: dict) -> RefTRConfig:
    """
    Return a loaded configuration with changed values.

    Raises:
        ValueError: if a change concerns a backbone, whose weights are loaded.
    """
    for name, known, wanted in differences(config, changes):
        if "." in name:
            raise ValueError(
                f"model.{name}={quote(wanted)}, but init_from has {quote(known)} there: leave it out, or train a new "
                "model."
            )
    changed = {name: value for name, value in changes.items() if not isinstance(value, dict)}
    return RefTRConfig.from_dict({**config.to_dict(), **changed})


def differences(config: RefTRConfig, changes: dict) -> list[tuple]:
    """
    Return (field, the configuration's value, the changed one) for each field in which `changes`, `model` of a
    run, differ from it; fields of a backbone are "text_config.hidden_size".
    """
    values, pairs = config.to_dict(), []
    for name, value in changes.items():
        if isinstance(value, dict):
            pairs += [(f"{name}.{key}", values[name].get(key), wanted) for key, wanted in value.items()]
        else:
            pairs.append((name, values[name], value))
    return [
        (name, known, wanted)
        for name, known, wanted in pairs
        # timm completes the name of a backbone's weights behind a dot
        if known != wanted and not (name == "backbone_config.backbone" and str(known).split(".")[0] == wanted)
    ]


def refuse_model_changes(config: RefTRConfig, initialization: InitializationSettings, source: str) -> None:
    """Raise a ValueError where `model` describes another model than the one that is evaluated."""
    other = "" if initialization.init_from is None else ", or evaluate the model of output_dir by --init_from null"
    for name, known, wanted in differences(config, initialization.model):
        raise ValueError(
            f"model.{name}={quote(wanted)}, but the model of {source} has {quote(known)} there, and an evaluation "
            f"takes a model as it was saved: leave it out{other}."
        )


def set_sizes(processor: RefTRProcessor, data: DataSettings, config: RefTRConfig) -> None:
    """
    Set the size and padding of images, the resampling of masks, and the longest text in tokens, with phrases and
    without, where `data` names them; None leaves what the processor brings.

    Raises:
        ValueError: if texts would have more tokens than the model has positions.
    """
    image_processor, max_text_length = processor.image_processor, data.max_text_length
    image_size, keeps_ratio = data.image_size, data.keep_aspect_ratio
    if keeps_ratio not in (None, keeps_aspect_ratio(image_processor)):
        image_size = image_size or image_size_of(image_processor)
        if image_size is None:
            raise ValueError(
                f"keep_aspect_ratio={keeps_ratio} requires image_size: the processor's size is "
                f"{describe_size(image_processor)}."
            )
    if image_size is not None:
        if image_size_of(image_processor) != image_size:
            logger.info(f"image_size={image_size} in place of the processor's {describe_size(image_processor)}.")
        keeps_ratio = keeps_aspect_ratio(image_processor) if keeps_ratio is None else keeps_ratio
        names = ("shortest_edge", "longest_edge") if keeps_ratio else ("height", "width")
        image_processor.size = SizeDict(**dict.fromkeys(names, image_size))
    if data.mask_resampling is not None:
        image_processor.mask_resampling = data.mask_resampling
    if data.size_divisor is not None:
        image_processor.size_divisor = data.size_divisor
    if max_text_length is None:
        return
    if max_text_length > config.max_text_positions:
        raise ValueError(
            f"max_text_length={max_text_length} is more than model.max_text_positions={config.max_text_positions}: "
            "longer sentences would have no position."
        )
    processor.max_expression_length = processor.max_caption_length = max_text_length


def image_size_of(image_processor: RefTRImageProcessor) -> int | None:
    """Return the `image_size` that an image processor resizes to; None where it is not one number."""
    size = image_processor.size
    names = ("shortest_edge", "longest_edge") if keeps_aspect_ratio(image_processor) else ("height", "width")
    first, second = (size[name] for name in names)
    return first if first == second else None


def keeps_aspect_ratio(image_processor: RefTRImageProcessor) -> bool:
    """Return whether an image processor keeps the aspect ratio of images."""
    return image_processor.size["longest_edge"] is not None


def describe_size(image_processor: RefTRImageProcessor) -> str:
    """Return a description of an image processor's size."""
    return str({name: value for name, value in dict(image_processor.size).items() if value is not None})


def max_text_length_of(processor: RefTRProcessor) -> int | None:
    """Return the `max_text_length` of a processor; None where captions and expressions differ."""
    same = processor.max_expression_length == processor.max_caption_length
    return processor.max_expression_length if same else None
