"""What `train_reftr.py` is made of. Each module says which of its functions all processes must call together."""
