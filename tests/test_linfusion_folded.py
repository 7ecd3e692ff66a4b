"""Folded weights of linear self-attention: the same results, until anything that they come from changes."""

import copy

import pytest
import tiny_diffusion as tiny
import torch
from diffusers.models import attention_processor as processors
from peft import LoraConfig
from zoo.backbones.linfusion import LinearSelfAttention, LinFusion


@pytest.fixture(scope='module')
def plain():
    """A UNet that tests copy."""
    return tiny.unet()


@pytest.fixture
def folded(plain):
    """A linear UNet and its LinFusion, with folded weights."""
    model = copy.deepcopy(plain)
    linear = LinFusion.attach(model, init='random', projection_mid_dim='div:4')
    linear.fuse()
    return model, linear


def test_fused_projections(plain):
    model = copy.deepcopy(plain)
    linear = LinFusion.attach(model, init='random')
    expected = tiny.step(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(tiny.step(model), expected, rtol=1e-4, atol=1e-5)
    assert not any('attn1.to_qkv' in k or 'folded' in k for k in model.state_dict())
    linear.detach()  # the softmax layers follow: their processors need fused weights
    torch.testing.assert_close(tiny.step(model), tiny.step(plain))
    linear.mount(model)
    torch.testing.assert_close(tiny.step(model), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.step(model), expected)


@pytest.mark.parametrize('middle', [None, 4, -1])
def test_folded_weights(middle):
    """Equal to the layer as it is, until a weight changes; in fp64 the folding itself is exact."""
    torch.manual_seed(0)
    layer = LinearSelfAttention(32, 4, middle, bias=True).double()
    x, used = torch.randn(2, 7, 32, dtype=torch.float64), []
    relative = lambda y, z: ((y - z).norm() / z.norm()).item()  # noqa: E731
    with torch.no_grad():
        [p.copy_(torch.randn_like(p) * 0.3) for p in layer.parameters()]
        expected, names = layer(x), set(layer.state_dict())
        layer.fuse_projections()
        layer.set_processor(processors.FusedAttnProcessor2_0())
        folded = layer._folded
        layer._folded = lambda *args: used.append(1) or folded(*args)
        assert relative(layer(x), expected) < 1e-12 and used
        assert set(layer.state_dict()) == names
        assert relative(layer.float()(x.float()), expected) < 1e-5 and len(used) == 2
        compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
        assert relative(compiled(x.float()), expected) < 1e-5
        used.clear()
        layer.to_q.weight.mul_(2)
        changed = layer(x.float())
        assert not used and relative(changed, expected) > 1e-2
        assert relative(compiled(x.float()), changed) < 1e-5
        layer.fuse_projections()
        assert relative(layer(x.float()), changed) < 1e-5 and used
    used.clear()
    assert layer(x.float()).requires_grad and not used


def uses_folded(linear):
    with torch.no_grad():
        return {layer._uses_folded('cpu') for layer in linear.layers.values()}


def folding_anew(model, linear):
    """The step as it is, and with weights that are folded from what the layers hold now."""
    found = tiny.step(model)
    linear.fuse()
    return found, tiny.step(model)


@pytest.mark.parametrize('targets', [['to_q', 'to_k', 'to_v', 'to_out.0'], ['to_q'], r'.*to_q_\.0'])
def test_lora_on_folded_layers(folded, targets):
    """Nothing of an adapter is lost: while it is there, and when it is gone and its weights are merged."""
    model, linear = folded
    before = tiny.step(model)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected = tiny.step(model)
    assert uses_folded(linear) == {False} and (expected - before).abs().max() > 1e-3
    model.fuse_lora(), model.unload_lora()
    found, anew = folding_anew(model, linear)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(anew, expected, rtol=1e-4, atol=1e-5)
    assert uses_folded(linear) == {True}


def test_lora_that_is_merged_before_the_next_step(folded):
    """The weights are written in a way that torch does not count, by modules that are gone again."""
    model, linear = folded
    before = tiny.step(model)
    model.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_k', 'to_v'], init_lora_weights=False))
    model.fuse_lora(), model.unload_lora()
    found, anew = folding_anew(model, linear)
    torch.testing.assert_close(found, anew, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_weights_that_are_replaced(folded):
    model, linear = folded
    before = tiny.step(model)
    for p in linear.parameters():
        p.data = 1.5 * p.data
    found, anew = folding_anew(model, linear)
    torch.testing.assert_close(found, anew, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_copies_fold_for_themselves(folded):
    """A copy counts changes from 0: in-place ones could bring it to the number that its original had."""
    model = copy.deepcopy(folded[0])
    linear = LinFusion.of(model)
    before = tiny.step(model)
    with torch.no_grad():
        for _ in range(2):
            [p.mul_(1.5) for p in linear.parameters()]
            found, anew = tiny.step(model), copy.deepcopy(model)
            LinFusion.of(anew).fuse()
            torch.testing.assert_close(found, tiny.step(anew), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_folded_weights_move_along(folded):
    model, linear = folded
    model.to(torch.bfloat16).to(torch.float32)
    assert uses_folded(linear) == {True}
    found, anew = folding_anew(model, linear)
    torch.testing.assert_close(found, anew, rtol=0.05, atol=0.02)


def test_autocast_takes_the_layers_as_they_are(plain):
    model = copy.deepcopy(plain)
    linear = LinFusion.attach(model, init='random')
    with torch.autocast('cpu', torch.bfloat16):
        expected = tiny.step(model)
        linear.fuse()
        torch.testing.assert_close(tiny.step(model), expected)


def test_what_is_not_folded():
    """Changes to tensors of inference mode are not counted; weights in 8 bits are for storage only."""
    with torch.inference_mode():
        model = tiny.unet()
        linear = LinFusion.attach(model, init='random')
        expected = tiny.step(model)
        linear.fuse()
        assert torch.equal(tiny.step(model), expected) and uses_folded(linear) == {False}
    model = tiny.unet()
    linear = LinFusion.attach(model, init='random')
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = tiny.step(model)
    linear.fuse()
    assert torch.equal(tiny.step(model), expected) and uses_folded(linear) == {False}
