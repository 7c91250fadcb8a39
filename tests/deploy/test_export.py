from __future__ import annotations

import subprocess
import sys

import onnxruntime
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.deploy import onnx, torch_export
from secateur.errors import NotApplicable
from secateur.testing.toys import toy


@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "densenet", "squeeze_excite", "vit"])
def test_pruned_networks_export_to_onnx_with_equal_outputs(tmp_path, name):
    model, x = toy(name)
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))
    artifact = onnx.export(result.model, x, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    with torch.no_grad():
        expected = result.model(x)
    assert torch.allclose(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=0, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]  # one file, weights inside


def test_the_batch_of_an_onnx_file_may_vary(tmp_path):
    model, x = toy("squeeze_excite")
    onnx.export(model, x[:1], tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    many = torch.randn(5, *x.shape[1:])
    assert session.run(None, {session.get_inputs()[0].name: many.numpy()})[0].shape == (5, 10)


def test_a_pt2_file_runs_without_the_class(tmp_path):
    model, x = toy("vit")
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))
    torch_export.export(result.model, x, tmp_path / "m.pt2")
    torch.save({"x": x, "y": result.model(x).detach()}, tmp_path / "e.pt")
    code = (
        "import torch; e = torch.load('e.pt'); m = torch.export.load('m.pt2').module();"
        "print(float((m(e['x']) - e['y']).abs().max()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1e-5


def test_what_cannot_be_exported_is_one_clear_error(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    for exporter, name in ((onnx, "m.onnx"), (torch_export, "m.pt2")):
        with pytest.raises(NotApplicable, match="export"):
            exporter.export(Branching(), torch.randn(2, 3), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_error_names_the_operation_that_onnx_does_not_have(tmp_path):
    @torch.library.custom_op("secateur_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x):
            return twice(x)

    with pytest.raises(NotApplicable, match=r"secateur_test\.twice"):
        onnx.export(Custom(), torch.zeros(2, 3), tmp_path / "m.onnx")


def grouped_rows(rows, weight, offs):
    return torch.cat([part @ w for part, w in zip(rows.tensor_split(offs[:-1].long()), weight, strict=True)])


@pytest.fixture
def grouped_product():
    """The operation as transformers defines it, unless that is here."""
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        return torch.ops.transformers.grouped_mm_fallback
    annotated = {"rows": torch.Tensor, "weight": torch.Tensor, "offs": torch.Tensor, "return": torch.Tensor}
    grouped_rows.__annotations__ = annotated
    operation = torch.library.custom_op("transformers::grouped_mm_fallback", grouped_rows, mutates_args=())
    operation.register_fake(lambda rows, weight, offs: rows.new_empty(rows.shape[0], weight.shape[2]))
    return operation


def test_products_of_rows_with_the_matrix_of_their_group_are_exported(tmp_path, grouped_product):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, 8))
            self.register_buffer("ends", torch.tensor([3, 3, 7, 10], dtype=torch.int32))  # the second group is empty

        def forward(self, x):
            return grouped_product(x, self.weight, self.ends)

    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(10, 16)
    session = onnxruntime.InferenceSession(onnx.export(model, x, tmp_path / "grouped.onnx").path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = torch.stack([x[i] @ model.weight[g] for i, g in enumerate([0, 0, 0, 2, 2, 2, 2, 3, 3, 3])])
    assert torch.allclose(torch.from_numpy(found), expected.detach(), atol=1e-5)
    assert torch.allclose(model(x), expected, atol=1e-5)
