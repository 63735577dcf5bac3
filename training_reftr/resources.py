"""Find the folders that an installed copy carries as package data. Nothing here is a collective."""

from pathlib import Path


PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """
    Return the folder of the recipes ("recipes") or of the Space ("demo").

    An installed copy has it inside this package, a checkout next to it.

    Raises:
        OSError: if neither is there.
    """
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise OSError(f"{str(PACKAGE / name)!r} is missing: the installation is incomplete, install the package again.")
