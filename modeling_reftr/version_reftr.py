"""The version of this code, which a saved model's configuration keeps as `reftr_version`."""

VERSION = "0.1.0"
