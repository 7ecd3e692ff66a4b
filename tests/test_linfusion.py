"""LinFusion: recorded outputs of the published code, attaching and detaching, files, what diffusers does to UNets."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from parity.weights import state_dict
from zoo.backbones.linfusion import LinFusion

PARITY = Path(__file__).parent / 'parity'


def recorded():
    """The case's teacher UNet, tensors of the linear layers, inputs and recorded arrays."""
    manifest, arrays = json.loads((PARITY / 'linfusion_tiny.json').read_text()), np.load(PARITY / 'linfusion_tiny.npz')
    weights = state_dict(manifest, arrays)
    part = lambda name: {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}  # noqa: E731
    unet = UNet2DConditionModel(**manifest['unet_config']).eval()
    unet.load_state_dict(part('unet/'))
    inputs = {}
    for name, spec in manifest['inputs'].items():
        rng = np.random.RandomState(spec['seed'])
        inputs[name] = (
            torch.from_numpy(rng.randint(0, spec['high'], size=spec['shape']))
            if spec['kind'] == 'int'
            else torch.from_numpy(rng.standard_normal(size=spec['shape']).astype(np.float32))
        )
    out = {k.removeprefix('out/'): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith('out/')}
    return manifest, unet, part('linfusion/'), inputs, out


def keep_outputs(layers):
    """Outputs of the layers, filled at every forward pass."""
    kept = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, y, name=name: kept.update({name: y}))
    return kept


def test_matches_the_published_code():
    """Outputs at two sizes, the three losses of distillation, the layers' outputs and every gradient's norm."""
    manifest, unet, weights, inputs, out = recorded()
    assert sum(p.numel() for p in unet.parameters()) == manifest['params_unet_teacher']
    run = lambda size: unet(inputs[f'latents_{size}'], inputs['timestep'], inputs['encoder_hidden_states']).sample  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, out[b], rtol=1e-5, atol=1e-5)  # noqa: E731
    unet.requires_grad_(False)
    linear = LinFusion.attach(unet, weights)
    assert sum(p.numel() for p in linear.parameters()) == manifest['params']
    assert sum(p.numel() for p in unet.parameters()) == manifest['params_unet_student']
    assert linear.config.modules_list == manifest['linfusion_config']['modules_list']
    with torch.no_grad(), linear.teacher() as softmax:
        taught = keep_outputs({name: softmax.get_submodule(name) for name in linear.layers})
        close(run('24x16'), 'teacher_24x16')
        close(target := run('16x16'), 'teacher_16x16')
    with torch.no_grad():
        close(run('24x16'), 'noise_pred_24x16')
    learnt = keep_outputs(linear.layers)
    found = run('16x16')
    close(found, 'noise_pred_16x16')
    layers = list(linear.layers)
    features = torch.stack([F.mse_loss(learnt[n], taught[n]) for n in layers])
    noise, distilled = F.mse_loss(found, inputs['target']), F.mse_loss(found, target)
    loss = noise + 0.5 * distilled + 0.5 * features.mean()
    close(torch.stack([loss, noise, distilled, features.mean()]), 'loss')
    close(features, 'feat_mse')
    close(torch.stack([learnt[n].std() for n in layers]), 'attn_std')
    close(learnt[layers[0]][:, ::4], 'attn0')
    loss.backward()
    parameters = dict(linear.named_parameters())
    norms = torch.stack([parameters[k].grad.norm() for k in weights])
    close(norms, 'grad_norm')
    close(parameters['0.to_q.weight'].grad, 'grad_to_q_0')
    assert all(p.grad is None for n, p in unet.named_parameters() if 'attn1' not in n)
