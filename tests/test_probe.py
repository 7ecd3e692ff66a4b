"""zoo probe: what it reports of networks, from features that it computes once."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.data import HubImages
from zoo.errors import ZooError
from zoo.tools._probe_fit import Features, Splits, accuracies, fit_heads, principal_axes, probe_head, probe_knn
from zoo.tools.probe import cli_probe, open_data

LRS = [1e-3, 1e-2]
SETTINGS = argparse.Namespace(lrs=LRS, steps=40, batch_size=64, seed=0, ks=[1, 5], temperature=0.07)


def blobs(count, seed):
    """Three classes in 20 dimensions, whose first 8 say less than all."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % 3
    centres = torch.randn(3, 20, generator=torch.Generator().manual_seed(9))
    centres[:, :8] *= 0.3
    x = centres[target] + 0.8 * torch.randn(count, 20, generator=generator)
    return Features(x, x.view(count, 2, 10), target)


SPLITS = Splits(blobs(300, 1), blobs(100, 2), blobs(200, 3))


@pytest.mark.parametrize(('name', 'options'), [('matryoshka', {'embed_dim': 20}), ('moment', {'hidden': 32})])
def test_learning_rates_do_not_see_each_other(name, options):
    def fit(lrs):
        return fit_heads(name, options, SPLITS.fit, 3, lrs, 6, 32, 0, lambda: None)

    together, alone = fit(LRS)[1], fit(LRS[1:])[0]
    for a, b in zip(together.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(next(fit(LRS)[0].parameters()), next(together.parameters()))


def test_rows_of_heads():
    ticks = []
    splits = SPLITS.normalised()
    torch.testing.assert_close(splits.fit.pooled.mean(0), torch.zeros(20), atol=1e-5, rtol=0)
    rows, head = probe_head('linear', 'matryoshka', {}, splits, 3, SETTINGS, lambda: ticks.append(1))
    assert [row['dim'] for row in rows] == [8, 16, 20] and len(ticks) == SETTINGS.steps
    assert rows[-1]['top1'] > rows[0]['top1'] + 0.1 and rows[-1]['top1'] > 0.85
    wide = (head.nested(None, splits.test.pooled)[-1].argmax(1) == splits.test.target).float().mean()
    assert rows[-1]['top1'] == pytest.approx(float(wide)) and rows[-1]['lr'] in LRS
    assert rows[-1]['top1'] == pytest.approx(accuracies(head, splits.test, chunk=7)[-1])


def test_rows_of_neighbours_and_principal_components():
    rows = probe_knn('n', principal_axes(SPLITS.fit.pooled), SPLITS, 3, SETTINGS, lambda: None)
    raw = probe_knn('n', lambda x: x, SPLITS, 3, SETTINGS, lambda: None)
    assert [row['dim'] for row in rows] == [8, 16, 20] and {row['k'] for row in rows} <= {1, 5}
    assert rows[0]['top1'] > raw[0]['top1'] + 0.1  # the first 8 components hold what the first 8 features lack
    turned = principal_axes(SPLITS.fit.pooled)(SPLITS.fit.pooled)
    torch.testing.assert_close(turned.var(0), turned.var(0).sort(descending=True).values)
    torch.testing.assert_close(turned.T.cov(), torch.diag(turned.var(0)), atol=1e-4, rtol=0)


RUN = ['--data.num_workers=0', '--data.batch_size=64', '--model.optim.lr_per=null', '--model.schedule.warmup_epochs=0']
RUN += [
    '--model.net=test_vit',
    '--trainer.max_epochs=2',
    '--trainer.limit_train_batches=12',
    '--trainer.accelerator=cpu',
]
FEW = ['--steps=40', '--batch-size=64', '--lrs', '1e-2', '3e-2', '--ks', '5', '--hidden=32', '--device=cpu']


def test_fit_and_probe_then_probe_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['probe', '--fit', 'probe/quickstart', *RUN, *FEW, '--output', 'out']) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert 'matryoshka' in out and 'settings chosen on val' in out
    first = json.loads((tmp_path / 'out/probe.json').read_text())
    with Image.open(tmp_path / 'out/probe.png') as image:
        assert min(image.size) > 300
    assert first['images'] == {'fit': 1257, 'choose': 180, 'test': 360} and first['left_out'] == []
    found = {(row['method'], row['dim']): row['top1'] for row in first['rows']}
    for method in ('linear', 'matryoshka', 'matryoshka, one matrix', 'neighbours', 'neighbours, matryoshka'):
        assert {d for m, d in found if m == method} == {8, 16, 32, 64}
    assert min(found['linear', 64], found['moment', 64]) > 0.2  # chance is 0.1, its deviation 0.016
    # its own classifiers are as good as the run's test says
    checkpoint = 'out/backbone/checkpoints/best.ckpt'
    assert main(['test', f'--ckpt_path={checkpoint}', '--output=t']) == 0
    own = ', '.join(f'{d}: {100 * found["own classifier", d]:.2f} %' for d in (8, 16, 32, 64))
    assert f'(by features used, {own})' in capsys.readouterr().out
    # once more from the checkpoint: the same numbers; without tokens no second moments
    again = ['probe', checkpoint, *FEW, '--output', 'again', '--tokens-gb', '0', '--json']
    assert main(again) == 0
    second = json.loads(capsys.readouterr().out)
    assert second['left_out'] and second['model'] == 'test_vit'
    rows = [r for r in first['rows'] if r['method'] != 'moment']
    assert [(r['method'], r['dim'], r['top1']) for r in second['rows']] == [
        (r['method'], r['dim'], r['top1']) for r in rows
    ]


def parquet(folder, classes=4, count=12):
    datasets, rng = pytest.importorskip('datasets'), np.random.default_rng(0)
    features = datasets.Features({'img': datasets.Image(), 'label': datasets.ClassLabel(names=list('wxyz'))})
    for split in ('train', 'test'):
        images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {'img': images, 'label': [i % classes for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{split}.parquet')
    return folder


def test_some_classes_of_a_data_set(tmp_path):
    folder, cache = str(parquet(tmp_path)), str(tmp_path / 'cache')
    data = HubImages(folder, cache_dir=cache, val='test', classes=['z', 1], num_workers=0)
    data.setup()
    assert data.class_names == ['z', 'x'] and len(data.splits['train']) == 6
    assert [data.splits['train'].load(i)[1] for i in range(6)] == [1, 0] * 3  # rows 1, 3, 5, ...: x z x z x z
    assert data.splits['train'].name(1).endswith('row 3')
    for classes, word in ((['q'], 'there is no q'), (['x', 1], 'different'), ([], 'different')):
        with pytest.raises(ZooError, match=word):
            HubImages(folder, cache_dir=cache, val='test', classes=classes).setup()


def test_classes_never_trained_on_are_probed(tmp_path):
    config = tmp_path / 'a.yaml'
    init = {'path': str(parquet(tmp_path)), 'cache_dir': str(tmp_path / 'cache'), 'val': 'test', 'classes': [0, 2]}
    config.write_text(json.dumps({'data': {'class_path': 'zoo.data.HubImages', 'init_args': init}}))
    assert open_data(config, ['--data.batch_size=4'], all_classes=False).classes == [0, 2]
    data = open_data(config, ['--data.batch_size=4'], all_classes=True)
    assert data.classes is None and data.batch_size == 4
    del init['classes']
    config.write_text(json.dumps({'data': {'class_path': 'zoo.data.HubImages', 'init_args': init}}))
    with pytest.raises(ZooError, match='keeps all classes'):
        open_data(config, [], all_classes=True)
    with pytest.raises(ZooError, match='batch_sizes'):
        open_data(config, ['--data.batch_sizes=4'], all_classes=False)


@pytest.mark.parametrize(
    ('argv', 'word'),
    [
        ([], 'either a MODEL or --fit'),
        (['test_vit', '--fit', 'quickstart'], 'either a MODEL or --fit'),
        (['test_vit'], 'needs --config'),
        (['test_vit', '--model.net', 'a'], 'without --fit'),
        (['test_vit', '--steps', '0'], 'positive'),
        (['test_vit', '--config', 'no-such-config'], 'no config'),
        (['no.ckpt'], 'no such checkpoint'),
    ],
)
def test_mistakes_are_named(argv, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZooError, match=word):
        cli_probe(argv)
    assert not list(tmp_path.iterdir())
