"""Integers that methods other than forward read: they follow a cut where running those methods shows what they are."""

from __future__ import annotations

import torch
from torch import nn

import secateur as sc
from secateur.structure.promises import read_promises


class Head(nn.Module):
    """Remembers its input width twice, and checks it before it builds a new layer."""

    def __init__(self, width, classes):
        super().__init__()
        self.in_features = self.num_features = width
        self.fc = nn.Linear(width, classes)

    def reset(self, classes, in_features):
        assert in_features == self.in_features, "the head was made for another width"
        self.fc = nn.Linear(self.num_features, classes)

    def forward(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


class Timm(nn.Module):
    """The methods and integers that timm's models have; 8 x 8 images, and 8 channels somewhere."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 3, padding=1)
        self.head = Head(24, classes)
        self.num_features = self.head_hidden_size = 24
        self.stem_width, self.other = 8, 24
        self.feature_info = [{"num_chs": 8, "module": "stem"}, {"num_chs": 24, "module": "body"}]

    def forward_features(self, x):
        return self.body(self.stem(x).relu()).relu()

    def forward_head(self, x, pre_logits=False):
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, classes):
        self.head.reset(classes, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features


def half(model, x):
    return sc.prune(model.eval(), x, granularity="channel", budget=sc.Budget(macs=0.3), allocation="uniform")


def test_a_cut_model_keeps_its_promises_and_so_does_a_loaded_one(tmp_path):
    torch.manual_seed(0)
    model, x = Timm(), torch.randn(2, 3, 12, 12)
    pruned = half(model, x)
    sc.save(pruned, tmp_path / "small.safetensors")
    for small in (pruned.model, sc.load(tmp_path / "small.safetensors", build=Timm)):
        stem, width = small.stem.out_channels, small.body.out_channels
        assert stem < 8 and width < 24
        assert small.forward_features(x).shape[1] == small.num_features == width
        assert small.forward_head(small.forward_features(x), pre_logits=True).shape[1] == small.head_hidden_size
        assert [entry["num_chs"] for entry in small.feature_info] == [stem, width]
        assert (small.head.in_features, small.head.num_features) == (width, width)
        assert (small.stem_width, small.other) == (8, 24)  # nothing shows what these are
        small.reset_classifier(7)
        assert small(x).shape == (2, 7)
    assert (model.num_features, model.feature_info[0]["num_chs"], model.head.in_features) == (24, 8, 24)


def test_ambiguous_channels_are_left_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)  # the stem returns (2, 8, 8, 8): which of them are its channels?
    small = half(Timm(), x).model
    assert small.stem.out_channels < 8 and small.feature_info[0]["num_chs"] == 8
    assert small.feature_info[1]["num_chs"] == small.body.out_channels


class Unwilling(Timm):
    """Its methods fail, except forward."""

    def forward(self, x):
        return self.head(super().forward_features(x))

    def forward_features(self, x):
        raise NotImplementedError

    def reset_classifier(self, classes):
        raise NotImplementedError


def test_methods_that_fail_say_nothing():
    small = half(Unwilling(), torch.randn(2, 3, 12, 12)).model
    assert small.body.out_channels < 24
    assert (small.num_features, small.head.in_features) == (24, 24)


def test_models_of_others_are_not_asked():
    assert read_promises(nn.Linear(3, 4), None) is None
