"""The run's model on the Hub. Nothing here is a collective; the main process alone speaks to the Hub."""

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
        folder (`str` or `Path`): with the model and its processor; `RunFolder.PUSHED` are uploaded.
        repository (`str`): "user/name"; made where it is not there.
        private (`bool`, *optional*): whether a new repository is private.
        message (`str`, *optional*): of the commit.
        card (`dict[str, bytes]`, *optional*): the card's files, see `training_reftr.card.card_files`. They are part of
            the commit, and written into the folder once it is made. Absent: the card in the folder.

    Returns:
        `str`: the commit's id, for `from_pretrained(..., revision=...)`.

    Raises:
        OSError: if the folder lacks something, or the Hub does not take it; the folder stays as it was, and so does
            what the Hub had before.
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
    Pushes `output_dir` to `push_to_hub`: the best model so far, in parallel to the training, which neither waits for
    the Hub nor ends with it, and the last word at the end. Does nothing where the setting is absent.

    Raises:
        OSError: at once, if the Hub does not let us have the repository, and not after hours.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator) -> None:
        self.settings = settings
        self.is_active = bool(settings.hub.push_to_hub) and accelerator.is_main_process
        self.thread = None
        if self.is_active:
            try:
                make_repository(settings.hub.push_to_hub, "model", settings.hub.hub_private or None)
            except Exception as error:  # the network, the server and the token each have exceptions of their own
                raise OSError(
                    f"push_to_hub={settings.hub.push_to_hub!r} cannot be pushed to, so the run did not start: "
                    f"{reason_of(error)}"
                ) from error

    def push_best(self, step: int) -> None:
        """Push a copy of the folder as it is now; where the last one is still on its way, the next best will do."""
        if not self.is_active:
            return
        if self.thread is not None and self.thread.is_alive():
            logger.warning(f"The best model of step {step} is not pushed: the one before it is still on its way.")
            return
        folder = Path(self.settings.checkpoints.output_dir)
        copy = Path(tempfile.mkdtemp(prefix="push_"))
        for name in select_files(folder, RunFolder.PUSHED):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, copy / name)
        # a daemon: what is cut off at the end of the process was no commit yet
        self.thread = threading.Thread(target=self._push, args=(copy, f"Best model, step {step}"), daemon=True)
        self.thread.start()

    def _push(self, copy: Path, message: str) -> None:
        try:
            repository = self.settings.hub.push_to_hub
            revision = push_model(copy, repository, message=message, card=card_files(copy, repository))
            logger.info(f"{message}: pushed to {self.settings.hub.push_to_hub!r} as {revision}.")
        except (OSError, ValueError) as error:
            logger.warning(f"{message}: {error} The training goes on.")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def finish(self) -> str | None:
        """
        Push the folder as it is at the end, with a card that names the repository.

        Returns:
            `str`: the commit's id, or None where nothing is to be pushed.

        Raises:
            OSError: if it could not be pushed; all of it is in the folder.
        """
        if not self.is_active:
            return None
        if self.thread is not None:
            self.thread.join()
        folder, repository = self.settings.checkpoints.output_dir, self.settings.hub.push_to_hub
        return push_model(folder, repository, card=card_files(folder, repository))
