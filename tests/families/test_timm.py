"""Networks of timm keep what timm promises after a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks.coverage.zoo import allow_torchvision

import secateur as sc

pytest.importorskip("torchvision") if allow_torchvision() else None
timm = pytest.importorskip("timm", reason="needs timm: pip install 'secateur[timm]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

NETWORKS = {
    "vit_tiny_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 224,
    "resnet18": 64,
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "mixer_s32_224": 224,
    "regnetx_002": 64,
}


def build(name):
    size = NETWORKS[name]
    options = {"img_size": size} if name.startswith("vit") else {}
    return timm.create_model(name, **options).eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_timm_promises_holds_after_a_cut(name, tmp_path):
    torch.manual_seed(0)
    model, x = build(name)
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))
    sc.save(pruned, tmp_path / "small.safetensors")
    small = sc.load(tmp_path / "small.safetensors", build=lambda: build(name)[0])
    torch.testing.assert_close(small(x), pruned.model(x), rtol=0, atol=0)
    features = small.forward_features(x)
    assert small.num_features in features.shape and small.num_features < model.num_features
    assert small.forward_head(features, pre_logits=True).shape[-1] == small.head_hidden_size
    assert small.get_classifier().weight.shape[1] == small.head_hidden_size
    for entry in small.feature_info:
        seen = []
        handle = small.get_submodule(entry["module"]).register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out)
        )
        small(x)
        handle.remove()
        assert entry["num_chs"] in seen[0].shape[1:]
    again = copy.deepcopy(small)
    again.reset_classifier(7)
    assert again(x).shape == (2, 7)
    again.reset_classifier(0)
    assert again(x).shape == (2, small.head_hidden_size)
    again.load_state_dict(
        {**again.state_dict(), **{n: t for n, t in small.state_dict().items() if n in again.state_dict()}}
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_cut_network_is_ordinary(name):
    torch.manual_seed(0)
    model, x = build(name)
    small = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5)).model
    expected = small(x)
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        copy.deepcopy(small).to(memory_format=torch.channels_last)(x), expected, rtol=1e-3, atol=1e-4
    )
    assert copy.deepcopy(small).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(small).half().state_dict().keys() == model.state_dict().keys()
