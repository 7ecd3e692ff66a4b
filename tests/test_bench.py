"""The benchmark measures what it says, beside its peers, and writes down its conditions."""

import argparse
import dataclasses
import importlib
import json
import time
from pathlib import Path

import pytest
import torch
import zoo.kernels.ssd

from zoo.errors import ZooError
from zoo.tools import _bench_kernels, _bench_launch, _bench_models
from zoo.tools._bench_case import Case
from zoo.tools._bench_models import PEERS
from zoo.tools._timing import interleaved
from zoo.tools.bench import cli_bench

FAST = ['--device', 'cpu', '--repeats', '2', '--warmup', '1']
CONDITIONS = ('device', 'device_kind', 'threads', 'versions', 'commit', 'dtype', 'date', 'compile')


def bench(tmp_path, *argv):
    path = tmp_path / 'out' / 'result.json'
    assert cli_bench([*argv, *FAST, '--output', str(path)]) == 0
    result = json.loads(path.read_text())
    assert all(key in result for key in CONDITIONS)
    return result


def test_models(tmp_path, capsys):
    result = bench(tmp_path, 'models', '--models', 'test_vig,test_vig_hier', '--peers', 'test_vit', '--img-size', '160',
                   '--batch-size', '2')  # fmt: skip
    assert [r['model'] for r in result['results']] == ['test_vig', 'test_vig_hier', 'test_vit']
    for row in result['results']:
        assert row['min_ms'] <= row['median_ms'] and row['cold_ms'] > 0 and row['repeats'] == 2
        assert row['images_per_s'] == pytest.approx(2e3 / row['median_ms'], rel=0.01)
    times = {r['model']: r['median_ms'] for r in result['results']}
    for ratio in result['ratios']:
        assert ratio['time_ratio'] == pytest.approx(times[ratio['model']] / times[ratio['peer']], rel=0.01)
    assert len(result['ratios']) == 2
    out = capsys.readouterr().out
    assert 'first call' in out and 'test_vig against test_vit: time ratio' in out


def test_defaults_cover_what_is_promised(tmp_path, monkeypatch):
    """Without arguments: inference at 224 and 1024 and a training step at 224, the smallest ViG beside DeiT-tiny."""
    seen = []

    def fake(scenario, names, args):
        seen.append((scenario.size, scenario.train, tuple(names)))
        return [{'model': n, 'size': scenario.size, 'batch': scenario.batch, 'train': scenario.train, 'median_ms': 1.0,
                 'min_ms': 1.0, 'images_per_s': 1.0, 'cold_ms': 1.0} for n in names]  # fmt: skip

    monkeypatch.setattr(_bench_models, 'measure', fake)
    result = bench(tmp_path, 'models')
    pair = ('vig_tiny_patch16_224', 'deit_tiny_patch16_224')
    assert seen == [(224, False, pair), (1024, False, pair), (224, True, pair)]
    assert len(result['ratios']) == 3
    seen.clear()
    bench(tmp_path, 'models', '--models', 'vig_hier_tiny_224', '--peers', '--img-size', '224', '--train')
    assert seen == [(224, True, ('vig_hier_tiny_224', *PEERS['vig_hier_tiny_224']))]


SLOW_COMPILE = pytest.param(['--compile'], marks=pytest.mark.slow)


MODES = [['--train'], SLOW_COMPILE, ['--channels-last', '--dtype', 'bf16'], ['--pure', '--dtype', 'bf16', '--fuse']]


@pytest.mark.parametrize('flags', MODES)
def test_model_modes(flags, tmp_path):
    result = bench(tmp_path, 'models', '--models', 'test_vig', '--img-size', '32', '--batch-size', '2', *flags)
    (row,) = result['results']
    assert row['train'] == ('--train' in flags)
    assert row['compile'] == ('--compile' in flags) and row['channels_last'] == ('--channels-last' in flags)
    assert row['fused'] == ('--fuse' in flags) and result['pure'] == ('--pure' in flags)


def test_onnxruntime_beside_torch(tmp_path):
    """A table of its own, on what the exporter wrote; nothing but inference on the CPU."""
    pytest.importorskip('onnxscript'), pytest.importorskip('onnxruntime')
    args = ['models', '--models', 'test_mobilemamba', '--peers', 'test_resnet', '--img-size', '64', '--fuse']
    result = bench(tmp_path, *args, '--batch-size', '2', '--train', 'both', '--runtime', 'torch,onnxruntime')
    found = [(r['model'], r['train'], r['runtime']) for r in result['results'] if 'error' not in r]
    names = ('test_mobilemamba', 'test_resnet')
    modes = [(False, 'torch'), (True, 'torch'), (False, 'onnxruntime')]
    assert found == [(name, *mode) for mode in modes for name in names]
    assert [r['runtime'] for r in result['ratios']] == ['torch', 'torch', 'onnxruntime']
    for wrong in (['--runtime', 'onnx'], ['--runtime', 'onnxruntime', '--dtype', 'bf16'],
                  ['--runtime', 'onnxruntime', '--train', 'yes']):  # fmt: skip
        with pytest.raises(ZooError, match='--runtime'):
            bench(tmp_path, *args, *wrong)


def test_a_failing_model_is_a_row(tmp_path, monkeypatch):
    plain = _bench_models.build

    def build(name, **kwargs):
        if name == 'test_vit':
            raise RuntimeError('out of luck')
        return plain(name, **kwargs)

    monkeypatch.setattr(_bench_models, 'build', build)
    names = ['--models', 'test_vig', '--peers', 'test_vit,test_resnet', '--relative-to', 'test_resnet']
    size = ['--img-size', 'native', '--batch-size', '2', '--train', 'both', '--channels-last', 'test_res*']
    result = bench(tmp_path, 'models', *names, *size)
    assert len(result['results']) == 6 and result['complete']
    for train in (False, True):
        rows = {r['model']: r for r in result['results'] if r['train'] == train}
        assert rows['test_vit']['error'] == 'RuntimeError: out of luck'
        vig, resnet = rows['test_vig'], rows['test_resnet']
        assert vig['speed_ratio'] == pytest.approx(vig['images_per_s'] / resnet['images_per_s'], rel=0.01)
        assert resnet['channels_last'] and not vig['channels_last']
        assert vig['size'] == 96 and resnet['size'] == 160
    assert [(r['model'], r['peer'], r['train']) for r in result['ratios']] == [
        ('test_vig', 'test_resnet', False),
        ('test_vig', 'test_resnet', True),
    ]


def test_kernels(tmp_path, capsys):
    result = bench(tmp_path, 'kernels', '--shapes', 'vig_small_224', '--ops', 'bidirectional_gla')
    rows = {(r['implementation'], r['pass']): r for r in result['results']}
    assert set(rows) == {(i, p) for i in ('zoo', 'SDPA, full') for p in ('fwd', 'fwd+bwd')}
    for what in ('fwd', 'fwd+bwd'):
        ours, peer = rows['zoo', what], rows['SDPA, full', what]
        assert 0 < ours['floor_ms'] < ours['median_ms'] and ours['dims']['B'] == 4
        assert peer['times_ours'] == pytest.approx(peer['median_ms'] / ours['median_ms'], rel=0.01)
    assert result['complete'] and result['copy_gb_per_s'] > 0 and 'copy bandwidth' in capsys.readouterr().out


def test_launch(tmp_path, capsys):
    result = bench(tmp_path, 'kernels', '--launch', '--ops', 'swiglu,ssd_step_')
    rows = {(r['op'], r['pass']): r for r in result['results']}
    both = [(name, what) for name in (_bench_launch.YARDSTICK, 'swiglu') for what in ('fwd', 'fwd+bwd')]
    assert list(rows) == [*both, ('ssd_step_', 'fwd')]
    assert all(0 < row['min_us'] <= row['median_us'] and row['first_call_ms'] > 0 for row in rows.values())
    assert rows['swiglu', 'fwd']['min_us'] < rows['swiglu', 'fwd+bwd']['min_us']
    assert result['complete'] and 'Host time of one call' in capsys.readouterr().out
    result = bench(tmp_path, 'kernels', '--launch', '--ops=geglu', '--no-backward')
    assert [r['pass'] for r in result['results']] == ['fwd', 'fwd']
    with pytest.raises(ZooError, match='unknown name .flash.: --ops takes rms_norm, '):
        bench(tmp_path, 'kernels', '--launch', '--ops', 'flash')


def test_launch_has_every_public_op_and_a_failing_one_is_a_row(monkeypatch):
    """Each row runs, forward and backward; only oracles, questions, layers and constants have none."""
    public = set()
    for path in Path(zoo.kernels.ssd.__file__).parent.glob('[a-z]*.py'):
        names = importlib.import_module(f'zoo.kernels.{path.stem}').__all__
        public |= {n for n in names if n.islower() and not n.startswith(('naive_', 'fits_', 'haar_signs'))}
    assert {row.name.split(',')[0] for row in _bench_launch.rows()} == public | {_bench_launch.YARDSTICK}
    for row in _bench_launch.rows():
        for what, step in _bench_launch._steps(row, 'cpu', torch.float32).items():
            with torch.set_grad_enabled(what != 'fwd'):
                step()

    def fails(x):
        raise RuntimeError('no such kernel')

    monkeypatch.setattr(_bench_launch, 'rows', lambda: [_bench_launch.Row('bad', lambda draw: (draw(2),), fails)])
    args = argparse.Namespace(ops=None, device='cpu', dtype='fp32', backward=True, repeats=1, output=None)
    assert [r['error'] for r in _bench_launch.bench_launch(args)['results']] == ['RuntimeError: no such kernel'] * 2


def _toy_case(**peers):
    def make(device, dtype, seed):
        rng = torch.Generator(device).manual_seed(seed)
        return torch.randn(64, 8, 4, generator=rng, device=device).to(dtype), torch.ones(64, device=device), None

    def twice(x, scale, nothing):
        return 2 * x

    return Case('twice', 'toy', make, twice, peers, 2 * 64 * 32 * 2, 2 * 64 * 32 * 2, {'B': 64, 'T': 8, 'D': 4})


def test_a_failing_peer_is_a_row(tmp_path, monkeypatch):
    """Failures and overlong first calls are reported, the others still measured, and rows of a stopped run stay."""

    def fails(x, *_):
        raise RuntimeError('no such kernel')

    def hangs(x, *_):
        time.sleep(30)

    broken = dataclasses.replace(_toy_case(), shape='broken', make=fails)
    stops = dataclasses.replace(_toy_case(), shape='stops', ours=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(_bench_kernels, 'all_cases', lambda: [_toy_case(fails=fails, hangs=hangs), broken, stops])
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, 'kernels', '--peer-seconds', '0.2')
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert not result['complete']
    toy = {r['implementation']: r for r in result['results'] if r['shape'] == 'toy' and r['pass'] == 'fwd+bwd'}
    assert toy['zoo']['median_ms'] > 0
    assert 'no such kernel' in toy['fails']['error'] and 'TimeoutError' in toy['hangs']['error']
    assert 'no such kernel' in result['results'][-1]['error'] and result['results'][-1]['shape'] == 'broken'


def test_peers_are_chosen_by_label():
    case = _toy_case(**{'SDPA, full': abs, 'fla scan': abs, 'compiled': abs})
    chosen = {words: list(_bench_kernels._implementations(case, words)) for words in ('auto', 'none', 'all', 'fla')}
    assert chosen == {'auto': ['zoo', 'SDPA, full', 'compiled'], 'none': ['zoo'], 'all': ['zoo', *case.peers],
                      'fla': ['zoo', 'fla scan']}  # fmt: skip


def test_errors_are_those_of_the_op():
    """A result off by one percent has that error, and the batch is cut for the comparison."""
    case = dataclasses.replace(_toy_case(), reference=lambda x, scale, nothing: 2.02 * x)
    found = _bench_kernels.errors(case, 'cpu', torch.float32, backward=True)
    assert set(found) == {'o0', 'd0'} and all(e == pytest.approx(0.02 / 2.02, rel=0.01) for e in found.values())
    inputs = _bench_kernels.make_inputs(case, 'cpu', torch.bfloat16, 0, batch=3)
    assert inputs[0].shape == (3, 8, 4) and inputs[1].shape == (64,) and inputs[0].requires_grad


def test_ops_without_a_backward_pass(tmp_path, monkeypatch):
    """Steps that overwrite their arguments are timed and checked forward only."""
    case = dataclasses.replace(_toy_case(), ours=lambda x, *_: x.mul_(2), bytes_backward=0)
    monkeypatch.setattr(_bench_kernels, 'all_cases', lambda: [case])
    assert [r['pass'] for r in bench(tmp_path, 'kernels')['results']] == ['fwd']
    doubled = dataclasses.replace(case, reference=lambda x, *_: 2 * x)
    assert _bench_kernels.errors(doubled, 'cpu', torch.float32, backward=False) == {'o0': 0.0}


def test_every_case_is_named_once():
    cases = _bench_kernels.all_cases()
    names = [(case.op, case.shape) for case in cases]
    assert len(set(names)) == len(names) >= 9
    for case in cases:
        assert case.bytes_forward > 0 <= case.bytes_backward and case.dims['B'] > 0


def test_byte_floor():
    """q, k, two gates of 32 channels, v and o of 64: 128 x 196 x 6 x 256 numbers of two bytes."""
    case = next(c for c in _bench_kernels.all_cases() if c.op == 'bidirectional_gla' and c.shape == 'vig_small_224')
    assert case.bytes_forward == 128 * 196 * 6 * 256 * 2
    assert case.bytes_backward == 128 * 196 * 6 * (2 * 192 + 64) * 2


def test_medians_are_interleaved_and_cold_is_apart():
    calls = []

    def slow_first(name, seconds):
        def step():
            time.sleep(0.05 if name not in calls else seconds)
            calls.append(name)

        return step

    timed = interleaved({'a': slow_first('a', 0.001), 'b': slow_first('b', 0.01)}, 'cpu', warmup=1, repeats=3)
    assert calls == ['a', 'b', 'a', 'b'] + ['a', 'b'] * 3
    assert timed['a']['cold_ms'] > 45 and timed['a']['median_ms'] < 45
    assert timed['b']['median_ms'] > timed['a']['median_ms']


def test_mistakes(tmp_path):
    for argv, words in (
        (['models', '--models', 'vig_tinny'], 'unknown model'),
        (['models', '--img-size', '32', '64', '96', '--batch-size', '1', '2'], '--batch-size'),
        (['models', '--models', 'test_vig', '--relative-to', 'test_vit'], '--relative-to'),
        (['kernels', '--shapes', 'huge'], 'vig_small_224'),
        (['kernels', '--ops', 'convolution'], 'bidirectional_gla'),
    ):
        with pytest.raises(ZooError, match=words):
            cli_bench([*argv, *FAST])
    if not torch.cuda.is_available():
        with pytest.raises(ZooError, match='zoo doctor'):
            cli_bench(['models', '--device', 'cuda'])


def test_vlm(tmp_path):
    """All rows on four small layers: what was measured, the comparison and the plot."""
    picture = tmp_path / 'lengths.png'
    path = tmp_path / 'result.json'
    argv = ['vlm', '--quick', '--lengths', '24', '40', '--tokens', '4', '--device', 'cpu', '--prefill-chunk', '16']
    assert cli_bench([*argv, '--output', str(path), '--plot', str(picture)]) == 0
    result = json.loads(path.read_text())
    rows = {(r['row'], r['length']): r for r in result['results']}
    teachers = {'teacher', 'teacher captured', 'teacher compiled', 'teacher without cache', 'llama'}
    names = {'linear', 'hybrid', *teachers}
    assert result['complete'] and {n for n, _ in rows} == names and picture.stat().st_size > 10_000
    assert all(rows[name, n]['decode_ms'] > 0 for name in ('linear', 'hybrid', 'teacher captured') for n in (24, 40))
    pair = next(r for r in result['ratios'] if (r['row'], r['peer'], r['length']) == ('linear', 'teacher', 40))
    expected = rows['teacher', 40]['decode_ms'] / rows['linear', 40]['decode_ms']
    assert pair['decode_times_faster'] == pytest.approx(expected, abs=0.01)


def test_vlm_refuses_what_measures_nothing():
    with pytest.raises(ZooError, match="there is no 'mamba'"):
        cli_bench(['vlm', '--quick', '--rows', 'mamba'])
    with pytest.raises(ZooError, match='--tokens must be at least 2'):
        cli_bench(['vlm', '--quick', '--tokens', '1'])


UNET = ['unet', '--quick', '--models', 'sdxl', '--modes', 'eager']


def test_unet(tmp_path, capsys):
    pytest.importorskip('diffusers')
    plot = tmp_path / 'plot.png'
    more = ['--end-to-end', '128x128', '--steps', '3', '--plot', str(plot)]
    result = bench(tmp_path, *UNET, '--sizes', '64', *more)
    *rows, whole = result['results']
    names = ('sdpa', 'sdpa fused', 'sdpa fast', 'linfusion', 'linfusion fused', 'linfusion fast', 'formula', 'none')
    assert [(r['size'], r['row']) for r in rows] == [(64, row) for row in names]
    assert all(r['step_ms'] >= r['min_ms'] > 0 and r['batch'] == 2 and r['model'] == 'sdxl' for r in rows)
    times = {(r['size'], r['row']): r['step_ms'] for r in rows}
    for pair in result['ratios']:
        size = pair['size']
        expected = times[size, 'sdpa'] / times[size, pair['row']]
        assert pair['times_faster_than_sdpa'] == pytest.approx(expected, rel=0.01)
    assert whole['row'] == 'end to end' and whole['seconds'] >= sum(r['seconds'] for r in whole['levels']) * 0.9
    assert [(r['width'], r['steps']) for r in whole['levels']] == [(64, 3), (128, 1)]
    assert plot.exists() and 'a step, batch 2' in capsys.readouterr().out and result['versions']['diffusers']


def test_unet_rows_are_what_they_say():
    """The formula computes what the kernel computes, `none` nothing; afterwards the model is as before."""
    pytest.importorskip('diffusers')
    from zoo.diffusion.layers import FastAttention
    from zoo.tools._unet_rows import build, self_attention, step_inputs

    unet, linear = build('sd15', 'cpu', torch.float32, True)
    given, named = step_inputs(unet, 72, 2)
    names, kinds = set(unet.state_dict()), [type(m) for m in unet.modules()]
    with torch.no_grad():
        for p in linear.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        found = {}
        rows = ('linfusion', 'linfusion fused', 'linfusion fast', 'formula', 'sdpa', 'sdpa fused', 'sdpa fast', 'none')
        for row in (*rows, 'linfusion again'):
            with self_attention(linear, row):
                found[row] = unet(*given, **named)[0]
                more = sorted({n.split('.')[-2] for n in set(unet.state_dict()) - names})
                fused, softmax = row.endswith(('fused', 'fast')), row.startswith('sdpa')
                assert more == (['to_kv'] + softmax * ['to_qkv']) * fused
                fast = sum(type(m) is FastAttention for m in unet.modules())
                assert fast == row.endswith('fast') * len(linear.layers) * (1 + softmax)
            assert set(unet.state_dict()) == names and [type(m) for m in unet.modules()] == kinds
    same = (('formula', 'linfusion'), ('linfusion fused', 'linfusion'), ('sdpa fused', 'sdpa'))
    for one, other in (*same, ('linfusion fast', 'linfusion fused'), ('sdpa fast', 'sdpa fused')):
        torch.testing.assert_close(found[one], found[other], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found['linfusion fused'], found['linfusion'])
    assert torch.equal(found['linfusion'], found['linfusion again'])
    for row in ('sdpa', 'none'):
        assert (found[row] - found['linfusion']).abs().max() > 1e-3
    linear.detach()
    with torch.no_grad():
        assert torch.equal(unet(*given, **named)[0], found['sdpa'])


def test_unet_without_memory(tmp_path, monkeypatch):
    """Batch 1, then feed-forward layers in pieces, then an error; a step that would take too long is not tried."""
    pytest.importorskip('diffusers')
    from zoo.tools import _bench_unet

    plain, tried = _bench_unet._attempt, []

    def attempt(unet, mode, size, batch, pieces, args):
        tried.append((size, batch, pieces))
        if size == 72 or (size == 64 and batch > 1) or (size == 80 and pieces == 1):
            raise torch.OutOfMemoryError('no room')
        return plain(unet, mode, size, batch, pieces, args)

    monkeypatch.setattr(_bench_unet, '_attempt', attempt)
    result = bench(tmp_path, *UNET, '--rows', 'linfusion', '--sizes', '64', '72', '80')
    first, second, third = result['results']
    assert tried == [(n, b, p) for n in (64, 72, 80) for b, p in ((2, 1), (1, 1), (1, 8)) if (n, p) != (64, 8)]
    assert first['batch'] == 1 and 'feed_forward_pieces' not in first and third['feed_forward_pieces'] == 8
    assert second['error'] == 'OutOfMemoryError: no room' and result['ratios'] == []
    late = argparse.Namespace(row_seconds=100, device='cpu')
    assert 'a step would take about 26 s' in _bench_unet._row(None, 'eager', 64, 26, late)['error']


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--models', 'sd3'], "no 'sd3'"),
        (['--rows', 'flash'], "no 'flash'"),
        (['--modes', 'fast'], "no 'fast'"),
        (['--sizes', '60'], 'multiples of 8'),
        (['--batch', '0'], '--batch'),
        (['--end-to-end', '64'], 'write it as'),
    ],
)
def test_unet_mistakes(tmp_path, argv, words):
    with pytest.raises(ZooError, match=words):
        bench(tmp_path, 'unet', '--quick', *argv)


def test_detect(tmp_path):
    argv = ['detect', '--device=cpu', '--models=test_ravlt', '--peers=no_such_net,test_mobilemamba']
    small = ['--img-size=64', '--batch-size', '2', '--width=16', '--objects=2', '--warmup=0', '--repeats=1']
    small += [f'--output={tmp_path}/d.json', f'--plot={tmp_path}/d.png']
    with pytest.raises(ZooError, match='unknown model'):
        cli_bench([*argv, *small])
    argv[-1] = '--peers=test_vig'
    assert cli_bench([*argv, *small, '--freeze-norms=test_ravlt']) == 0
    result = json.loads((tmp_path / 'd.json').read_text())
    assert [row['model'] for row in result['results']] == ['test_ravlt', 'test_vig'] and result['complete']
    for row in result['results']:
        assert row['images_per_s'] == pytest.approx(2e3 / row['median_ms'], rel=0.01)
        assert row['parameters'] > row['backbone_parameters'] > 0
    assert [row['frozen_norms'] for row in result['results']] == [True, False]
    assert (tmp_path / 'd.png').stat().st_size > 5000
    assert cli_bench([*argv, *small, '--model-seconds=0.01']) == 0
    assert 'TimeoutError' in json.loads((tmp_path / 'd.json').read_text())['results'][0]['error']
