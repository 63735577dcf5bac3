"""Rows of the sets that a run names."""

import data_scripts


def load_rows(args):
    """Split -> rows."""
    config = dict(args.dataset_config)
    return data_scripts.load(args.dataset, data_dir=args.data_dir, cache_dir=args.data_cache_dir, **config)


def split_of(rows, name):
    """A split by name."""
    return rows[name]
