"""The files of a run's folder. Every name inside an output folder is here and nowhere else."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """
    The folder of a run: its best model, checkpoints, log and report.

    ```
    config.json, model.safetensors, ...  the best model so far, with its processor and code
    README.md                            model card
    recipe.yaml                          settings of the run, see `training_reftr.recipes`
    origin.json                          what a model was converted from, instead of a recipe
    metrics.jsonl                        log: a line of metrics per record, see `training_reftr.tracking`
    metrics.json                         metrics by split; written last, so that the report is complete if it exists
    report.md                            tables of metrics, next to published ones where they are comparable
    predictions.jsonl                    a line per phrase
    predictions.png                      images of the first split with their predictions
    presence.png                         diagrams of the scores of the first split, from a model that predicts presence
    example.png                          an image of the first split, for the card's example
    visualizations/<split>/*.png         phrases drawn one by one
    checkpoints/step_<step>/             see `training_reftr.checkpoints`
    .lock                                held while a run writes here, see `training_reftr.lock`
    ```

    Args:
        path (`Path`): the folder.
    """

    path: Path

    # patterns of files that are pushed to the Hub: no checkpoints, and no files of the user's
    PUSHED = (
        "README.md",
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "processor_config.json",
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "*_reftr.py",
        "recipe.yaml",
        "origin.json",
        "metrics.json",
        "metrics.jsonl",
        "report.md",
        "predictions.jsonl",
        "predictions.png",
        "presence.png",
        "example.png",
        "visualizations/*/*",
        ".eval_results/*.yaml",
    )
    # patterns of files without which the model cannot be loaded
    REQUIRED = (
        "README.md",
        "config.json",
        "model*.safetensors",
        "processor_config.json",
        "tokenizer*",
        "modeling_reftr.py",
    )

    @property
    def weights(self) -> Path:
        """The weights of the best model."""
        return self.path / "model.safetensors"

    @property
    def config(self) -> Path:
        """The configuration of the best model."""
        return self.path / "config.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def recipe(self) -> Path:
        """The settings of the run."""
        return self.path / "recipe.yaml"

    @property
    def origin(self) -> Path:
        """What the model was converted from."""
        return self.path / "origin.json"

    @property
    def log(self) -> Path:
        """The metrics of the run, a line per record."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The metrics of the report."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.md"

    @property
    def predictions(self) -> Path:
        """The predictions of the report, a line per phrase."""
        return self.path / "predictions.jsonl"

    @property
    def drawn_predictions(self) -> Path:
        """Images with predictions."""
        return self.path / "predictions.png"

    @property
    def drawn_presence(self) -> Path:
        """Diagrams of the scores."""
        return self.path / "presence.png"

    @property
    def example(self) -> Path:
        """The image of the card's example."""
        return self.path / "example.png"

    @property
    def answer(self) -> Path:
        """Where the command that the report suggests draws its answer."""
        return self.path / "answer.png"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """The file that a run locks."""
        return self.path / ".lock"

    def checkpoint(self, step: int) -> Path:
        """Return the checkpoint of an optimizer step."""
        return self.checkpoints / f"step_{step:08d}"

    def visualizations(self, split: str) -> Path:
        """Return the folder of a split's phrases, drawn one by one."""
        return self.path / "visualizations" / split

    def remove_report(self) -> None:
        """Delete a report that is, or will be, about another model than the folder's."""
        drawings = self.drawn_predictions, self.drawn_presence, self.example
        for file in (self.metrics, self.predictions, *drawings, self.report):
            file.unlink(missing_ok=True)
