"""Command-line tools: what `zoo list`, `info`, `configs`, `doctor`, `validate`, `export` and `bench` run."""
