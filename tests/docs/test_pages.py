"""The README and the pages under docs, against what they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from chaos.faults import KINDS
from launcher.main import app
from p2p.job import load_task

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> dict[str, set[str]]:
    """The subcommands of `p2p-launch` with their options."""
    group = typer.main.get_command(app)
    return {
        name: {flag for parameter in command.params for flag in parameter.opts if flag[:2] == "--"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link and picture is a file of this repository, or a heading in one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        assert "://" not in target, f"{target} may be gone tomorrow"
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    """No page under docs is forgotten."""
    text = README.read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_the_table_of_options_is_that_of_run() -> None:
    """Each option of `run` has its row, and each row is an option."""
    rows = re.findall(r"^\| `(--[\w-]+)", README.read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(commands()["run"] - {"--help"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page: Path) -> None:
    """Subcommands and options of every `p2p-launch …` are known; so is every `make` target."""
    known, text = commands(), page.read_text("utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"p2p-launch ([a-z]+)([^`\n]*)", text):
        assert name in known, f"p2p-launch {name}"
        options = set(re.findall(r"(--[a-z][\w-]*)", rest))
        assert options <= known[name] | {"--help"}, f"p2p-launch {name}{rest}"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target


def test_the_job_in_the_readme_is_one(tmp_path: Path) -> None:
    """It loads as it stands, and takes the setting that the command below it gives."""
    job = tmp_path / "job.py"
    (source,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
        if "def task" in block
    ]
    job.write_text(source, "utf-8")
    assert load_task(job, {"steps": "500"}).steps == 500


def test_every_kind_of_fault_has_its_row() -> None:
    """The simulator's faults and the table on the page about them are the same."""
    text = (ROOT / "docs" / "chaos.md").read_text("utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE) == list(KINDS)


def test_figures_about_collectives_are_what_the_page_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The code on the page prints the lines that stand under it."""
    text = (ROOT / "docs" / "collectives.md").read_text("utf-8")
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    exec(compile(found[1], "collectives.md", "exec"), {})
    assert capsys.readouterr().out == found[2]
