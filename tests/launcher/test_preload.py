"""What a snapshot imports for a job."""

from __future__ import annotations

from pathlib import Path

from launcher.preload import imports_of


def test_the_modules_that_a_job_names(tmp_path: Path) -> None:
    """Those of its functions as well; not relative ones, and not what lies beside it."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, torch.nn\nfrom sklearn.datasets import load_digits\nfrom . import near\n"
        "import beside\nimport folder.part\n\ndef task():\n    import json\n"
    )
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "folder").mkdir()
    assert imports_of(job) == ["os", "torch.nn", "sklearn.datasets", "json"]


def test_a_job_that_is_none(tmp_path: Path) -> None:
    """Saying what is wrong is left to the look at the job."""
    job = tmp_path / "job.py"
    job.write_text("def task(:\n")
    assert imports_of(job) == []
    assert imports_of(tmp_path / "nowhere.py") == []
