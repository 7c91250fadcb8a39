"""Networks of timm, torchvision and Hugging Face transformers by name, with example inputs.

``timm:resnet50``, ``torchvision:swin_t``, ``hf:bert`` (a model type with its default configuration), ``hf:FOLDER``
(with a config.json and perhaps weights) and ``hf:config.json``. Weights are random unless a folder holds them; nothing
is downloaded and no code from a folder runs.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.errors import InvalidRecipe, UnknownName
from secateur.optional import optional_import

LENGTH = 16
"""Tokens of an example text."""
SECOND = 16_000
"""Samples of an example recording: one second."""


def is_in_zoo(reference: str) -> bool:
    """Return whether a reference names a network of one of the libraries."""
    return reference.partition(":")[0] in _LIBRARIES


def build(reference: str) -> nn.Module:
    """Return a network in eval mode, on the meta device if it is larger than this machine's memory.

    Raises:
        UnknownName: The library has no such network.
        InvalidRecipe: A folder or file that holds no configuration.
        MissingDependency: The library is not installed.
    """
    library, _, name = reference.partition(":")
    allow_torchvision()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's about initialization that will become faster
        torch.manual_seed(0)
        return _LIBRARIES[library][0](name).eval()


def example_inputs(reference: str, model: nn.Module, shape: tuple[int, ...] | None = None) -> Any:
    """Return inputs that a network from `build` runs on: a tensor, or tensors by keyword.

    Args:
        reference: What was built.
        model: What `build` returned.
        shape: Of the main input, if it should differ from the network's own.

    Raises:
        InvalidRecipe: Nothing here knows what this network takes.
    """
    library, _, name = reference.partition(":")
    return _LIBRARIES[library][1](name, model, shape)


def allow_torchvision() -> None:
    """Make torchvision importable beside a PyTorch without CUDA.

    Its wheel from PyPI is built for CUDA. Without it the compiled part does not load, the operators ``nms`` and
    ``qnms`` are missing, and Python code that only describes them fails. They are declared here, if they are absent.
    """
    if "torchvision" in sys.modules or _DECLARED:
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for compiled in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(str(compiled))
    except OSError:
        _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_DECLARED: list[torch.library.Library] = []  # what it declares is gone when a library is

# ------------------------------------------------------------------------------------------------ timm and torchvision


def _build_timm(name: str) -> nn.Module:
    timm = optional_import("timm", "timm")
    if not timm.is_model(name):
        raise UnknownName("timm network", name, timm.list_models())
    return cast(nn.Module, timm.create_model(name, pretrained=False))


def _timm_inputs(name: str, model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    settings = cast(dict[str, Any], model.pretrained_cfg)
    return _noise(*(shape or (1, *settings["input_size"])))


def _build_torchvision(name: str) -> nn.Module:
    models = optional_import("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise UnknownName("torchvision network", name, models.list_models())
    takes = inspect.signature(models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
    return cast(nn.Module, models.get_model(name, weights=None, **backbone))


def _torchvision_inputs(name: str, model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    models = optional_import("torchvision.models", "torchvision")
    settings = models.get_model_weights(name).DEFAULT.transforms.keywords
    size = settings.get("crop_size", settings.get("resize_size", 224))
    return _noise(*(shape or (1, 3, *_square(size))))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _square(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, tuple | list) else (size, size)


# ------------------------------------------------------------------------------------------------------- transformers

_HEADS = (
    "Seq2SeqLM",
    "SpeechSeq2Seq",
    "MaskedLM",
    "CausalLM",
    "ImageTextToText",
    "ZeroShotImageClassification",
    "ImageClassification",
    "SemanticSegmentation",
    "ObjectDetection",
    "CTC",
    "AudioClassification",
)
"""Kinds of network, from the one that says most about a configuration; without any of these, the bare network."""


def _build_hugging_face(name: str) -> nn.Module:
    transformers = optional_import("transformers", "transformers")
    config = _config(transformers, name)
    if any(Path(name).glob("*.safetensors")):
        found = _class_for(transformers, config)
        return cast(nn.Module, found.from_pretrained(name, local_files_only=True, use_safetensors=True))
    make = _maker(transformers, config)
    with torch.device("meta"):
        sketch = make()
    if 2 * sum(p.numel() * p.element_size() for p in sketch.parameters()) > _memory():
        return sketch
    return make()


def _config(transformers: ModuleType, name: str) -> Any:
    path = Path(name)
    try:
        if path.is_dir():
            return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InvalidRecipe(
            f"{name} holds no configuration that transformers knows: {type(error).__name__}: {error}"
        ) from error
    if name not in transformers.CONFIG_MAPPING:
        known = transformers.CONFIG_MAPPING.keys()
        raise UnknownName("folder, JSON file or model type of Hugging Face", name, known)
    return transformers.AutoConfig.for_model(name)


def _class_for(transformers: ModuleType, config: Any) -> Any:
    """Return the class that a configuration names, or the automatic class of its first kind of head."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    heads = (getattr(transformers, f"AutoModelFor{head}", None) for head in _HEADS)
    return next((h for h in heads if h is not None and type(config) in h._model_mapping), transformers.AutoModel)


def _maker(transformers: ModuleType, config: Any) -> Callable[[], nn.Module]:
    found = _class_for(transformers, config)
    return lambda: cast(nn.Module, found.from_config(config) if hasattr(found, "from_config") else found(config))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _hugging_face_inputs(name: str, model: nn.Module, shape: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Make what the network is mainly for; encoder-decoders also get the start of an answer."""
    config: Any = model.config
    main = str(model.main_input_name)
    takes = inspect.signature(model.forward).parameters
    if main not in _MAKERS:
        raise InvalidRecipe(f"There are no example inputs for hf:{name}, which takes {main}: give --example.")
    inputs = {main: _MAKERS[main](config, shape)}
    pairs = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if pairs and not any(hasattr(config, key) for key in ("image_token_id", "image_token_index")):
        inputs = {"input_ids": _tokens(config, None), "pixel_values": _pixels(config, None), **inputs}
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(config, None)
    return inputs


def _tokens(config: Any, shape: tuple[int, ...] | None) -> Tensor:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or LENGTH
    shape = shape or (1, min(LENGTH, longest))
    count = torch.Size(shape).numel()
    tokens: Tensor = torch.arange(count) % max(text.vocab_size - 3, 1) + 3  # the first often mean padding, start, end
    return tokens.clamp_(max=text.vocab_size - 1).view(shape)


def _pixels(config: Any, shape: tuple[int, ...] | None) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = _square(getattr(vision, "image_size", None) or 224)
    return _noise(*(shape or (1, getattr(vision, "num_channels", 3), *size)))


def _features(config: Any, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None and not (hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions")):
        raise InvalidRecipe(f"There are no example features for the model type {config.model_type}: give --example.")
    return _noise(*(shape or (1, config.num_mel_bins, 2 * config.max_source_positions)))


def _recording(config: Any, shape: tuple[int, ...] | None) -> Tensor:
    spectrogram = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
    return _noise(*(shape or ((1, config.max_length, config.num_mel_bins) if spectrogram else (1, SECOND))))


_MAKERS: dict[str, Callable[[Any, tuple[int, ...] | None], Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _recording,
}
"""Main input of a network -> how to make one."""

_Maker = Callable[[str], nn.Module]
_Inputs = Callable[[str, nn.Module, tuple[int, ...] | None], Any]
_LIBRARIES: dict[str, tuple[_Maker, _Inputs]] = {
    "timm": (_build_timm, _timm_inputs),
    "torchvision": (_build_torchvision, _torchvision_inputs),
    "hf": (_build_hugging_face, _hugging_face_inputs),
}
