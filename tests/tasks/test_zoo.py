from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.errors import InvalidRecipe, MissingDependency, UnknownName
from secateur.tasks import zoo


@pytest.fixture
def fake_timm(monkeypatch):
    timm = ModuleType("timm")
    timm.list_models = lambda: ["tiny", "tidy"]
    timm.is_model = lambda name: name in timm.list_models()

    def create_model(name, pretrained):
        assert name == "tiny" and not pretrained
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        model.pretrained_cfg = {"input_size": (3, 12, 12)}
        return model

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)


@pytest.fixture
def fake_torchvision(monkeypatch):
    models = ModuleType("torchvision.models")
    models.list_models = lambda: ["plain", "segment"]
    builders = {
        "plain": lambda *, weights=None, progress=True: nn.Conv2d(3, 4, 3),
        "segment": lambda *, weights=None, weights_backbone="default": nn.Conv2d(3, 5 if weights_backbone else 6, 3),
    }
    settings = {"plain": {"crop_size": 20}, "segment": {"resize_size": (8, 10)}}
    models.get_model_builder = builders.get
    models.get_model = lambda name, **options: builders[name](**options)
    models.get_model_weights = lambda name: SimpleNamespace(
        DEFAULT=SimpleNamespace(transforms=SimpleNamespace(keywords=settings[name]))
    )
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


class TinyText(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)

    def forward(self, input_ids, decoder_input_ids=None):
        return self.embedding(input_ids)


class TextConfig(SimpleNamespace):
    def get_text_config(self):
        return self


class OtherConfig(TextConfig):
    pass


@pytest.fixture
def fake_transformers(monkeypatch):
    transformers = ModuleType("transformers")
    types = {"tiny": TextConfig, "pair": OtherConfig}
    defaults = {"vocab_size": 50, "width": 8, "is_encoder_decoder": False, "architectures": None}

    def for_model(name, **settings):
        return types[name](**{**defaults, "model_type": name, **settings})

    transformers.AutoConfig = SimpleNamespace(for_model=for_model)
    transformers.CONFIG_MAPPING = types
    transformers.AutoModelForCausalLM = SimpleNamespace(_model_mapping={TextConfig: TinyText}, from_config=TinyText)
    transformers.AutoModel = SimpleNamespace(from_config=TinyText)
    transformers.Named = TinyText
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return transformers


def test_only_libraries_are_in_the_zoo():
    assert zoo.is_in_zoo("timm:resnet18") and zoo.is_in_zoo("hf:bert") and zoo.is_in_zoo("torchvision:x")
    assert not zoo.is_in_zoo("networks:make") and not zoo.is_in_zoo("digits/vit")


def test_a_timm_network_brings_its_input_size(fake_timm):
    model = zoo.build("timm:tiny")
    assert not model.training and zoo.example_inputs("timm:tiny", model).shape == (1, 3, 12, 12)
    assert zoo.example_inputs("timm:tiny", model, (2, 3, 6, 6)).shape == (2, 3, 6, 6)
    assert torch.equal(zoo.build("timm:tiny")[0].weight, model[0].weight)  # the same random weights each time


def test_building_leaves_the_random_state_alone(fake_timm):
    before = torch.get_rng_state()
    zoo.build("timm:tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_torchvision_networks_take_the_size_of_their_weights_and_download_nothing(fake_torchvision):
    assert zoo.example_inputs("torchvision:plain", zoo.build("torchvision:plain")).shape == (1, 3, 20, 20)
    segment = zoo.build("torchvision:segment")
    assert segment.out_channels == 6  # no weights for the backbone either
    assert zoo.example_inputs("torchvision:segment", segment).shape == (1, 3, 8, 10)


def test_unknown_names_suggest_the_nearest(fake_timm, fake_torchvision, fake_transformers):
    with pytest.raises(UnknownName, match="Did you mean 'tiny'"):
        zoo.build("timm:tinny")
    with pytest.raises(UnknownName, match="Did you mean 'plain'"):
        zoo.build("torchvision:plane")
    with pytest.raises(UnknownName, match="model type of Hugging Face 'tinyy'"):
        zoo.build("hf:tinyy")


def test_a_model_type_or_a_json_file_is_a_configuration(fake_transformers, tmp_path):
    assert zoo.build("hf:tiny").embedding.weight.shape == (50, 8)
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "tiny", "width": 6, "architectures": ["Named"]}))
    assert zoo.build(f"hf:{tmp_path}/c.json").embedding.weight.shape == (50, 6)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(InvalidRecipe, match="holds no configuration"):
        zoo.build(f"hf:{tmp_path}/c.json")


def test_example_texts_stay_within_the_vocabulary_and_the_longest_text(fake_transformers):
    model = zoo.build("hf:tiny")
    tokens = zoo.example_inputs("hf:tiny", model)["input_ids"]
    assert tokens.shape == (1, zoo.LENGTH) and int(tokens.max()) < 50 and tokens.unique().numel() == zoo.LENGTH
    model.config.max_position_embeddings = 5
    model.config.is_encoder_decoder = True
    inputs = zoo.example_inputs("hf:tiny", model)
    assert inputs["input_ids"].shape == inputs["decoder_input_ids"].shape == (1, 5)
    assert zoo.example_inputs("hf:tiny", model, (2, 3))["input_ids"].shape == (2, 3)


@pytest.mark.parametrize(
    ("main", "settings", "shape"),
    [
        ("pixel_values", {"image_size": 32, "num_channels": 1}, (1, 1, 32, 32)),
        ("pixel_values", {"image_size": [16, 24]}, (1, 3, 16, 24)),
        ("input_features", {"num_mel_bins": 8, "max_source_positions": 10}, (1, 8, 20)),
        ("input_values", {}, (1, zoo.SECOND)),
        ("input_values", {"num_mel_bins": 8, "max_length": 30}, (1, 30, 8)),
    ],
)
def test_example_inputs_follow_the_configuration(main, settings, shape):
    model = nn.Module()
    model.main_input_name, model.config = main, TextConfig(is_encoder_decoder=False, **settings)
    assert zoo.example_inputs("hf:x", model)[main].shape == shape


def test_pairs_of_text_and_image(fake_transformers):
    model = nn.Module()
    model.main_input_name = "input_ids"
    model.config = TextConfig(is_encoder_decoder=False, vocab_size=9, text_config=1, vision_config=SimpleNamespace())
    assert zoo.example_inputs("hf:x", model)["pixel_values"].shape == (1, 3, 224, 224)
    model.config.image_token_id = 7  # images stand in the text: text alone is enough
    assert zoo.example_inputs("hf:x", model).keys() == {"input_ids"}


def test_what_nobody_knows_an_input_for_asks_for_one():
    model = nn.Module()
    model.main_input_name, model.config = "state", TextConfig(is_encoder_decoder=False)
    with pytest.raises(InvalidRecipe, match="which takes state: give --example"):
        zoo.example_inputs("hf:x", model)


def test_a_network_larger_than_memory_is_only_a_sketch(fake_transformers, monkeypatch):
    monkeypatch.setattr(zoo, "_memory", lambda: 1000)
    assert zoo.build("hf:tiny").embedding.weight.is_meta


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"pip install 'secateur\[timm\]'"):
        zoo.build("timm:tiny")


class Declared:
    def __init__(self, namespace, kind):
        assert (namespace, kind) == ("torchvision", "FRAGMENT")
        self.operators = []

    def define(self, schema):
        self.operators.append(schema.partition("(")[0])


def test_torchvision_operators_are_declared_only_if_the_compiled_part_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    spec = ModuleSpec("torchvision", None, origin=str(tmp_path / "__init__.py"))
    declared = []
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(zoo, "_DECLARED", declared)
    monkeypatch.setattr(torch.library, "Library", Declared)
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    zoo.allow_torchvision()
    assert not declared  # it is not installed
    monkeypatch.setattr(zoo, "find_spec", lambda name: spec)
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops, "load_library", lambda path: None)
        zoo.allow_torchvision()
        assert not declared  # the compiled part loads
    zoo.allow_torchvision()
    zoo.allow_torchvision()
    assert [library.operators for library in declared] == [["nms", "qnms"]]
