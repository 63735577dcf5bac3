"""Parts of `train_reftr.py`. Each module says which of its functions are collectives, which all processes must call."""
