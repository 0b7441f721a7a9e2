"""The same task under DistributedDataParallel, as its users write it for an elastic `torchrun`.

    torchrun --standalone --nproc-per-node 4 --max-restarts 100 benchmarks/torchrun_job.py \
        JOB FOLDER CHECKPOINT_EVERY [NAME=VALUE…]

Rank 0 writes a checkpoint every so many steps; after a restart everyone goes on from the newest.
Each rank appends a line "STEP TIME" to FOLDER/rank-N.log for each step it has finished.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from p2p.job import load_task


def main() -> None:
    job, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings = dict(argument.split("=", 1) for argument in sys.argv[4:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    task = load_task(job, settings)
    model = DistributedDataParallel(task.model)
    optimizer = task.optimizer(list(model.parameters()))
    scheduler = task.scheduler(optimizer) if task.scheduler is not None else None
    checkpoint, step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        step = saved["step"]
        task.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(saved["scheduler"])
    share, samples = task.batch_size // size, len(task.dataset)
    with (folder / f"rank-{rank}.log").open("a", buffering=1) as log:
        while step < (task.steps or 0):
            draw = torch.Generator().manual_seed(step)
            chosen = torch.randint(samples, (task.batch_size,), generator=draw).tolist()
            mine = chosen[rank * share : (rank + 1) * share]
            inputs, targets = default_collate([task.dataset[index] for index in mine])
            optimizer.zero_grad()
            task.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
            log.write(f"{step} {time.time()}\n")
            if rank == 0 and step % every == 0:
                save(checkpoint, step, task.model, optimizer, scheduler)
    dist.destroy_process_group()


def save(
    file: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: object,
) -> None:
    draft = file.with_suffix(".draft")
    states = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if scheduler is not None:
        states["scheduler"] = scheduler.state_dict()  # type: ignore[attr-defined]
    torch.save(states, draft)
    draft.replace(file)


if __name__ == "__main__":
    main()
