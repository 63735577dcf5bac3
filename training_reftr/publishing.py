"""Push a run's model to the Hub. Nothing here is a collective; only the main process connects to the Hub."""

import logging
import shutil
import tempfile
import threading
from pathlib import Path

from accelerate import Accelerator

from training_reftr.card import card_files
from training_reftr.hub import make_repository, reason_of, select_files, upload, write_contents
from training_reftr.run_folder import RunFolder
from training_reftr.settings import TrainingSettings


logger = logging.getLogger(__name__)


def push_model(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    message: str = "Upload model",
    card: dict[str, bytes] | None = None,
) -> str:
    """
    Push a saved model.

    Args:
        folder (`str` or `Path`): folder of the model and its processor; `RunFolder.PUSHED` are uploaded.
        repository (`str`): "user/name"; created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private.
        message (`str`, *optional*): of the commit.
        card (`dict[str, bytes]`, *optional*): the card's files, see `training_reftr.card.card_files`. They are part of
            the commit, and written into the folder afterwards. Absent: the card in the folder.

    Returns:
        `str`: the commit's id, for `from_pretrained(..., revision=...)`.

    Raises:
        OSError: if the folder is incomplete, or the Hub rejects it; neither the folder nor the repository changes.
    """
    card = card or {}
    files = {*select_files(Path(folder), RunFolder.PUSHED), *card}
    missing = [pattern for pattern in RunFolder.REQUIRED if not any(Path(name).match(pattern) for name in files)]
    if missing:
        raise OSError(
            f"{str(folder)!r} is not a complete RefTR folder and was not pushed: it lacks {', '.join(missing)}."
        )
    revision = upload(folder, repository, "model", private, RunFolder.PUSHED, message, card).oid
    write_contents(folder, card)
    return revision


class Publisher:
    """
    Push `output_dir` to `push_to_hub`: the best model so far in a background thread, and the final model at the end.
    Training neither waits for the Hub nor fails with it. Do nothing if the setting is absent.

    Raises:
        OSError: before training, if the repository cannot be created or written.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator) -> None:
        self.settings = settings
        self.is_active = bool(settings.hub.push_to_hub) and accelerator.is_main_process
        self.thread = None
        if self.is_active:
            try:
                make_repository(settings.hub.push_to_hub, "model", settings.hub.hub_private or None)
            except Exception as error:  # the network, the server and the token raise different exceptions
                raise OSError(
                    f"push_to_hub={settings.hub.push_to_hub!r} cannot be pushed to, so the run did not start: "
                    f"{reason_of(error)}"
                ) from error

    def push_best(self, step: int) -> None:
        """Push a copy of the folder as it is now, unless the previous push is still running."""
        if not self.is_active:
            return
        if self.thread is not None and self.thread.is_alive():
            logger.warning(f"The best model of step {step} is not pushed: the previous push is still running.")
            return
        folder = Path(self.settings.checkpoints.output_dir)
        copy = Path(tempfile.mkdtemp(prefix="push_"))
        for name in select_files(folder, RunFolder.PUSHED):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, copy / name)
        # a daemon: a push that the end of the process interrupts has not committed anything
        self.thread = threading.Thread(target=self._push, args=(copy, f"Best model, step {step}"), daemon=True)
        self.thread.start()

    def _push(self, copy: Path, message: str) -> None:
        try:
            repository = self.settings.hub.push_to_hub
            revision = push_model(copy, repository, message=message, card=card_files(copy, repository))
            logger.info(f"{message}: pushed to {self.settings.hub.push_to_hub!r} as {revision}.")
        except (OSError, ValueError) as error:
            logger.warning(f"{message}: {error} Training continues.")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def finish(self) -> str | None:
        """
        Push the folder as it is at the end, with a card that names the repository.

        Returns:
            `str`: the commit's id, or None without `push_to_hub`.

        Raises:
            OSError: if it could not be pushed; the folder is complete.
        """
        if not self.is_active:
            return None
        if self.thread is not None:
            self.thread.join()
        folder, repository = self.settings.checkpoints.output_dir, self.settings.hub.push_to_hub
        return push_model(folder, repository, card=card_files(folder, repository))
