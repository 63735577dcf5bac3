"""The commands of `reftr`. Each module parses its arguments first and imports torch only to run."""
