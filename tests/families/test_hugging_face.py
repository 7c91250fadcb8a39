"""Models of Hugging Face after a cut: generation with every cache, configurations, saving and loading."""

from __future__ import annotations

import pytest
import torch
from benchmarks.coverage import zoo
from benchmarks.coverage.hugging_face import TYPES
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

import secateur as sc
from secateur.structure.inputs import relative_error

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'secateur[transformers]'")

StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

pytestmark = pytest.mark.filterwarnings("default")

GENERATING = "gpt2 gpt_neox opt llama qwen3 gemma2 phi3 falcon mamba t5 bart whisper".split()
UNIFORM = "llama mistral qwen2 qwen3 cohere granite".split()
MIXTURES = "mixtral qwen2_moe qwen3_moe olmoe granitemoe".split()
NOT_EXPRESSIBLE = "bert gpt2 gemma t5 bart whisper swin clip".split()


def build(model_type):
    return zoo.build(f"hf:{model_type}")


def prune(model, inputs, macs, **options):
    budget = sc.Budget(macs=macs, tolerance=0.02)  # what a network with routers costs depends on values
    return sc.prune(model, inputs, granularity="channel", budget=budget, **options)


class _Removed(TorchFunctionMode):
    """The dense network whose routers never choose removed experts: their logits are minus infinity."""

    def __init__(self, removed):
        super().__init__()
        self.removed = removed

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and args[1] in self.removed:
            result[:, self.removed[args[1]]] = -torch.inf
        return result


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_without_some_experts_is_one_whose_router_never_chooses_them(model_type, tmp_path):
    model, inputs = build(model_type)
    pruned = sc.prune(model, inputs, granularity="expert", budget=sc.Budget(params=0.8))
    axes = [axis for axis in pruned.structure.axes if axis.role == "expert"]
    weights, removed = dict(model.named_parameters()), WeakTensorKeyDictionary()
    for axis in axes:
        (router,) = (name for name, _ in axis.members if "experts" not in name and name.endswith("weight"))
        kept = set(pruned.structure_plan.axes[axis.name].kept)
        removed[weights[router]] = [unit for unit in range(4) if unit not in kept]
    with _Removed(removed):
        expected = model(**inputs)
    assert any(removed.values()) and relative_error(pruned.model(**inputs), expected) < 1e-5
    assert relative_error(pruned.model(**inputs), model(**inputs)) > 1e-3
    sc.save(pruned, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=lambda: build(model_type)[0])
    assert relative_error(again(**inputs), pruned.model(**inputs)) == 0
    pruned.model.save_pretrained(tmp_path / "folder")
    if pruned.structure_plan.note:
        return
    again = type(model).from_pretrained(tmp_path / "folder").eval()
    assert relative_error(again(**inputs), pruned.model(**inputs)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", GENERATING)
def test_generation_with_caches_agrees_with_generation_without(model_type):
    model, inputs = build(model_type)
    small = prune(model, inputs, 0.6).model
    prompt = {name: value for name, value in inputs.items() if name in ("input_ids", "input_features")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        plain = small.generate(**prompt, **settings, num_beams=beams, use_cache=False)
        kinds = [{}, {"cache_implementation": "dynamic"}]
        kinds += [{"cache_implementation": "static"}] if beams == 1 else []
        for kind in kinds:
            assert torch.equal(small.generate(**prompt, **settings, num_beams=beams, use_cache=True, **kind), plain)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", UNIFORM)
def test_configurations_that_express_the_cut_make_from_pretrained_work(model_type, tmp_path):
    model, inputs = build(model_type)
    granularity = {"name": "channel", "round_to": 4}  # some configurations want a multiple of the number of heads
    budget = sc.Budget(macs=0.3)
    pruned = sc.prune(model, inputs, granularity=granularity, budget=budget, allocation="uniform")
    config = pruned.model.config
    assert not pruned.structure_plan.note
    changed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert all(0 < getattr(config, name) < getattr(model.config, name) for name in changed)
    assert config.hidden_size == pruned.model.get_input_embeddings().weight.shape[1]
    pruned.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert relative_error(again(**inputs), pruned.model(**inputs)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NOT_EXPRESSIBLE)
def test_configurations_that_cannot_express_the_cut_say_so(model_type, tmp_path):
    model, inputs = build(model_type)
    pruned = prune(model, inputs, 0.5)
    assert "cannot express it" in pruned.model.config.pruned_by_secateur
    sc.save(pruned, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=lambda: build(model_type)[0])
    assert again.config.to_dict() == pruned.model.config.to_dict()
    assert relative_error(again(**inputs), pruned.model(**inputs)) == 0
    pruned.model.save_pretrained(tmp_path / "folder")
    assert "pruned_by_secateur" in (tmp_path / "folder" / "config.json").read_text()
    with pytest.raises(AttributeError, match="has no setter"):  # never a network that computes something else
        type(model).from_pretrained(tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "granularity", "macs"),
    [
        ("phi", "channel", 0.6),  # another number of heads takes the same weights, and turns fewer of their entries
        ("llama", "depth", 0.8),  # what is missing from a file would be drawn at random
        ("poolformer", "depth", 0.8),  # nothing is missing: pooling has no weights
    ],
)
def test_a_folder_whose_weights_another_network_would_take_is_refused(model_type, granularity, macs, tmp_path):
    model, inputs = build(model_type)
    pruned = sc.prune(model, inputs, granularity=granularity, budget=sc.Budget(macs=macs), allocation="uniform")
    pruned.model.save_pretrained(tmp_path)
    for loader in (type(model), transformers.AutoModel):
        with pytest.raises(AttributeError, match="has no setter"):
            loader.from_pretrained(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", TYPES)
def test_no_saved_folder_loads_as_a_network_that_computes_something_else(model_type, tmp_path):
    model, inputs = build(model_type)
    try:
        pruned = prune(model, inputs, 0.6, allocation="uniform")
    except sc.errors.BudgetUnreachable:
        pruned = prune(model, inputs, 0.97)
    try:
        pruned.model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
    except (AttributeError, StrictDataclassError):  # loudly
        assert pruned.structure_plan.note
        return
    assert relative_error(again(**inputs), pruned.model(**inputs)) < 1e-5
