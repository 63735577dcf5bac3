"""The command that continues a run, and who speaks for all ranks."""

import pytest

from training_reftr.launch import is_main_rank, resume_command, without_resume


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["a.yaml", "--resume", "auto", "--seed", "1"], ["a.yaml", "--seed", "1"]),
        (["--resume=auto", "a.yaml"], ["a.yaml"]),
        (["a.yaml", "--resume", "--seed", "1"], ["a.yaml", "--seed", "1"]),
        (["a.yaml", "--resume"], ["a.yaml"]),
        (["a.yaml", "--resume", "one", "--resume", "two", "b.yaml"], ["a.yaml", "b.yaml"]),
        (["--resume_what", "x"], ["--resume_what", "x"]),
    ],
)
def test_a_run_that_resumes_is_continued_by_its_newest_checkpoint(words, kept):
    assert without_resume(words) == kept
    assert resume_command(words).endswith(" ".join(["train_reftr.py", *kept, "--resume auto"]))


def test_rank_0_of_all_machines_speaks_for_all(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_rank()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    assert not is_main_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "0")
    assert is_main_rank()
