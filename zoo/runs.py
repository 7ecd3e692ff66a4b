"""The verbs fit, validate, test and predict: LightningCLI, a folder for each run, and what to say at the end."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import zoo
from zoo.checkpoints import BEST, LAST, AtomicCheckpointIO, KeepLast, read_checkpoint, resolve_last
from zoo.data.images import ImageList
from zoo.data.transforms import View
from zoo.errors import ZooError
from zoo.report import PredictionWriter, plot_curves
from zoo.tasks.progress import EpochLine, LearningRate, MetricsCSV, Throughput

CHECKPOINTS, CONFIG = 'checkpoints', 'config.yaml'
_IMAGE_TASKS = ('Classify', 'Detect', 'Segment')  # what a lone checkpoint can name as `zoo.task`
_NOISE = (
    '.*does not have many workers.*',
    '.*in eval mode at the start of training.*',
    '.*Checkpoint directory .* exists and is not empty.*',
    '.*dataloader is not resumable.*',  # ours resumes through the data module, which that check does not know
    '.*number of training batches .* is smaller than the logging interval.*',
    '.*isinstance.treespec, LeafSpec.*',
    '.*Trying to infer the `batch_size`.*',
    '.*Experiment logs directory.*',
    '.*could not find the monitored key in the returned metrics.*',  # a run that ends before it validates
    '.*sync_dist=True.*',  # metrics are gathered by torchmetrics; the training loss is the first rank's
    '.*IterableDataset. has .__len__. defined.*',
    '.*callbacks used to create the checkpoint need to be provided.*',
)


_UNHELPFUL = re.compile(
    r"\s*(Does not validate against any of the Union|Subtypes: |Errors:|Given value|- Expected a <class 'NoneType'>)"
)


@dataclass
class Run:
    """The run's folder and its habits.

    Args:
        name: Folder in root; by default the name of the config file. A new run never reuses a folder: it gets NAME-2.
        root: Where run folders are.
        save_every_n_steps: Write last.ckpt this often within an epoch, besides at its end.
        save_every_minutes: Write last.ckpt after this much time too.
        monitor: What best.ckpt is the best in.
        mode: Whether more or less of it is better.
        test_after_fit: Whether fit tests the best checkpoint at its end.
        threads: CPU threads of torch; null leaves the choice to torch.
    """

    name: str | None = None
    root: str = 'runs'
    save_every_n_steps: int | None = None
    save_every_minutes: float | None = 10.0
    monitor: str = 'val/top1'
    mode: Literal['max', 'min'] = 'max'
    test_after_fit: bool = True
    threads: int | None = None


def run(verb: str, argv: list[str]) -> int:
    """Runs one verb with LightningCLI.

    Args:
        verb: fit, validate, test or predict.
        argv: Its arguments.

    Returns:
        Exit code.
    """
    for logger in ('lightning.pytorch', 'lightning.fabric'):
        logging.getLogger(logger).setLevel(logging.WARNING)
    former_argv, former_format = sys.argv, warnings.formatwarning
    # Lightning starts further processes with sys.argv, so the resolved arguments belong there
    sys.argv = [former_argv[0], verb, *resolve_arguments(verb, argv)]
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings('ignore', message=pattern)
            warnings.formatwarning = lambda message, *_, **__: f'warning: {message}\n'  # no line of source code
            ZooCLI()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except Exception as error:
        if (known := user_error(error)) is None:
            raise
        raise known from error
    finally:
        sys.argv, warnings.formatwarning = former_argv, former_format
    return 0


def user_error(error: BaseException | None) -> ZooError | None:
    """The ZooError behind an exception: jsonargparse wraps what constructors raise."""
    if isinstance(error, MisconfigurationException):
        return ZooError(str(error))
    while error is not None and not isinstance(error, ZooError):
        error = error.__cause__ or error.__context__
    return error


# configs and run folders


def resolve_config(name: str) -> Path:
    """A YAML file from its path, or from the name of a packaged config such as quickstart."""
    if Path(name).is_file():
        return Path(name)
    roots = [folder for folder in (Path(base) / 'configs' for base in zoo.__path__) if folder.is_dir()]
    wanted = re.sub(r'^(\./)?configs/', '', name).removesuffix('.yaml')
    packaged = {str(p.relative_to(root).with_suffix('')): p for root in roots for p in sorted(root.rglob('*.yaml'))}
    found = [packaged[wanted]] if wanted in packaged else [p for k, p in packaged.items() if Path(k).name == wanted]
    if found:
        return found[0]
    close = difflib.get_close_matches(wanted, {*packaged, *(Path(k).name for k in packaged)}, n=4, cutoff=0.4)
    raise ZooError(f'no config {name!r}' + (f'; close: {", ".join(close)}' if close else '; see: zoo configs'))


def resolve_arguments(verb: str, argv: list[str]) -> list[str]:
    """Replaces config names by paths; without a config, takes the one that was saved with the checkpoint."""
    resolved: list[str] = []
    checkpoint, has_config, expect = None, False, None
    argv = spell_null(argv)
    for argument in argv:
        key, eq, value = argument.partition('=')
        if expect == 'config' or (key in ('--config', '-c') and eq):
            argument = ('--config=' if eq else '') + str(resolve_config(value if eq else argument))
        if expect == 'ckpt' or (key == '--ckpt_path' and eq):
            checkpoint = value if eq else argument
        has_config |= key in ('--config', '-c')
        expect = {'--config': 'config', '-c': 'config', '--ckpt_path': 'ckpt'}.get(argument)
        resolved.append(argument)
    if not has_config and checkpoint and checkpoint.endswith('.ckpt'):
        return ['--config', str(config_of(Path(checkpoint))), *resolved]
    if not has_config and not {'-h', '--help'} & set(argv) and not any(a.startswith('--model') for a in argv):
        example = '--config quickstart' if verb == 'fit' else f'--ckpt_path runs/NAME/{CHECKPOINTS}/{BEST}'
        raise ZooError(f'{verb} needs to know what to run: {example}')
    return resolved


def spell_null(argv: list[str]) -> list[str]:
    """Rewrites --model.optim.eps=null as --model.optim={"eps": null}: jsonargparse reads the former as 'None'."""
    joined: list[str] = []
    for argument in argv:
        if argument == 'null' and joined and joined[-1].startswith('--') and '=' not in joined[-1]:
            joined[-1] += '=null'
        else:
            joined.append(argument)
    nested = re.compile(r'--((?:model|data)(?:\.init_args)?\.(?!init_args)\w+)\.(\w+)=null')
    return [f'--{m[1]}={{"{m[2]}": null}}' if (m := nested.fullmatch(argument)) else argument for argument in joined]


def config_of(checkpoint: Path) -> Path:
    """The config saved with a checkpoint's run; for a lone checkpoint, one made from its hyper-parameters."""
    folder = run_folder_of(checkpoint)
    if folder is not None:
        return folder / CONFIG
    # the classes are fixed here: a checkpoint may say how large a network is, not which code to run
    saved = read_checkpoint(checkpoint, mmap=True)
    hparams, task = saved.get('hyper_parameters') or {}, (saved.get('zoo') or {}).get('task')
    if 'num_classes' not in hparams:
        raise ZooError(f'{checkpoint} does not say which network it holds; give the config of its run with --config')
    made = Path(tempfile.mkdtemp(prefix='zoo-')) / f'{checkpoint.stem}.yaml'
    task = task if task in _IMAGE_TASKS else 'Classify'
    made.write_text(yaml.safe_dump({'model': {'class_path': f'zoo.tasks.{task}', 'init_args': _plain(hparams)}}))
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def run_folder_of(checkpoint: Path) -> Path | None:
    """RUN of RUN/checkpoints/FILE.ckpt, if that is what it is."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file() else None


def newest_run(root: str, name: str) -> Path | None:
    """The newest of NAME, NAME-2, ... that holds a checkpoint."""
    pattern = re.compile(re.escape(name) + r'(-\d+)?')
    runs = [
        p for p in Path(root).glob(f'{name}*') if pattern.fullmatch(p.name) and any(p.glob(f'{CHECKPOINTS}/*.ckpt'))
    ]
    return max(runs, key=lambda p: max(c.stat().st_mtime_ns for c in p.glob(f'{CHECKPOINTS}/*.ckpt')), default=None)


def fresh_run(root: str, name: str) -> Path:
    """The first of NAME, NAME-2, ... that is not taken."""
    number, folder = 1, Path(root) / name
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(root) / f'{name}-{number}'
    return folder


# LightningCLI


class ZooParser(LightningArgumentParser):
    """Lightning's parser with one-screen errors."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            return super().error(message, ex)
        # what is left out says that null would have been valid too, and repeats the value as Python objects
        lines = [line[:300].rstrip() for line in message.splitlines() if line.strip()]
        raise ZooError('\n'.join(line for line in lines if not _UNHELPFUL.match(line)))


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config in the run folder: a file that starts the same run again.

    It waits for training to begin: a config that a checkpoint of the run refuses leaves the run's own in place.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, 'fit')

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.ckpt_path = None
        self.parser.save(config, folder / CONFIG, skip_none=False, overwrite=True, multifile=False)


class ZooCLI(LightningCLI):
    """fit, validate, test and predict over run folders."""

    def __init__(self) -> None:
        super().__init__(
            LightningModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={'save_to_log_dir': False},
            seed_everything_default=0,
            trainer_defaults={'use_distributed_sampler': False, 'enable_model_summary': False},
            parser_class=ZooParser,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # weights_only is not an option: every verb loads with weights_only=True
        evaluate = {'model', 'dataloaders', 'datamodule', 'weights_only', 'verbose'}
        return {
            'fit': {'model', 'train_dataloaders', 'val_dataloaders', 'datamodule', 'weights_only'},
            'validate': evaluate,
            'test': evaluate,
            'predict': {*evaluate, 'return_predictions'},
        }

    def _parse_ckpt_path(self) -> None:
        """Lightning parses a checkpoint's hyper-parameters over the command line here; ours never wins over it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Run, 'run')

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != 'fit':
            parser.add_argument('--output', type=str | None, help='Folder for what is written.', default=None)
        if subcommand == 'predict':
            parser.add_argument('--images', type=str, nargs='+', help='Image files and folders.', default=[])
            parser.add_argument('--batch_size', type=int, help='Images per step.', default=32)
        return parser

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run.name is None:
            files = config.get('config') or []
            config.run.name = Path(str(files[-1])).stem if files else 'run'
            if config.run.name == Path(CONFIG).stem and files:
                config.run.name = Path(str(files[-1])).absolute().parent.name
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.run_dir, self.checkpoint = self._find_run(config)
        config.ckpt_path = str(self.checkpoint) if self.checkpoint else None
        config.trainer.default_root_dir = str(self.run_dir)

    def _find_run(self, config: Any) -> tuple[Path, Path | None]:
        wanted, fitting = config.get('ckpt_path'), self.subcommand == 'fit'
        if wanted in ('last', 'best'):
            folder = newest_run(config.run.root, config.run.name)
            if folder is None and fitting:
                say(f'no checkpoint of {config.run.name} in {config.run.root}/ yet: starting from scratch')
                return fresh_run(config.run.root, config.run.name), None
            if folder is None:
                raise ZooError(f'no run of {config.run.name} with a checkpoint in {config.run.root}/')
            best = folder / CHECKPOINTS / BEST
            found = best if wanted == 'best' and best.is_file() else resolve_last(folder / CHECKPOINTS)
            return folder, found
        if wanted:
            checkpoint = Path(wanted)
            if not checkpoint.is_file():
                raise ZooError(f'no such checkpoint: {checkpoint} (last and best stand for those of the newest run)')
            folder = run_folder_of(checkpoint)
            if folder is not None:
                return Path(os.path.relpath(folder)), checkpoint
            return (fresh_run(config.run.root, config.run.name) if fitting else Path(checkpoint.parent)), checkpoint
        return fresh_run(config.run.root, config.run.name), None

    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        init = config.model.get('init_args') if config.get('model') else None
        # the checkpoint brings the weights
        parts = [part for part in (init, init and init.get('image')) if part] if self.checkpoint else []
        unneeded = [(part, k, part[k]) for part in parts for k in ('pretrained', 'published') if part.get(k)]
        for part, key, _ in unneeded:
            part[key] = False if key == 'pretrained' else None
        if self.subcommand == 'predict':
            config.data = None
        super().instantiate_classes()
        for part, key, value in unneeded:
            part[key] = value
        if self.subcommand != 'fit' and hasattr(self.model, 'fit_alone'):  # before Lightning misses its hooks
            raise ZooError(self.model.fit_alone)
        if self.subcommand in ('fit', 'validate', 'test') and self.datamodule is None:
            raise ZooError('no data: give a config with a data section, or --data zoo.data.ImageFolder --data.path ...')

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, 'trainer')
        options: Run = self._get(self.config_init, 'run')
        folder = self.run_dir / CHECKPOINTS
        plugins = config.get('plugins') or []
        kwargs['plugins'] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        callbacks = list(config.get('callbacks') or [])
        if self.subcommand == 'fit':
            callbacks += [EpochLine(), LearningRate(), Throughput()]
            if not config.get('fast_dev_run') and config.get('enable_checkpointing') is not False:
                callbacks += [
                    ModelCheckpoint(
                        str(folder),
                        filename=BEST.removesuffix('.ckpt'),
                        monitor=options.monitor,
                        mode=options.mode,
                        enable_version_counter=False,
                    ),
                    KeepLast(str(folder), options.save_every_n_steps, options.save_every_minutes),
                ]
            if config.get('logger') in (None, True) and not config.get('fast_dev_run'):
                step = read_checkpoint(self.checkpoint, mmap=True)['global_step'] if self.checkpoint else None
                board = TensorBoardLogger(str(self.run_dir), name='tensorboard', version='')
                kwargs['logger'] = [MetricsCSV(self.run_dir, step), board]
        else:
            kwargs['logger'] = False
            kwargs['enable_checkpointing'] = False
        if self.subcommand == 'predict':  # one process writes one table: others would overwrite it with their shares
            kwargs.update(devices=one_device(config.get('devices')), num_nodes=1, strategy='auto')
        if self.subcommand != 'predict' and hasattr(self.model, 'report_callback'):
            callbacks.append(self._report_callback())
        if config.get('enable_progress_bar') is None:
            kwargs['enable_progress_bar'] = sys.stdout.isatty()
        if kwargs.get('enable_progress_bar', config.get('enable_progress_bar')):
            callbacks.append(RichProgressBar())
        kwargs['callbacks'] = callbacks
        kwargs['enable_autolog_hparams'] = False
        return super().instantiate_trainer(**kwargs)

    def _report_callback(self) -> Callback:
        if self.subcommand == 'fit':
            return self.model.report_callback(self.run_dir / 'report', self.run_dir / 'samples')
        return self.model.report_callback(self._test_folder(), None)

    # verbs

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        say(describe_run(model, self.run_dir, self.checkpoint))
        # with max_steps Lightning resumes a checkpoint from the end of an epoch as if that epoch were still running,
        # and miscounts epochs from there on; the rule that it uses without max_steps is right in both cases
        self.trainer.fit_loop._iteration_based_training = lambda: False
        try:
            self.trainer.fit(model, weights_only=True, **kwargs)
        except SIGTERMException:
            say(f'SIGTERM: saved {self.run_dir / CHECKPOINTS / LAST}\nresume with: {self._resume_command()}')
            raise SystemExit(143) from None
        except SystemExit:
            if (self.run_dir / CHECKPOINTS / LAST).is_file():
                say(f'interrupted; resume with: {self._resume_command()}')
            raise SystemExit(130) from None
        if not self.trainer.fast_dev_run:
            self._conclude(model)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        self.trainer.test(model, weights_only=True, verbose=False, **kwargs)
        self._say_left_out()
        say(model.headline('test', self.trainer.callback_metrics))
        say(f'report: {self._test_folder()}/')

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        self.trainer.validate(model, weights_only=True, verbose=False, **kwargs)
        self._say_left_out()
        say(model.headline('val', self.trainer.callback_metrics))

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        if hasattr(model, 'export'):
            raise ZooError(f'{type(model).__name__} has no predict: its models are folders that transformers loads')
        images = self._get(self.config_init, 'images')
        if not images:
            raise ZooError('predict needs --images FILE_OR_FOLDER ...')
        if self.checkpoint is None:
            raise ZooError(f'predict needs --ckpt_path FILE, such as runs/NAME/{CHECKPOINTS}/{BEST}, or best')
        about = read_checkpoint(self.checkpoint, mmap=True).get('zoo') or {}
        if not about.get('view'):
            raise ZooError(f'{self.checkpoint} does not say how images were prepared: not written by zoo fit')
        output = self._get(self.config_init, 'output')
        folder = Path(output) if output else self.run_dir / 'predictions'
        # a task with pictures or boxes for answers brings its own writer and its own way to load images
        batch_size = self._get(self.config_init, 'batch_size')
        if hasattr(model, 'prediction'):
            data, writer = model.prediction(images, about, folder, batch_size)
        else:
            # classes that are texts may be others than those of the training
            writer = PredictionWriter(folder, getattr(model, 'classes', None) or about['class_names'])
            data = ImageList(images, View(**about['view']), about['class_names'], batch_size)
        self.trainer.callbacks.append(writer)
        kwargs['datamodule'] = data
        self.trainer.predict(model, weights_only=True, return_predictions=False, **kwargs)
        unreadable = f', {writer.unreadable} unreadable ({writer.names_them})' if writer.unreadable else ''
        say(f'{writer.count} images{unreadable}: {", ".join(f"{folder}/{file}" for file in writer.files)}')

    def _say_left_out(self) -> None:
        """Says how many samples could not be used."""
        data = self.datamodule
        if getattr(data, 'skipped', 0):
            say(f'{data.skipped} unreadable {data.noun}s were skipped')
        if getattr(data, 'dropped', 0):
            say(f'{data.dropped} {data.noun}s were longer than data.max_length {data.max_length} and left out')

    def _conclude(self, model: LightningModule) -> None:
        """Ends a fit: curves, a test of the best checkpoint, what the model exports, and what was written where.

        A module that ends in its own way has `conclude(test) -> lines to print`. Otherwise `accuracy_curves`,
        `headline` and `report_callback` say how its results are shown, `prediction` how predict reads and writes, and
        `export(folder) -> lines` writes more than checkpoints.
        """
        if hasattr(model, 'conclude'):
            lines = model.conclude(self._get(self.config_init, 'run').test_after_fit)
            self._say_left_out()
            files = f'{CHECKPOINTS}/{LAST}, {CONFIG}, metrics.csv, tensorboard/'
            say('\n'.join([*lines, f'run:     {self.run_dir}/  ({files})']))
            return
        folder, line = self.run_dir / CHECKPOINTS, None
        if (self.run_dir / 'metrics.csv').is_file() and self.trainer.is_global_zero:
            (self.run_dir / 'report').mkdir(exist_ok=True)
            plot_curves(self.run_dir / 'metrics.csv', self.run_dir / 'report' / 'curves.png', *model.accuracy_curves)
        best = folder / BEST if (folder / BEST).is_file() else folder / LAST
        if self._get(self.config_init, 'run').test_after_fit:
            path = str(best) if best.is_file() else None
            self.trainer.test(model, datamodule=self.datamodule, ckpt_path=path, weights_only=True, verbose=False)
            line = model.headline('test', self.trainer.callback_metrics)
        elif best.is_file() and hasattr(model, 'export'):
            model.load_state_dict(read_checkpoint(best)['state_dict'])
        exported = model.export(self.run_dir) if hasattr(model, 'export') else []
        self._say_left_out()
        if line:
            say(line)
        files = f'{CHECKPOINTS}/{BEST}, {CHECKPOINTS}/{LAST}, {CONFIG}, metrics.csv, tensorboard/'
        say(f'run:     {self.run_dir}/  ({files})')
        if line:
            say(f'report:  {self.run_dir}/report/  ({self._report_callback().files})')
        if exported:
            say('\n'.join(exported))
        else:
            images = f'{self.run_dir}/samples' if line else 'FILE_OR_FOLDER'
            say(f'predict: {command("predict")} --ckpt_path {shlex.quote(str(best))} --images {shlex.quote(images)}')

    def _resume_command(self) -> str:
        return f'{command("fit")} --ckpt_path {shlex.quote(str(self.run_dir / CHECKPOINTS / LAST))}'

    def _test_folder(self) -> Path:
        return Path(self._get(self.config_init, 'output') or self.run_dir / 'report')


def one_device(devices: Any) -> Any:
    """The first of the devices that a trainer is given: of those named, or any."""
    if isinstance(devices, str) and ',' in devices:
        devices = [int(d) for d in devices.split(',') if d.strip()]
    return [devices[0]] if isinstance(devices, (list, tuple)) and devices else 1


# words


@rank_zero_only
def say(text: str) -> None:
    print(text, flush=True)


def command(verb: str) -> str:
    from zoo.cli import program

    return f'{program()} {verb}'


def describe_run(model: LightningModule, folder: Path, checkpoint: Path | None) -> str:
    """What is about to be trained, in a line or two."""
    count = sum(p.numel() for p in (getattr(model, 'net', None) or model).parameters())
    size = f' ({count / 1e6:.2f} M parameters)' if count else ''  # some are built when their data is known
    lines = [f'training {getattr(model, "net_name", type(model).__name__)}{size} in {folder}/']
    if checkpoint:
        lines.append(f'resuming from {checkpoint}')
    return '\n'.join(lines)
