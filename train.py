"""`python train.py fit --config configs/quickstart.yaml`: the same as `zoo fit ...`, without installing a command."""

from zoo.cli import main

if __name__ == '__main__':
    raise SystemExit(main())
