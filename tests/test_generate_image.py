"""`zoo generate-image`: the ladder to large images, what saves memory, and the estimate before it starts."""

from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from zoo.backbones.linfusion import LinFusion

from zoo.cli import main
from zoo.diffusion import memory
from zoo.diffusion.highres import Savings, Stage, check_memory, enlarge, estimate, generate, ladder, savings
from zoo.errors import ZooError


@pytest.fixture(scope='module')
def pipe():
    """A linear pipeline in miniature: native side 16, a latent for every 2 pixels."""
    found = tiny.pipeline()
    LinFusion.attach(found, init='random')
    return found


@pytest.fixture(scope='module')
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp('pipeline')
    pipe.save_pretrained(path)
    return path


def test_ladder(pipe):
    shape = lambda *size, **k: [(s.width, s.height, s.strength) for s in ladder(pipe, *size, **k)]  # noqa: E731
    assert shape(16, 16) == [(16, 16, None)] and shape(24, 56) == [(24, 56, None)]
    assert shape(128, 64) == [(32, 16, None), (64, 32, 0.4), (128, 64, 0.3)]
    assert [s for *_, s in shape(1024, 1024)] == [None, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    assert shape(80, 48, native=24) == [(40, 24, None), (80, 48, 0.4)]
    assert shape(64, 64, native=64) == [(64, 64, None)]
    assert [s.calls for s in ladder(pipe, 64, 64, 20)] == [20, 8, 6]


@pytest.mark.parametrize(
    'size, options, words',
    [
        ((31, 64), {}, 'multiples of 8, such as 32x64'),
        ((36, 64), {}, 'multiples of 8, such as 32x64'),  # no pipeline takes it, whatever its VAE could
        ((0, 64), {}, 'multiples of 8'),
        ((64, 64), dict(native=-1), 'at least 1'),
        ((64, 64), dict(steps=2), 'at least one of 2 steps'),
        ((64, 64), dict(strengths=(1.5,)), 'strength'),
        ((64, 64), dict(strengths=()), 'strength'),
    ],
)
def test_ladders_that_cannot_be(pipe, size, options, words):
    with pytest.raises(ZooError, match=words):
        ladder(pipe, *size, **options)


def test_generates_each_level_from_the_one_before(pipe):
    stages = ladder(pipe, 64, 32, 4, (0.5,))
    said = []
    image, report = generate(pipe, stages, seed=3, say=said.append, prompt='a cat')
    assert image.shape == (1, 3, 32, 64) and 0 <= image.min() < image.max() <= 1
    assert said == ['1/2: 32x16, 4 steps', '2/2: 64x32, 2 steps']
    assert [(r['width'], r['height'], r['steps']) for r in report] == [(32, 16, 4), (64, 32, 2)]
    assert all(r['seconds'] >= r['decode'] > 0 for r in report) and 'encode' in report[1]
    again, _ = generate(pipe, stages, seed=3, say=said.append, prompt='a cat')
    other, _ = generate(pipe, stages, seed=4, say=said.append, prompt='a cat')
    assert torch.equal(image, again) and not torch.equal(image, other)
    small, _ = generate(pipe, stages[:1], seed=3, say=said.append, prompt='a cat')
    faint, _ = generate(pipe, [stages[0], Stage(64, 32, 0.05, 40)], seed=3, say=said.append, prompt='a cat')
    assert small.shape == (1, 3, 16, 32)
    near, far = ((x - enlarge(small, 64, 32)).abs().mean() for x in (faint, image))
    assert near < far


def test_savings_change_nothing(pipe):
    stages = ladder(pipe, 64, 32, 4, (0.5,))
    run = lambda *how: generate(pipe, stages, Savings(*how), say=str, prompt='a cat')[0]  # noqa: E731
    plain = run(False, 1, 0)
    torch.testing.assert_close(run(True, 3, 0), plain, rtol=1e-4, atol=1e-4)
    tiled = run(False, 1, 32)
    assert pipe.vae.use_tiling and tiled.shape == plain.shape and not torch.equal(tiled, plain)
    assert (tiled - plain).abs().mean() < 0.1
    run(False, 1, 64)
    assert not pipe.vae.use_tiling
    for module in (pipe.unet, pipe.vae, pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff):
        assert not {'forward', 'encode', 'decode'} & module.__dict__.keys()


def test_pieces_of_a_step(pipe):
    """Every way of calling a UNet: tuples, outputs, odd batches, numbers of tokens that the pieces do not divide."""
    calls, ff = [], []
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    hooks = [pipe.unet.conv_in.register_forward_hook(lambda _, x, y: calls.append(len(y))),
             block.ff.net[0].register_forward_hook(lambda _, x, y: ff.append(y.shape[1]))]  # fmt: skip
    expected = tiny.step(pipe.unet, (7, 9))
    calls.clear(), ff.clear()
    with savings(pipe.unet, Savings(True, 3)):
        torch.testing.assert_close(tiny.step(pipe.unet, (7, 9)), expected, rtol=1e-4, atol=1e-5)
        assert calls == [1, 1] and sum(ff) == 2 * 20 and len(ff) == 6
        with torch.no_grad():
            latents, t, text = tiny.inputs((7, 9))
            pair = pipe.unet(latents, 7, encoder_hidden_states=text, return_dict=False)
            one = pipe.unet(latents[:1], t[:1], text[:1]).sample
    assert isinstance(pair, tuple) and pair[0].shape == expected.shape
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-5)
    [h.remove() for h in hooks]


def test_peak_of_a_known_sequence():
    class Net(torch.nn.Module):
        def forward(self, x):  # (100,) fp32
            a = x + 1  # 400 bytes
            b = torch.cat([a, a])  # 1200
            view = b[:50]
            del a, b  # 800, kept by the view
            c = view * 2  # 1000
            del view  # 200
            return c.repeat(4)  # 1000

    x = torch.empty(100, device='meta')
    assert memory.peak_bytes(lambda: Net()(x)) == 1200
    assert memory.peak_bytes(lambda: x.view(10, 10).add_(1)) == 0


def test_attention_counts_no_scores():
    q = torch.empty(1, 2, 1000, 8, device='meta')
    count = memory.peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert count == 1000 * 2 * 8 * 4


def test_estimates_grow_with_pixels_and_fall_with_savings(pipe):
    at = lambda n, *how: estimate(pipe, [Stage(n, n, None, 4)], Savings(*how))  # noqa: E731
    base, four, less = at(64, False, 1, 0), at(128, False, 1, 0), at(128, True, 4, 32, 'sequential')
    assert four['step'] == pytest.approx(4 * base['step'], rel=0.05)
    assert four['vae'] == pytest.approx(4 * base['vae'], rel=0.3)
    assert less['step'] < 0.6 * four['step'] and less['vae'] < four['vae'] and less['weights'] == 0
    size = memory.weight_bytes(pipe.unet, pipe.vae, pipe.text_encoder, None)
    assert base['weights'] == four['weights'] == size
    assert base['total'] == int(1.1 * (size + max(base['step'], base['vae'])))


def test_the_estimate_is_what_a_step_allocates(pipe):
    """Counted on real tensors by the same rule: meta tensors leave nothing out."""
    latents, t, text = tiny.inputs((16, 16))
    with torch.no_grad(), memory.PeakMemory() as real:
        pipe.unet(latents, t, text)
    twin = memory.on_meta(pipe.unet, torch.float32)
    meta = memory.peak_bytes(lambda: twin(*(x.to('meta') for x in (latents, t, text))))
    assert meta == pytest.approx(real.peak, rel=0.15)


def test_what_does_not_fit_is_refused_with_what_does(pipe):
    stages, how = [Stage(128, 256, None, 4)], Savings(tile=0)
    need = estimate(pipe, stages, how)['total']
    assert check_memory(pipe, stages, how, 'cpu', limit=need)['total'] == need
    with pytest.raises(ZooError, match=r'128x256 needs about .* that fits is \d+x\d+.*--chunk-guidance') as error:
        check_memory(pipe, stages, how, 'cpu', limit=int(0.6 * need))
    width, height = map(int, str(error.value).split('that fits is ')[1].split('.')[0].split('x'))
    assert estimate(pipe, [Stage(width, height, None, 4)], how)['total'] <= 0.6 * need
    assert 1.9 < height / width < 2.1 and width >= 80
    with pytest.raises(ZooError, match='no size of this shape fits'):
        check_memory(pipe, stages, how, 'cpu', limit=1000)


def test_command(folder, tmp_path, capsys):
    target = tmp_path / 'out' / 'cat.png'
    arguments = ['generate-image', str(folder), '--prompt', 'a cat', '--steps', '4', '--device', 'cpu']
    more = ['--strengths', '0.5', '--size', '64x32', '--images', '2']
    assert main([*arguments, *more, '--output', str(target)]) == 0
    out = capsys.readouterr().out
    assert 'levels: 32x16 (4 steps), 64x32 (2 steps)' in out and 'memory: about weights' in out
    found = sorted(target.parent.iterdir())
    assert [p.name for p in found] == ['cat_0.png', 'cat_1.png']
    assert Image.open(found[0]).size == (64, 32) and np.asarray(Image.open(found[0])).std() > 0
    assert main([*arguments, '--output', str(tmp_path / 'cat.jpg')]) == 0
    assert Image.open(tmp_path / 'cat.jpg').format == 'JPEG' and 'generated in' in capsys.readouterr().out
    assert main([*arguments, '--dry-run', '--output', str(tmp_path / 'no.png')]) == 0
    assert 'levels: 16x16 (4 steps)' in capsys.readouterr().out and not (tmp_path / 'no.png').exists()


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--size', '64'], 'write it as'),
        (['--size', '63x64'], 'multiples of 8'),
        (['--native', '-1'], '--native -1'),
        (['--device', 'gpu'], '--device gpu'),
        (['--linfusion', 'none'], 'holds no softmax layers'),
        (['--output', str(Path(__file__).parent)], 'is a folder'),
        (['--output', f'{__file__}/image.png'], 'is no folder'),
        (['--size', '640x640', '--memory-gb', '0.02'], 'largest size of this shape'),
        (['--linfusion', 'no/thing'], '--linfusion no/thing'),
        (['--offload', 'model'], 'main memory'),
        (['--capture'], 'a CPU has none of'),
        (['--tile', '7'], '--tile'),
        (['--output', 'image.gif'], 'name it with one of .png'),
        (['--steps', '0'], '--steps'),
    ],
)
def test_mistakes_on_the_command_line(folder, tmp_path, arguments, words, capsys):
    target = tmp_path / 'image.png'
    base = ['generate-image', str(folder), '--prompt', 'a cat', '--device', 'cpu', '--output', str(target)]
    assert main([*base, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and 'Traceback' not in said and not target.exists()


def test_other_mistakes(tmp_path, capsys):
    assert main(['generate-image', str(tmp_path), '--prompt', 'a']) == 2
    assert 'does not load' in capsys.readouterr().err
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / 'softmax')
    assert main(['generate-image', str(tmp_path / 'softmax'), '--prompt', 'a', '--device', 'cpu']) == 2
    assert 'no published LinFusion weights fit' in capsys.readouterr().err
    target = ['--linfusion', 'none', '--steps', '1', '--output', str(tmp_path / 'x.png'), '--device', 'cpu']
    assert main(['generate-image', str(tmp_path / 'softmax'), '--prompt', 'a', *target]) == 0

    class Alone(StableDiffusionPipeline):
        pass

    with pytest.raises(ZooError, match='no image-to-image sibling'):
        generate(Alone(**pipe.components, requires_safety_checker=False), ladder(pipe, 32, 32), prompt='a')


def test_the_class_pipeline_of_training_is_told_apart(tmp_path, capsys):
    """diffusers loads it by name, and it takes no prompts."""
    from diffusers import DDPMScheduler, DiffusionPipeline

    from zoo.diffusion.class_to_image import ClassToImagePipeline, build_class_unet

    unet = build_class_unet(tiny.UNET | dict(in_channels=3, out_channels=3), 2)
    ClassToImagePipeline(unet, DDPMScheduler(), {'0': 'cat', '1': 'dog'}).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is ClassToImagePipeline
    assert main(['generate-image', str(tmp_path), '--prompt', 'cat', '--device', 'cpu']) == 2
    assert 'ClassToImagePipeline does not make an image of a text' in capsys.readouterr().err


def pixart(sample_size=8):
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    widths = dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=12)
    shape = dict(sample_size=sample_size, in_channels=4, out_channels=8, num_layers=1, patch_size=2, norm_num_groups=4)
    model = PixArtTransformer2DModel(**widths, **shape)
    found = PixArtAlphaPipeline(None, None, tiny.pipeline().vae, model.eval(), DDIMScheduler())
    found.set_progress_bar_config(disable=True)
    LinFusion.attach(found, init='random')
    return found


def test_pixart_makes_the_size_that_was_asked_for():
    """Not a size of its table, resized; and sides are multiples of the pixels of a token."""
    pipe, made = pixart(32), []
    text, mask = torch.randn(2, 1, 5, 12), torch.ones(1, 5)
    prompts = dict(prompt_embeds=text[0], prompt_attention_mask=mask, negative_prompt=None)
    prompts |= dict(negative_prompt_embeds=text[1], negative_prompt_attention_mask=mask)
    pipe.transformer.register_forward_pre_hook(lambda _, given: made.append(given[0].shape[-2:]))
    image, _ = generate(pipe, ladder(pipe, 72, 40, 2), say=str, **prompts)
    assert image.shape == (1, 3, 40, 72) and set(made) == {(20, 36)}
    with pytest.raises(ZooError, match='no image-to-image sibling'):
        ladder(pixart(), 64, 64)
    pipe.vae_scale_factor = 8  # as of the real VAE: a token has 16 pixels
    with pytest.raises(ZooError, match='multiples of 16, such as 64x96'):
        ladder(pipe, 72, 96)
