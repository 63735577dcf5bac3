"""Parts of `train_reftr.py`. Each module names its collectives, functions that all processes must call together."""
