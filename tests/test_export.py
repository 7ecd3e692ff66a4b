"""Exported files compute what eager computes, at every shape they promise, or are not left behind."""

import json
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.errors import ZooError
from zoo.tools import export as tool
from zoo.tools.export import Shape, cli_export, export, relative_error

# One block a stage: more of the same would only take longer to trace.
KINDS = {
    'test_vig': {'depth': 1},
    'test_vig_hier': {'depths': (1, 1, 1, 1)},
    'test_ravlt': {'depths': (1, 1, 1, 1)},
    'test_mobilemamba': {'depths': (0, 0, 1), 'fuse': True},
}
STATIC = Shape(1, 3, 64, 96)
DYNAMIC = Shape(2, 3, 64, 96, dynamic_batch=True, dynamic_size=True)


@pytest.fixture(scope='module', params=KINDS)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=11, **KINDS[request.param]).eval()


def fitting(model, shape):
    """A program keeps maps of one row apart from others: models of stride 64 are traced on larger images."""
    large = model.feature_info[-1]['reduction'] > 32
    return replace(shape, height=2 * shape.height, width=2 * shape.width) if large else shape


@pytest.fixture(scope='module')
def traces():
    return {}


@pytest.fixture
def one_trace(model, traces, monkeypatch):
    """Tracing takes most of the time and does not depend on the format: once per model and shape is enough."""
    trace = tool._trace

    def cached(model, shape):
        if (id(model), shape) not in traces:
            traces[id(model), shape] = trace(model, shape)
        return traces[id(model), shape]

    monkeypatch.setattr(tool, '_trace', cached)


@pytest.mark.parametrize('shape', [STATIC, DYNAMIC], ids=['static', 'dynamic'])
def test_torch_export(model, shape, one_trace, tmp_path):
    result = export(model, tmp_path / 'm.pt2', 'torch-export', fitting(model, shape))
    assert result['max_relative_error'] <= 1e-4
    program = torch.export.load(tmp_path / 'm.pt2')
    names = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert not [n for n in names if n.startswith('zoo.')], 'the file needs none of our ops'
    if shape.dynamic_size:
        check_shapes(model, program.module())


@pytest.mark.parametrize('shape', [STATIC, DYNAMIC], ids=['static', 'dynamic'])
def test_onnx(model, shape, one_trace, tmp_path):
    result = export(model, tmp_path / 'm.onnx', 'onnx', fitting(model, shape))
    assert result['max_relative_error'] <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx'], 'one file, weights inside'
    onnx.checker.check_model(onnx.load(tmp_path / 'm.onnx'))
    session = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    (entry,) = session.get_inputs()
    assert entry.name == 'x'
    assert [isinstance(n, str) for n in entry.shape] == [shape.dynamic_batch, False] + 2 * [shape.dynamic_size]
    if shape.dynamic_size:
        check_shapes(model, lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0]))


@torch.no_grad()
def check_shapes(model, run):
    """Shapes that the exporter itself did not probe: other batches, odd and long sides."""
    for batch, height, width in ((5, 65, 65), (3, 79, 131), (1, 66, 224)):
        x = torch.randn(batch, 3, height, width)
        assert relative_error(run(x), model(x)) <= 1e-4, (batch, height, width)


@pytest.mark.slow
@pytest.mark.parametrize('fmt', ['onnx', 'torch-export'])
@pytest.mark.parametrize('axis', ['dynamic_batch', 'dynamic_size'])
def test_one_dynamic_axis(model, fmt, axis, tmp_path):
    shape = fitting(model, Shape(2, 3, 64, 96, **{axis: True}))
    assert export(model, tmp_path / 'm', fmt, shape)['max_relative_error'] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', zoo.list_models(capability='export'))
def test_export_is_true_of_every_model(name, tmp_path):
    full = timm.create_model(name).eval()
    size = full.default_cfg['input_size'][1:]
    assert export(full, tmp_path / 'm.onnx', 'onnx', Shape(1, 3, *size))['max_relative_error'] <= 1e-4


def test_safetensors(model, tmp_path):
    result = export(model, tmp_path / 'm.safetensors', 'safetensors', STATIC)
    assert result['max_relative_error'] == 0
    name = model.pretrained_cfg['architecture']
    overlay = {'file': str(tmp_path / 'm.safetensors'), 'num_classes': 11}
    again = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=11, **KINDS[name]
    ).eval()
    x = STATIC.example()
    assert torch.equal(again(x), model(x))


class DropsInput(nn.Module):
    """Exports to something else than it computes: the kind of mistake the comparison is for."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = x.mean((2, 3)) * self.scale
        return y * (1 + self.factor) if torch.compiler.is_exporting() else y


@pytest.mark.parametrize('fmt', ['onnx', 'torch-export'])
@pytest.mark.parametrize('factor', [1e-3, float('nan')])
def test_a_wrong_file_is_not_written(fmt, factor, tmp_path):
    path = tmp_path / 'm'
    path.write_text('what was there before')
    with pytest.raises(ZooError, match='not written.*differs from eager'):
        export(DropsInput(factor).eval(), path, fmt, STATIC)
    assert path.read_text() == 'what was there before'
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    export(DropsInput(1e-6).eval(), path, fmt, STATIC)
    assert path.stat().st_size > 100


def test_a_size_that_the_model_refuses(tmp_path):
    vit = timm.create_model('test_vit', dynamic_img_size=True).eval()
    with pytest.raises(ZooError, match='takes no input of'):
        export(vit, tmp_path / 'm', 'safetensors', Shape(1, 3, 96, 96, dynamic_size=True))
    assert not list(tmp_path.iterdir())


def test_command_line_with_a_checkpoint(tmp_path, capsys):
    source = timm.create_model('test_vig_hier', num_classes=7).eval()
    torch.save({'model': source.state_dict()}, tmp_path / 'mine.pth')
    output = tmp_path / 'new' / 'mine.pt2'
    argv = ['test_vig_hier', '--checkpoint', str(tmp_path / 'mine.pth'), '--format', 'torch-export', '--img-size', '32']
    assert cli_export([*argv, '--output', str(output), '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['bytes'] == output.stat().st_size and result['compared'] == [[1, 3, 32, 32]]
    x = torch.randn(1, 3, 32, 32)
    assert relative_error(torch.export.load(output).module()(x), source(x)) < 1e-4


def test_command_line_mistakes(tmp_path):
    for argv, words in (
        (['vig_tinny'], 'unknown model'),
        (['test_vig', '--checkpoint', str(tmp_path / 'no.pth')], 'no such checkpoint'),
        (['test_vig', '--pretrained'], 'no weights are published'),
        (['test_vig', '--img-size', '1', '2', '3'], '--img-size takes'),
        (['test_vig', '--pretrained', '--checkpoint', 'x'], 'both name weights'),
    ):
        with pytest.raises(ZooError, match=words):
            cli_export([*argv, '--output', str(tmp_path / 'm')])
