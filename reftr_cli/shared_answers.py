"""
Answer many questions on several processes, in a folder that the same command continues later:

    answers_00000_of_00002.jsonl  of each process: a line per question, with its number
    questions.json                which questions these are, and of which model
    answers.jsonl                 all lines in the order of the questions, as soon as every question has one

Process r of n takes the questions r, r + n, r + 2n and so on, without those that were answered before. Lines are
written one by one, so a killed process loses the question at hand, and other numbers of processes may continue. The
processes do not wait for each other: the one that ends last merges the files.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_scripts.atomic_files import atomic_file, write_file
from data_scripts.quoting import quote


MERGED, QUESTIONS, NUMBER = "answers.jsonl", "questions.json", "number"


class Line(NamedTuple):
    """Where the answers to a question are: a file, its bytes from `start` to `end`, and whether it is an error."""

    file: Path
    start: int
    end: int
    is_error: bool


def process_of_launcher() -> tuple[int, int]:
    """Return the number of this process, and of how many, as launchers set them in the environment; (0, 1) if none."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


class SharedAnswers:
    """
    The answers of several processes to the same questions.

    Args:
        folder (`Path`): is made if it is missing.
        questions (`str`): identifies questions and model, so that a folder is continued with the same ones only.
        count (`int`): the number of questions.

    Raises:
        ValueError: if the folder has answers to other questions.
    """

    def __init__(self, folder: Path, questions: str, count: int) -> None:
        self.folder, self.count = folder, count
        self.rank, self.num_processes = process_of_launcher()
        self.file = folder / f"answers_{self.rank:05d}_of_{self.num_processes:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        described = {"count": count, "sha256": hashlib.sha256(questions.encode("utf-8", "surrogatepass")).hexdigest()}
        known = folder / QUESTIONS
        if not known.exists():
            write_file(known, json.dumps(described))
        elif json.loads(known.read_text()) != described:
            raise ValueError(
                f"--answers {str(folder)!r} has answers to other questions or of another model: use another folder."
            )
        if self.file.exists():  # a killed process may have left a part of a line
            content = self.file.read_bytes()
            os.truncate(self.file, content.rfind(b"\n") + 1)

    def open_questions(self) -> list[int]:
        """Return the numbers of the questions that this process has to answer; those that failed are asked again."""
        done = {number for number, line in self.lines().items() if not line.is_error}
        return [number for number in range(self.rank, self.count, self.num_processes) if number not in done]

    def add(self, number: int, line: dict) -> None:
        """Write the line of a question."""
        with self.file.open("ab") as file:
            file.write(json.dumps({NUMBER: number, **line}).encode() + b"\n")

    def lines(self) -> dict[int, Line]:
        """
        Return the last line of each question in the files of all processes, one with answers if there is any.

        Raises:
            ValueError: if a file has something else, naming the line.
        """
        found = {}
        for file in sorted(self.folder.glob("answers_*_of_*.jsonl")):
            for position, start, content in complete_lines(file):
                try:
                    line = json.loads(content)
                    number, is_error = line[NUMBER], "error" in line
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{str(file)!r}, line {position} is {quote(content[:80])}; expected an answer with a number. "
                        "Remove the file, and its questions are asked again."
                    ) from error
                if not is_error or number not in found or found[number].is_error:
                    found[number] = Line(file, start, start + len(content), is_error)
        return found

    def merge(self) -> tuple[int, int]:
        """
        Write all lines into one file, in the order of the questions, if every question has one.

        Returns:
            `tuple`: the number of questions that are open, in which case nothing is written, and of those that failed.
        """
        lines = self.lines()
        num_open = self.count - len(lines)
        if not num_open:
            files = {file: file.open("rb") for file in {line.file for line in lines.values()}}
            try:
                with atomic_file(self.folder / MERGED) as temporary, temporary.open("wb") as merged:
                    for _, line in sorted(lines.items()):
                        files[line.file].seek(line.start)
                        content = json.loads(files[line.file].read(line.end - line.start))
                        del content[NUMBER]
                        merged.write(json.dumps(content).encode() + b"\n")
            finally:
                for file in files.values():
                    file.close()
        return num_open, sum(line.is_error for line in lines.values())


def complete_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, offset, content) of each line of a file without its last one if it has no end."""
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                yield number, start, line
            start += len(line)
