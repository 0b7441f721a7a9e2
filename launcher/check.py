"""Whether a job is pure: two processes compute its beginning, and their bits are compared.

They run one after the other, so that a clock shows, and so does what the first one leaves on disk.
What each computes is `purity.py`'s.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault.errors import ImpureTask, JobNotFound
from launcher.evidence import Difference, differences, labels_of
from launcher.inquiry import JobRequest, ask
from launcher.options import Options

APART_S = 1.1
"""Between the two starts, at least: many clocks count seconds."""
LISTED = 6
PROCESSES = ("plain", "disturbed")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out; `str` is for people."""

    job: str
    shards: int
    """How many were computed at each step."""
    steps: int
    arrays: int
    threads: int
    differences: tuple[Difference, ...]
    """In the order in which they arise; nothing that follows from an earlier one."""

    @property
    def pure(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self.pure:
            return (
                f"pure: {self.job} computes the same bits in two processes "
                f"({self.steps} steps, {self.shards} shards, {self.arrays} tensors and numbers)"
            )
        listed = [f"  {each}" for each in self.differences[:LISTED]]
        more = len(self.differences) - LISTED
        listed += [f"  and {more} more"] if more > 0 else []
        return "\n".join([f"impure: {self.job}", *listed, self._hint()])

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "pure": self.pure,
            "steps": self.steps,
            "shards": self.shards,
            "compared": self.arrays,
            "differences": [each.to_json() for each in self.differences],
        }

    def raise_if_impure(self) -> None:
        """Raises ImpureTask, with the first difference."""
        if self.differences:
            raise ImpureTask(f"{self.job} is impure: {self.differences[0]}")

    def _hint(self) -> str:
        label = self.differences[0].label
        causes = [
            "a clock, or the network",
            "a random generator that is not the global one of torch, NumPy or random",
        ]
        if label.shard is not None:
            causes.append("something that the dataset or the model keeps, other than buffers")
            causes.append("an operation of your own without a deterministic form")
            causes.append("memory, as torch.empty gives it, that is read and was never written")
        elif label.step is not None:
            causes.append("something that the optimizer or scheduler keeps out of state_dict()")
        else:
            causes.append("a file that changed in between")
        if self.threads > 1:
            causes.append(f"--threads {self.threads}, which may add in any order")
        return f"usual causes: {'; '.join(causes)}"


def check(options: Options) -> Verdict:
    """Raises what is wrong with the job, as before a run. Leaves nothing behind."""
    job = options.job.absolute()
    if not job.is_file():
        raise JobNotFound(f"there is no file {job}")
    request = JobRequest(str(job), options.shards, dict(options.settings), options.threads)
    with tempfile.TemporaryDirectory(prefix="mayfly-check-") as folder:
        files = [Path(folder) / f"{process}.npz" for process in PROCESSES]
        started = -APART_S
        for process, file in zip(PROCESSES, files, strict=True):
            time.sleep(max(0.0, started + APART_S - time.monotonic()))
            started = time.monotonic()
            arguments = (str(file), process)
            found = ask("launcher.purity", Path(folder) / "question.json", request, arguments)
        return Verdict(
            job.name,
            found["shards"],
            found["steps"],
            len(labels_of(files[0])),
            options.threads,
            tuple(differences(*files)),
        )
