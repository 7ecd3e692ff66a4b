"""The benchmark measures what it says, beside its peers, and writes down its conditions."""

import json
import time

import pytest
import torch

from zoo.errors import ZooError
from zoo.tools._bench_kernels import SHAPES, floor_bytes
from zoo.tools._timing import interleaved
from zoo.tools.bench import PEERS, cli_bench

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
    from zoo.tools import bench as tool

    seen = []

    def fake(scenario, names, args):
        seen.append((scenario.size, scenario.train, tuple(names)))
        return [{'model': n, 'size': scenario.size, 'batch': scenario.batch, 'train': scenario.train, 'median_ms': 1.0,
                 'min_ms': 1.0, 'images_per_s': 1.0, 'cold_ms': 1.0} for n in names]  # fmt: skip

    monkeypatch.setattr(tool, 'measure', fake)
    result = bench(tmp_path, 'models')
    pair = ('vig_tiny_patch16_224', 'deit_tiny_patch16_224')
    assert seen == [(224, False, pair), (1024, False, pair), (224, True, pair)]
    assert len(result['ratios']) == 3
    seen.clear()
    bench(tmp_path, 'models', '--models', 'vig_hier_tiny_224', '--peers', '--img-size', '224', '--train')
    assert seen == [(224, True, ('vig_hier_tiny_224', *PEERS['vig_hier_tiny_224']))]


SLOW_COMPILE = pytest.param(['--compile'], marks=pytest.mark.slow)


@pytest.mark.parametrize('flags', [['--train'], SLOW_COMPILE, ['--channels-last', '--dtype', 'bf16']])
def test_model_modes(flags, tmp_path):
    result = bench(tmp_path, 'models', '--models', 'test_vig', '--img-size', '32', '--batch-size', '2', *flags)
    (row,) = result['results']
    assert row['train'] == ('--train' in flags)
    assert result['compile'] == ('--compile' in flags) and result['channels_last'] == ('--channels-last' in flags)


def test_kernels(tmp_path, capsys):
    result = bench(tmp_path, 'kernels', '--shapes', 'vig_small_224')
    rows = {(r['op'], r['pass']): r for r in result['results']}
    assert {op for op, _ in rows} == {'bidirectional_gla', 'gated_linear_attention', 'SDPA, full'}
    assert {p for _, p in rows} == {'fwd', 'fwd+bwd'}
    assert 0 < rows['bidirectional_gla', 'fwd']['floor_ms'] < rows['bidirectional_gla', 'fwd']['median_ms']
    assert result['copy_gb_per_s'] > 0 and 'copy bandwidth' in capsys.readouterr().out


def test_byte_floor():
    """q, k, two gates of 32 channels, v and o of 64: 128 x 196 x 6 x 256 numbers of two bytes."""
    assert floor_bytes(SHAPES['vig_small_224'], 2, 2) == 128 * 196 * 6 * 256 * 2


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
        (['kernels', '--shapes', 'huge'], 'vig_small_224'),
    ):
        with pytest.raises(ZooError, match=words):
            cli_bench([*argv, *FAST])
    if not torch.cuda.is_available():
        with pytest.raises(ZooError, match='zoo doctor'):
            cli_bench(['models', '--device', 'cuda'])
