"""Steps as graphs, on CPUs with recorded operations in the place of CUDA graphs: what replays and what does not."""

import contextlib
import copy
import inspect

import pytest
import tiny_diffusion as tiny
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from zoo.backbones.linfusion import LinFusion

from zoo._graphs import record
from zoo.cli import main
from zoo.diffusion import capture, captured_steps
from zoo.diffusion.highres import Savings, generate, ladder, savings
from zoo.errors import ZooError


class Recording:
    """The operations of a call on the tensors that it met, without its Python, as a CUDA graph has them."""

    def __init__(self, call):
        spec = tree_flatten(call())[1]
        self.operations = make_fx(lambda: tree_leaves(call()))()
        self.result = tree_unflatten(self.operations(), spec)

    def replay(self):
        for mine, new in zip(tree_leaves(self.result), tree_leaves(self.operations()), strict=True):
            mine.copy_(new)

    def pool(self):
        return id(self)


class Frozen:
    """Whatever it is given, the result of the first time: a replay cannot be taken for anything else."""

    def __init__(self, call):
        self.result = call()

    def replay(self):
        pass

    def pool(self):
        return id(self)


def recorder(monkeypatch, kind):
    made = []

    def make(call, warmup, pool):
        made.append((kind(call), pool))
        return made[-1][0], made[-1][0].result

    monkeypatch.setattr(capture, 'KINDS', ('cpu',))
    monkeypatch.setattr(capture, 'record', make)
    return made


@pytest.fixture
def recorded(monkeypatch):
    """Recordings that were made, each with the pool that it shares."""
    return recorder(monkeypatch, Recording)


@pytest.fixture
def frozen(monkeypatch):
    """The same without anything in them."""
    return recorder(monkeypatch, Frozen)


@pytest.fixture(scope='module')
def plain():
    """A linear UNet of one level."""
    kinds = dict(down_block_types=('CrossAttnDownBlock2D',), up_block_types=('CrossAttnUpBlock2D',))
    model = tiny.unet(block_out_channels=(16,), attention_head_dim=2, **kinds)
    LinFusion.attach(model, init='random').fuse()
    return model


@pytest.fixture
def unet(plain):
    return copy.deepcopy(plain)


@torch.no_grad()
def given(model, *seeds, size=(8, 8), **options):
    """Results of steps with inputs of these seeds."""
    return [model(*tiny.inputs(size, seed), **options).sample for seed in seeds]


def equal(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_replays_give_the_same_results(unet, recorded):
    expected = given(unet, 1, 2, 3, 4)
    with captured_steps(unet) as steps:
        found = given(unet, 1, 2)
        assert not recorded
        found += given(unet, 3, 4)
        assert equal(found, expected) and len(recorded) == len(steps.graphs) == 1 and steps.failure is None
        assert 'encoder_hidden_states' in inspect.signature(unet.forward).parameters
        twin = copy.deepcopy(unet)
        twin.conv_in.weight.data.zero_()
        assert not equal(given(twin, 3), expected[2:3]) and equal(given(unet, 3), expected[2:3])
    assert not steps.graphs and equal(given(unet, 4), expected[3:]) and 'forward' not in vars(unet)


def test_inputs_of_a_pipeline(unet, recorded):
    """Timesteps as tensors and numbers, halves of guidance, and tuples for results."""
    latents, _, text = tiny.inputs()
    kinds = (torch.tensor(7), torch.tensor(900)), (7, 900), (7.5, 900.5)
    step = lambda t: unet(latents, t, encoder_hidden_states=text, return_dict=False)  # noqa: E731
    with torch.no_grad():
        for few, many in kinds:
            expected = [step(few)[0], step(many)[0]]
            assert not equal(expected[:1], expected[1:])
            recorded.clear()
            with captured_steps(unet, after=1), savings(unet, Savings(chunk_guidance=True)):
                step(few)  # the second half is captured
                torch.testing.assert_close([step(few)[0], step(many)[0]], expected)
            assert len(recorded) == 1
        unet(latents, timestep=3, encoder_hidden_states=text)
        with captured_steps(unet, after=1):
            for _ in range(2):
                found = unet(latents, timestep=3, encoder_hidden_states=text)
        assert torch.equal(found.sample, unet(latents, 3, text).sample) and len(recorded) == 2


def test_a_graph_for_every_signature(unet, frozen):
    with captured_steps(unet, after=1, graphs=2) as steps:
        for size in ((8, 8), (8, 16), (8, 8), (8, 16), (16, 8)):
            given(unet, 1, size=size)
        assert len(frozen) == len(steps.graphs) == 2
        assert [pool for _, pool in frozen] == [None, id(frozen[0][0])]
        stale, fresh = (given(unet, 2, size=size)[0] for size in ((8, 8), (16, 8)))  # the third is captured
        assert len(frozen) == 3 and len(steps.graphs) == 2 and fresh.shape[-2:] == (16, 8)
        assert torch.equal(stale, given(unet, 3)[0]) and stale.data_ptr() != given(unet, 3)[0].data_ptr()
        given(unet, 1, size=(8, 16))  # the least recently used one had to go
        assert len(frozen) == 3
        given(unet, 1, 1, return_dict=True)
        given(unet, 1, 1, cross_attention_kwargs={'scale': 0.5})
        assert len(frozen) == 5
        for i in range(capture.REMEMBERED + 9):
            given(unet, 1, size=(8 + i, 8))
        assert len(frozen) == 5 and len(steps._seen) == capture.REMEMBERED
        steps.forget()
        given(unet, 1)
        assert len(frozen) == 5 and not steps.graphs


def adapt(model):
    """LoRA, image prompts and FreeU, each at some strength."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_v'], init_lora_weights=False))
    named = tiny.load_ip_adapter(model)
    model.enable_freeu(0.5, 0.5, 1.5, 1.5)
    return named


def scale_of_image(model):
    for processor in model.attn_processors.values():
        if hasattr(processor, 'scale'):
            processor.scale[0] = 0.3


CHANGES = {
    'weight': lambda m: m.conv_in.weight.mul_(2),
    'exchanged weight': lambda m: setattr(m.conv_in, 'weight', torch.nn.Parameter(m.conv_in.weight * 2)),
    'moved weights': lambda m: [setattr(p, 'data', p.data.clone()) for p in m.parameters()],
    'module': lambda m: setattr(m, 'conv_out', copy.deepcopy(m.conv_out)),
    'folded weights': lambda m: LinFusion.of(m).layers.popitem()[1].to_k_[0].weight.mul_(2),
    'processors': lambda m: m.set_attn_processor(AttnProcessor()),
    'scale of LoRA': lambda m: m.set_adapters(['default'], [0.3]),
    'no LoRA': lambda m: m.disable_lora(),
    'scale of an image': scale_of_image,
    'FreeU': lambda m: m.disable_freeu(),
}


@pytest.fixture(scope='module')
def adapted(plain):
    model = copy.deepcopy(plain)
    return model, adapt(model)


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_what_changes_in_a_model_is_seen(unet, adapted, frozen, change):
    model, named = unet, {}
    if change in ('scale of LoRA', 'no LoRA', 'scale of an image', 'FreeU'):
        model, named = copy.deepcopy(adapted[0]), adapted[1]
    changed = copy.deepcopy(model)
    CHANGES[change](changed)
    before, expected = given(model, 1, 2, **named), given(changed, 2, **named)
    if not change.startswith(('moved', 'processors', 'module', 'FreeU')):
        assert (expected[0] - before[1]).abs().max() > 1e-4
    with captured_steps(model, after=1) as steps:
        assert equal(given(model, 1, 1, 2, **named), [before[0]] * 3) and len(frozen) == 1
        CHANGES[change](model)
        assert equal(given(model, 2, **named), expected) and not steps.graphs
        given(model, 2, 2, **named)  # such a model is captured later
        assert len(frozen) == 2 and steps.after == 2


def test_what_is_not_captured(unet, frozen, monkeypatch):
    inputs = tiny.inputs()
    with captured_steps(unet, after=1) as steps:
        for _ in range(3):
            assert unet(*inputs).sample.requires_grad
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
                unet(*inputs)
            with torch.no_grad():
                unet.train()(*inputs)
                unet.eval()(*inputs, cross_attention_kwargs={'unknown': object()})
        assert not frozen and not steps._seen
        monkeypatch.setattr(capture, 'KINDS', ('cuda',))
        given(unet, 1, 1, 1)
        assert not frozen and not steps._seen
        monkeypatch.setattr(capture, 'KINDS', ('cpu',))
        with torch.inference_mode():
            given(unet, 1, 1, 1)
        given(unet, 1)
        assert len(frozen) == 1
        given(unet, 1)
        assert len(frozen) == 2


def test_what_cannot_be_captured(unet, monkeypatch, recwarn):
    expected, tried = given(unet, 1, 2, 3, 4, 5), []

    def make(call, warmup, pool):
        tried.append(1)
        raise torch.OutOfMemoryError('no memory\nfor this')

    monkeypatch.setattr(capture, 'KINDS', ('cpu',))
    monkeypatch.setattr(capture, 'record', make)
    with captured_steps(unet) as steps:
        assert equal(given(unet, 1, 2, 3, 4, 5), expected)
        assert len(tried) == 1 and steps.failure == 'no memory'
    (warning,) = [str(w.message) for w in recwarn if 'captured' in str(w.message)]
    assert warning == 'a step of LinearUNet2DConditionModel is not captured: no memory'
    unet.register_parameter('elsewhere', torch.nn.Parameter(torch.empty(1, device='meta')))
    with captured_steps(unet), pytest.warns(UserWarning, match='not all on cpu'):
        assert equal(given(unet, 1, 2, 3, 4, 5), expected)
    assert len(tried) == 1


def test_pipelines(frozen, monkeypatch):
    pipe = tiny.pipeline()
    with captured_steps(pipe) as steps:
        pipe('a cat', num_inference_steps=4, output_type='pt')
        assert len(frozen) == len(steps.graphs) == 1
    frozen.clear()
    dropped, forget = [], capture.CapturedSteps.forget
    monkeypatch.setattr(capture.CapturedSteps, 'forget', lambda self: dropped.append(len(self.graphs)) or forget(self))
    images, report = generate(pipe, ladder(pipe, 32, 32, 4, (1.0,)), say=str, prompt='a cat', capture=True)
    assert images.shape == (1, 3, 32, 32) and len(frozen) == len(report) == 2
    assert [pool for _, pool in frozen] == [None, None]
    assert dropped == [1, 0, 0, 1, 0]  # before decoding, encoding and decoding, and after each level
    assert 'forward' not in vars(pipe.unet)


def test_command(frozen, monkeypatch, tmp_path, capsys):
    tiny.pipeline().save_pretrained(tmp_path / 'model')
    monkeypatch.setattr('zoo.tools.generate_image._check', lambda args, device: None)  # it wants a GPU for this
    arguments = ['--linfusion', 'none', '--prompt', 'a cat', '--device', 'cpu', '--steps', '3']
    for more, graphs in (([], 0), (['--capture'], 1)):
        name = str(tmp_path / 'cat.png')
        assert main(['generate-image', str(tmp_path / 'model'), *arguments, *more, '--output', name]) == 0
        assert len(frozen) == graphs and 'generated in' in capsys.readouterr().out


def test_record(monkeypatch):
    """The order that CUDA needs: a side stream that waits, warm-up on it, a wait back, and one call in the graph."""
    said = []

    class Stream(contextlib.AbstractContextManager):
        def __init__(self, name='side'):
            self.name = name

        def wait_stream(self, other):
            said.append(f'{self.name} waits for {other.name}')

        def __exit__(self, *_):
            said.append('end')

    for name, value in {
        'Stream': Stream,
        'stream': lambda stream: said.append(stream.name) or stream,
        'current_stream': lambda: Stream('main'),
        'CUDAGraph': lambda: 'graph',
        'graph': lambda graph, pool: said.append((graph, pool)) or Stream(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    call = lambda: said.append('call') or len(said)  # noqa: E731
    assert record(call, pool='pool') == ('graph', 8)
    assert said == ['side waits for main', 'side', 'call', 'call', 'end', 'main waits for side', ('graph', 'pool'),
                    'call', 'end']  # fmt: skip
    said.clear()
    record(call, warmup=0)
    assert said == [('graph', None), 'call', 'end']


def test_mistakes(unet):
    with pytest.raises(ZooError, match='reduce-overhead'), captured_steps(torch.compile(unet)):
        pass
    with pytest.raises(ZooError, match='at least 1, got 0 and 4'), captured_steps(unet, after=0):
        pass
