"""
Convert published RefTR checkpoints to folders for `RefTRForVisualGrounding.from_pretrained`, and back.

Nothing in a file is executed: pickles are only read for their tensors.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from data_scripts.atomic_files import atomic_file, atomic_folder, replaced_files, sha256_of
from data_scripts.quoting import explain, quote
from data_scripts.renamed_command import run_renamed

from .checkpoint_claims import NOT_READ, check_claims
from .configuration_reftr import RefTRConfig, check_config_file
from .image_processing_reftr import RefTRImageProcessor
from .loading_reftr import CONFIG_FILES, TOKENIZER_FILES, DamagedFilesError, naming_files
from .locating_reftr import check_source
from .modeling_reftr import RefTRForVisualGrounding
from .processing_reftr import RefTRProcessor
from .saving_reftr import save_tensors


logger = logging.get_logger(__name__)

# (published, ours); the first that a key starts with is replaced
PREFIXES = [
    ("img_backbone.0.body.", "model.backbone._backbone."),
    ("img_backbone.1.row_embed.", "model.image_position_embedding.row_embeddings."),
    ("img_backbone.1.col_embed.", "model.image_position_embedding.column_embeddings."),
    ("input_proj.0.", "model.image_projection."),
    ("lang_backbone.", "model.text_backbone."),
    ("map_sentence.", "model.text_projection."),
    ("map_phrase.", "model.phrase_projection."),
    ("vl_transformer.level_embed", "model.level_embedding"),
    ("vl_transformer.lang_pos_embeddings.", "model.text_position_embeddings."),
    ("vl_transformer.token_type_embeddings.", "model.token_type_embeddings."),
    ("vl_transformer.encoder.", "model.encoder."),
    ("vl_transformer.decoder.norm.", "model.decoder.layer_norm."),
    ("vl_transformer.decoder.", "model.decoder."),
    ("query_encoder.query_embed.", "model.query_encoder.query_embedding."),
    ("query_encoder.linear1.", "model.query_encoder.context_query."),
    ("query_encoder.linear2.", "model.query_encoder.context_key."),
    ("query_encoder.linear3.", "model.query_encoder.context_value."),
    ("query_encoder.context_out.0.", "model.query_encoder.context_projection."),
    ("query_encoder.context_out.1.", "model.query_encoder.context_layer_norm."),
    ("query_encoder.fuse_encoder_query.", "model.query_encoder.fusion."),
    ("bbox_embed.", "box_head."),
    ("bbox_attention.q_linear.", "mask_head.query_projection."),
    ("bbox_attention.k_linear.", "mask_head.key_projection."),
    ("mask_head.out_lay.", "mask_head.output_convolution."),
    *[(f"mask_head.lay{number + 1}.", f"mask_head.convolutions.{number}.") for number in range(5)],
    *[(f"mask_head.gn{number + 1}.", f"mask_head.norms.{number}.") for number in range(5)],
    *[(f"mask_head.adapter{number + 1}.", f"mask_head.adapters.{number}.") for number in range(3)],
]
PROJECTION_MODULES = {"0": "linear1", "1": "layer_norm1", "4": "linear2", "5": "layer_norm2"}
FEED_FORWARD = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
LAYER_MODULES = {
    "encoder": {**FEED_FORWARD, "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
    "decoder": {
        **FEED_FORWARD,
        "multihead_attn": "cross_attn",
        "norm1": "self_attn_layer_norm",
        "norm2": "cross_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}
OUR_LAYER = re.compile(r"(model\.(encoder|decoder)\.layers\.\d+\.)((?:mlp\.)?\w+)\.(.*)")
OUR_PROJECTION = re.compile(r"(model\.(?:text_projection|phrase_projection|query_encoder\.fusion)\.)(\w+)\.(.*)")

# fields that change answers, but not the shapes of weights: their published values
PUBLISHED_SWITCHES = {"pre_norm": False, "add_positions_to_image_tokens": False, "mask_conditioning": "attention"}
# left in files of 2021 by the text backbone, by batch norm and by a profiler; they hold no weights
IGNORED = re.compile(r"lang_backbone\.embeddings\.position_ids|(.*\.)?(num_batches_tracked|total_params|total_ops)")

BACKBONES = {6: "resnet50", 23: "resnet101"}  # blocks in the third stage -> name
TEXT_BACKBONES = {2: "bert", 1: "roberta"}  # rows of token types -> kind
TOKENIZERS = {  # old and new Hub ids of the published ones
    "bert": ("bert-base-uncased", "google-bert/bert-base-uncased"),
    "roberta": ("roberta-base", "FacebookAI/roberta-base"),
}
WEIGHTS_FILE = "published.safetensors"


def replace_prefix(key: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Replace the first of the (old, new) `prefixes` that a key starts with."""
    return next((new + key.removeprefix(old) for old, new in prefixes if key.startswith(old)), key)


def rename_key(key: str) -> str:
    """
    Return our name of a published key; unknown keys are returned unchanged.

    Example:

    ```python
    >>> from modeling_reftr.convert_reftr_checkpoint import rename_key

    >>> rename_key("vl_transformer.decoder.layers.0.multihead_attn.out_proj.bias")
    'model.decoder.layers.0.cross_attn.o_proj.bias'

    ```"""
    name = replace_prefix(key, PREFIXES)
    if layer := OUR_LAYER.fullmatch(name):
        prefix, stack, module, rest = layer.groups()
        return f"{prefix}{LAYER_MODULES[stack].get(module, module)}.{rest.replace('out_proj.', 'o_proj.')}"
    if projection := OUR_PROJECTION.fullmatch(name):
        prefix, module, rest = projection.groups()
        return f"{prefix}{PROJECTION_MODULES.get(module, module)}.{rest}"
    return name


def published_key(name: str) -> str:
    """
    Return the published key of one of our names, the inverse of `rename_key`; query, key and value share one.

    Example:

    ```python
    >>> from modeling_reftr.convert_reftr_checkpoint import published_key

    >>> published_key("model.decoder.layers.0.cross_attn.q_proj.bias")
    'vl_transformer.decoder.layers.0.multihead_attn.in_proj_bias'

    ```"""
    if layer := OUR_LAYER.fullmatch(name):
        prefix, stack, module, rest = layer.groups()
        modules = {ours: published for published, ours in LAYER_MODULES[stack].items()}
        rest = re.sub(r"^[qkv]_proj\.", "in_proj_", rest).replace("o_proj.", "out_proj.")
        name = f"{prefix}{modules.get(module, module)}.{rest}"
    elif projection := OUR_PROJECTION.fullmatch(name):
        prefix, module, rest = projection.groups()
        modules = {ours: published for published, ours in PROJECTION_MODULES.items()}
        name = f"{prefix}{modules.get(module, module)}.{rest}"
    return replace_prefix(name, [(ours, published) for published, ours in PREFIXES])


def our_names(key: str) -> list[str]:
    """Our names of a published key: three for a packed `in_proj`, in the order of its rows, one for any other."""
    name = rename_key(key)
    packed = re.fullmatch(r"(model\.(?:encoder|decoder)\..*)\.in_proj_(weight|bias)", name)
    return [f"{packed[1]}.{part}_proj.{packed[2]}" for part in "qkv"] if packed else [name]


def convert_state_dict(
    published: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Rename published weights to ours, splitting each packed `in_proj` into query, key and value.

    Args:
        published (`Mapping[str, torch.Tensor]`): the published model's state dict.
        expected (`Mapping[str, torch.Tensor]`): our model's state dict, for its names and shapes.

    Returns:
        `dict[str, torch.Tensor]`: weights that `model.load_state_dict` takes with `strict=True`.

    Raises:
        ValueError: if a published key has no counterpart in our model, a weight of our model has no published key, a
            shape differs, or a weight is not finite. The message names them.
    """
    return place_weights(published, expected, our_names)


def place_weights(
    weights: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    names_of: Callable[[str], list[str]],
) -> dict[str, torch.Tensor]:
    """
    Give weights the names of `expected`, all of them and no others; see [`convert_state_dict`].

    Args:
        weights, expected (`Mapping[str, torch.Tensor]`): what there is, and what is to be filled.
        names_of (`Callable`): from a key of `weights` to its names in `expected`, which share its rows equally.
    """
    places = {key: names_of(key) for key in weights if not IGNORED.fullmatch(key)}
    # batch norm's counter of training steps is not published; a frozen batch norm has none
    wanted = {name for name in expected if not IGNORED.fullmatch(name)}
    unknown = sorted(key for key, names in places.items() if not wanted.issuperset(names))
    missing = sorted(wanted - {name for names in places.values() for name in names})
    if unknown or missing:
        raise ValueError(
            "These weights do not fit the model. Keys that it lacks: "
            f"{quote(unknown, 5000) if unknown else 'none'}. Weights of it that the checkpoint does not have: "
            f"{quote(missing, 5000) if missing else 'none'}."
        )
    placed = {}
    for key, names in places.items():
        value, shape = weights[key], expected[names[0]].shape
        check_weight(key, value, (len(names) * shape[0], *shape[1:]))
        parts = [part.clone() for part in value.chunk(len(names))] if len(names) > 1 else [value]
        placed.update(zip(names, parts, strict=True))
    return placed


def check_weight(key: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a weight has this shape and is finite."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{key} has the shape {tuple(value.shape)} in the checkpoint, but the model takes {tuple(shape)}; the "
            "weights are of a model of other sizes."
        )
    if not value.isfinite().all():
        raise ValueError(f"{key} holds values that are not finite (NaN or infinite); the checkpoint is damaged.")


def to_published_state_dict(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Our weights under their published names, query, key and value packed again: the reverse of `convert_state_dict`.

    Raises:
        ValueError: if a weight has no published name, because the model is none that the published code can build, or
            one of query, key and value is missing.
    """
    weights = {name: value for name, value in weights.items() if not IGNORED.fullmatch(name)}
    strangers = sorted(
        name for name in weights if published_key(name) == name or name not in our_names(published_key(name))
    )
    if strangers:
        raise ValueError(f"The published model lacks these weights: {quote(strangers, 5000)}.")
    missing = sorted({part for name in weights for part in our_names(published_key(name))} - weights.keys())
    if missing:
        raise ValueError(
            f"Query, key and value are published in one, but these of them are missing: {quote(missing, 5000)}."
        )
    published = {}
    for name in weights:
        parts = our_names(published_key(name))
        if name == parts[0]:
            values = [weights[part] for part in parts]
            published[published_key(name)] = torch.cat(values) if len(values) > 1 else values[0]
    return published


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Return the weights of a file, without executing anything in it.

    Args:
        path (`str` or `os.PathLike`): a `.safetensors` file, or a file of `torch.save` (any format of it) that holds
            a state dict or a dict with one under `"model"`. The tensors of a zip file stay on disk until they are
            read.

    Returns:
        `dict[str, torch.Tensor]`: floating-point weights by key, on the CPU. Counters and other leftovers that hold
        no weights are not among them.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not such a file, is damaged, claims more than its size can hold, or asks for anything but
            tensors, numbers, text, and the settings (`argparse.Namespace`) and NumPy values of a published checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give the path of a checkpoint (.pth or .safetensors).")
    is_safetensors = path.suffix == ".safetensors"
    if not is_safetensors:
        check_claims(path)
    try:
        if is_safetensors:
            content = load_file(path)
        else:
            with torch.serialization.safe_globals(NOT_READ):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file can fail in any place of its reader
        reason = explain(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    weights = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds no weights: expected a state dict, or a dict with a state dict in 'model'.")
    weights = {str(key): value for key, value in weights.items() if not IGNORED.fullmatch(str(key))}
    for key, value in weights.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise ValueError(f"{quote(key)} in {path} is not a dense floating-point tensor, as weights are.")
    if sum(value.nbytes for value in weights.values()) > path.stat().st_size:
        raise ValueError(f"The tensors of {path} are larger than the file, so they overlap, which weights do not.")
    return weights


def read_published_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Return the weights of a published RefTR checkpoint, see [`read_weights`].

    Raises:
        OSError, ValueError: as `read_weights`, and if the weights are not those of a RefTR.
    """
    published = read_weights(path)
    if not any(key.startswith("vl_transformer.") for key in published):
        raise ValueError(
            f"{path} holds no published RefTR checkpoint: no key starts with 'vl_transformer.', the first is "
            f"{quote(next(iter(published), None))}."
        )
    return published


def settings_from_shapes(published: Mapping[str, torch.Tensor]) -> dict:
    """
    Return the fields of [`RefTRConfig`] that names and shapes of published weights determine.

    Raises:
        ValueError: if a weight that tells one is missing, or the backbones are none of the published ones.
    """

    def rows(key: str, axis: int = 0) -> int:
        if key not in published or published[key].dim() <= axis:
            raise ValueError(f"The checkpoint has no weights {key!r} of {axis + 1} dimensions or more; a RefTR has.")
        return published[key].shape[axis]

    def count(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in published if key.startswith(prefix)})

    d_model = rows("vl_transformer.level_embed", 1)
    num_blocks = count("img_backbone.0.body.layer3.")
    num_token_types = rows("lang_backbone.embeddings.token_type_embeddings.weight")
    if num_blocks not in BACKBONES:
        raise ValueError(
            f"The image backbone has {num_blocks} blocks in its third stage; a ResNet-50 has 6, a ResNet-101 has 23."
        )
    if num_token_types not in TEXT_BACKBONES:
        raise ValueError(f"The text backbone has {num_token_types} token types; BERT has 2, RoBERTa has 1.")
    settings = {
        "backbone_config": {"backbone": BACKBONES[num_blocks]},
        "text_config": {
            "model_type": TEXT_BACKBONES[num_token_types],
            "vocab_size": rows("lang_backbone.embeddings.word_embeddings.weight"),
            "hidden_size": rows("lang_backbone.embeddings.word_embeddings.weight", 1),
            "num_hidden_layers": count("lang_backbone.encoder.layer."),
            "intermediate_size": rows("lang_backbone.encoder.layer.0.intermediate.dense.weight"),
            "max_position_embeddings": rows("lang_backbone.embeddings.position_embeddings.weight"),
            "type_vocab_size": num_token_types,
        },
        "d_model": d_model,
        "encoder_layers": count("vl_transformer.encoder.layers."),
        "decoder_layers": count("vl_transformer.decoder.layers."),
        "encoder_ffn_dim": rows("vl_transformer.encoder.layers.0.linear1.weight"),
        "decoder_ffn_dim": rows("vl_transformer.decoder.layers.0.linear1.weight"),
        "position_embedding_type": "sine",
        "max_text_positions": rows("vl_transformer.lang_pos_embeddings.weight"),
        "predict_masks": any(key.startswith("mask_head.") for key in published),
    }
    if "img_backbone.1.row_embed.weight" in published:
        settings["position_embedding_type"] = "learned"
        settings["max_image_positions"] = rows("img_backbone.1.row_embed.weight")
    if settings["predict_masks"]:  # its first layer reads image, memory and an attention map of each head
        settings["decoder_attention_heads"] = rows("mask_head.lay1.weight") - 2 * d_model
    return settings


def settings_as_published(told: dict) -> dict:
    """
    Return the fields of [`RefTRConfig`] that shapes do not determine, as in the published models.

    Args:
        told (`dict`): what `settings_from_shapes` gave.
    """
    heads = told.get("decoder_attention_heads", 8)
    text_config = {"num_attention_heads": max(1, told["text_config"]["hidden_size"] // 64)}
    if told["text_config"]["model_type"] == "bert":
        text_config |= {"layer_norm_eps": 1e-12, "pad_token_id": 0}
    else:
        text_config |= {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {
        "backbone_config": {"out_indices": [1, 2, 3, 4], "output_stride": None},
        "text_config": text_config,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "layer_norm_eps": 1e-5,
        "projection_group_norm_groups": 32,
        "mask_head_group_norm_groups": 8,
        "auxiliary_loss": not told["predict_masks"],
    }


def config_from_shapes(published: Mapping[str, torch.Tensor]) -> RefTRConfig:
    """Return the configuration of published weights; what shapes do not determine is as in the published models."""
    told = settings_from_shapes(published)
    settings = settings_as_published(told)
    for name, value in told.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return RefTRConfig(**settings)


def check_config(config: RefTRConfig, published: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that lists where a configuration and the shapes of published weights differ."""
    differences = []
    for name, told in settings_from_shapes(published).items():
        for inner, value in told.items() if isinstance(told, dict) else ((None, told),):
            given = getattr(config, name)
            given = given if inner is None else getattr(given, inner, None)
            if inner == "backbone":
                given = str(given).split(".")[0]  # timm writes its weights' name behind a dot
            if given != value:
                full_name = name if inner is None else f"{name}.{inner}"
                differences.append(
                    f"{full_name} is {quote(given)} in the configuration, {quote(value)} in the checkpoint"
                )
    if differences:
        raise ValueError(f"The configuration is not that of the checkpoint: {'; '.join(differences)}.")


def load_tokenizer(tokenizer: str | os.PathLike | None, config: RefTRConfig) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a text backbone.

    Args:
        tokenizer (`str` or `os.PathLike`, *optional*):
            Folder or Hub id. Defaults to the published one, from the local cache.
        config ([`RefTRConfig`]): of the model.

    Raises:
        OSError: if it is not found.
        ValueError: if a file of it is damaged, or it has more tokens than the text backbone.
    """
    source = tokenizer
    if source is None:
        names = TOKENIZERS[config.text_config.model_type]
        # of the cache alone: AutoTokenizer calls the Hub even with local_files_only=True
        files = [try_to_load_from_cache(name, "tokenizer.json") for name in names]
        source = next((Path(file).parent for file in files if isinstance(file, str)), None)
        if source is None:
            raise FileNotFoundError(
                f"The tokenizer {names[0]!r} is not on this machine. Give --tokenizer NAME (fetched from the Hub) or "
                "--tokenizer FOLDER, or --no_processor to write the model alone."
            )
    check_source(source, what="tokenizer")
    try:
        check_config_file(source)
        with naming_files(source, TOKENIZER_FILES + CONFIG_FILES, {}):
            loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except DamagedFilesError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(f"There is no tokenizer {str(source)!r} to be loaded, as a folder or from the Hub.") from error
    if len(loaded) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer {str(source)!r} has {len(loaded)} tokens, the checkpoint's text backbone has "
            f"{config.text_config.vocab_size}; give the tokenizer it was trained with."
        )
    return loaded


@contextmanager
def naming_output(output: Path) -> Iterator[None]:
    """Raise errors of safetensors as an OSError that names what could not be written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{output} could not be written: {error}") from error


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    config: str | os.PathLike | RefTRConfig | None = None,
    tokenizer: str | os.PathLike | None = None,
    with_processor: bool = True,
    overwrite: bool = False,
) -> RefTRConfig:
    """
    Write a published checkpoint as a folder that `from_pretrained` reads, with its configuration, code and processor.
    The folder appears when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A published `.pth` file, or a `.safetensors` file with the published names.
        output_dir (`str` or `os.PathLike`): the folder to write.
        config ([`RefTRConfig`], `str` or `os.PathLike`, *optional*):
            A configuration, its file or its folder. Absent: it is read off the shapes of the weights, and what they
            cannot tell is taken as published.
        tokenizer (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of the tokenizer. Absent: the published one, if it is on this machine already.
        with_processor (`bool`, *optional*, defaults to `True`): False writes the model alone.
        overwrite (`bool`, *optional*, defaults to `False`): replace files of the same names in `output_dir`.

    Returns:
        [`RefTRConfig`]: the configuration as written.

    Raises:
        OSError: if a file is missing, or the folder is not empty.
        ValueError: if the checkpoint is refused or does not fit; the message says why.
    """
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise OSError(f"{output} is a file; give a folder to write to.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise OSError(f"{output} is not empty; give another folder, or --overwrite to replace its files.")
    published = read_published_checkpoint(checkpoint)
    if config is None:
        config = config_from_shapes(published)
    else:
        if not isinstance(config, RefTRConfig):
            if not Path(config).exists():
                raise FileNotFoundError(f"There is no configuration {config}; give a config.json or its folder.")
            config = RefTRConfig.from_pretrained(config)
        check_config(config, published)
    processor = None
    if with_processor:
        processor = RefTRProcessor(RefTRImageProcessor(), load_tokenizer(tokenizer, config))
    with torch.device("meta"):
        model = RefTRForVisualGrounding(config)
    expected = model.state_dict()
    counters = {
        name: torch.zeros_like(value, device="cpu") for name, value in expected.items() if IGNORED.fullmatch(name)
    }
    model.load_state_dict(convert_state_dict(published, expected) | counters, assign=True)
    # files of a folder that exists are replaced one by one, because it may hold files of the user
    writing = replaced_files(output, last="*.safetensors") if output.exists() else atomic_folder(output)
    with naming_output(output), writing as folder:
        model.save_pretrained(folder)
        origin = {"converted_from": Path(checkpoint).name, "sha256": sha256_of(checkpoint)}
        (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
        if processor is not None:
            processor.save_pretrained(folder)
    return config


def convert_to_published(model: str | os.PathLike, output: str | os.PathLike, overwrite: bool = False) -> Path:
    """
    Write the weights of one of our folders under their published names.

    Args:
        model (`str` or `os.PathLike`): the folder.
        output (`str` or `os.PathLike`): a `.safetensors` file, or a folder to write `published.safetensors` into.
        overwrite (`bool`, *optional*, defaults to `False`): replace the file if it is there.

    Returns:
        `Path`: the file.

    Raises:
        OSError: if the folder is not a saved RefTR, or the file exists.
        ValueError: if its weights are not complete or not finite, or the published code cannot build such a model.
    """
    folder, output = Path(model), Path(output)
    files = sorted(folder.glob("model*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json and model.safetensors; give a folder of a saved RefTR.")
    if output.suffix != ".safetensors":
        output = output / WEIGHTS_FILE
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already; give another path, or --overwrite to replace it.")
    config = RefTRConfig.from_pretrained(folder)
    if changed := [name for name, value in PUBLISHED_SWITCHES.items() if getattr(config, name) != value]:
        changes = ", ".join(f"{name}={quote(getattr(config, name))}" for name in changed)
        raise ValueError(f"{folder} has {changes}, which the published code does not know: it would answer otherwise.")
    published = to_published_state_dict({name: value for file in files for name, value in read_weights(file).items()})
    with torch.device("meta"):
        expected = RefTRForVisualGrounding(config).state_dict()
    convert_state_dict(published, expected)  # nothing is missing, and there is a way back
    check_config(config, published)
    with naming_output(output), atomic_file(output) as temporary:
        save_tensors(published, temporary, metadata={"format": "pt"})
    return output


def describe_assumptions(config: RefTRConfig) -> str:
    """Return what `config_from_shapes` assumed as published, as `name=value` in one line."""
    assumed = settings_as_published(config.to_dict())
    if config.predict_masks:
        del assumed["decoder_attention_heads"]  # the mask head tells it
    parts = []
    for name, value in assumed.items():
        inner = value.items() if isinstance(value, dict) else ()
        parts += [f"{name}.{inner_name}={inner_value}" for inner_name, inner_value in inner] or [f"{name}={value}"]
    return ", ".join(parts)


if __name__ == "__main__":
    run_renamed("python -m modeling_reftr.convert_reftr_checkpoint", "convert")
