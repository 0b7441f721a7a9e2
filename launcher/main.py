"""`p2p-launch`: the command. It parses, calls `launcher.run`, and turns errors into one line."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fault.errors import (
    Detached,
    InputError,
    MayflyError,
    RegistryUnavailable,
    StorageUnavailable,
)
from fault.records import Timing
from fault.registry import Registry
from launcher import resuming, runs
from launcher.home import Home, RunFolder
from launcher.logs import entries
from launcher.progress import Bar, Plain, Quiet
from launcher.summary import Story
from p2p.transport.keys import PEER_FILE, RELAY_FILE, new_keys, write_keys

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trains a PyTorch model on peers that may die at any time, without changing a bit.",
)
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where runs are kept; default $MAYFLY_HOME or ~/.mayfly."),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
JobArgument = Annotated[Path, typer.Argument(metavar="JOB.py", help="Defines task() -> p2p.Task.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="For task().")
]
ThreadsOption = Annotated[int, typer.Option(help="Threads per function; part of the result.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON line on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


@app.command()
def run(
    job: JobArgument,
    peers: Annotated[int, typer.Option(help="Function peers to start with.")] = 4,
    shards: Annotated[int, typer.Option(help="Parts of each step's work; default: peers.")] = 0,
    collective: Annotated[str, typer.Option(help="ring, butterfly or direct.")] = "ring",
    set_: SetOption = None,
    kill: Annotated[
        list[str] | None,
        typer.Option(metavar="SLOT@STEP", help="Kill this slot's function at this step."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds a function may live.")] = 900.0,
    memory: Annotated[int, typer.Option(help="MB a function may use.")] = 3008,
    registry: Annotated[str, typer.Option(help="redis://… to use instead of an own one.")] = "",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    threads: ThreadsOption = 1,
    relays: Annotated[int, typer.Option(help="Relays that the peers speak through.")] = 1,
    links: Annotated[
        str, typer.Option(help="relay, direct (over TCP) or auto: past the relays within a host.")
    ] = "auto",
    compress: Annotated[
        str, typer.Option(help="none, bf16 or int8: gradients on their way; part of the result.")
    ] = "none",
    overlap: Annotated[
        bool, typer.Option(help="Sum gradients while the backward pass goes on.")
    ] = True,
    aggregate: Annotated[
        str, typer.Option(help="peers, or database: gradients and optimizer in a store.")
    ] = "peers",
    workers: Annotated[
        int | None,
        typer.Option(help="Worker functions of each peer, with a database; default: 1."),
    ] = None,
    stores: Annotated[str, typer.Option(help="shared, or per-peer.")] = "shared",
    robust: Annotated[
        str, typer.Option(metavar="RULE[:F]", help="Instead of the mean, with a database.")
    ] = "",
    sabotage: Annotated[
        list[int] | None, typer.Option(hidden=True, help="Shards with wrong gradients.")
    ] = None,
    store: Annotated[str, typer.Option(help="redis://… to use instead of an own one.")] = "",
    start: Annotated[str, typer.Option(help="Of functions: cold, warm or snapshot.")] = "snapshot",
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the emulator listens, on loopback.")
    ] = "127.0.0.1:0",
    relay_listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Relays over TCP, for peers with the run's keys."),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="From 'p2p-launch keys'; default: new ones."),
    ] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds without progress before a peer counts as hung.")
    ] = Timing().patience_s,
    timing: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SECONDS", hidden=True, help="Of the protocol, for experiments."),
    ] = None,
    home: HomeOption = None,
    run_id: Annotated[str, typer.Option(help="A name for the run.")] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a job to its end."""
    options = runs.Options(
        job,
        peers,
        shards,
        collective,
        links,
        compress,
        overlap,
        _settings(set_ or []),
        tuple([_kill(each) for each in kill or []]),
        time_limit,
        memory,
        registry,
        checkpoint_every,
        threads,
        relays,
        aggregate,
        -1 if workers is None else workers,
        stores,
        store,
        robust,
        tuple(sabotage or []),
        start,
        listen,
        relay_listen,
        keys,
        _timing(timing or [], patience),
    )
    folder = runs.create(Home(home), run_id or runs.new_run_id(job), options)
    _watch(folder, as_json, quiet)


@app.command()
def attach(
    run: RunArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Watch a run that is going on, to its end."""
    folder = Home(home).find(run)
    runs.check_alive(folder)
    _watch(folder, as_json, quiet)


@app.command()
def resume(
    run: RunArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with a run that was stopped, failed, or lost all its processes."""
    folder = Home(home).find(run)
    resuming.resume(folder)
    _watch(folder, as_json, quiet)


@app.command()
def scale(
    run: RunArgument,
    slots: Annotated[int, typer.Argument(metavar="N", help="1 to the number of shards.")],
    home: HomeOption = None,
) -> None:
    """Change how many peers a run has, while it is running."""
    folder = Home(home).find(run)
    runs.scale(folder, slots)
    print(f"run {run} is to have {slots} slots", file=sys.stderr)


@app.command()
def check(
    job: JobArgument,
    shards: Annotated[
        int, typer.Option("--shards", "--peers", help="Parts of each step's work.")
    ] = 4,
    set_: SetOption = None,
    threads: ThreadsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Compute the beginning of a job in two processes, and say whether they agree to the bit."""
    from launcher.check import check as examine  # brings in numpy

    verdict = examine(runs.Options(job, shards, settings=_settings(set_ or []), threads=threads))
    print(json.dumps(verdict.to_json()) if as_json else verdict, flush=True)
    verdict.raise_if_impure()


@app.command()
def status(run: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say how a run is doing."""
    folder = Home(home).find(run)
    found = _status(folder)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if value not in ("", None):
            print(f"{name:<12}{value if not isinstance(value, dict | list) else json.dumps(value)}")


@app.command("list")
def list_(home: HomeOption = None) -> None:
    """List all runs, the oldest first."""
    for folder in Home(home).runs():
        try:
            summary = folder.read(folder.summary)
            state = "running" if folder.alive() else summary["state"] if summary else "broken off"
        except StorageUnavailable:
            state = "damaged"
        print(f"{folder.id:<40} {state}")


@app.command()
def logs(
    run: RunArgument,
    slot: Annotated[
        int | None, typer.Option(min=0, help="Only what this slot's functions wrote.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Print what a run's functions and processes wrote."""
    for line in entries(Home(home).find(run), slot):
        print(line)


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; default: the run's folder.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Draw what happened in a run, so far or to its end: report.png and report.html."""
    folder = Home(home).find(run)
    from launcher.report.writing import write

    for path in write(folder, out):
        print(path)


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets relay.key and peer.key.")],
) -> None:
    """Make the keys of a run, for peers that reach it over the network."""
    write_keys(new_keys(), folder)
    for name in (RELAY_FILE, PEER_FILE):
        print(folder / name)


@app.command()
def store(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen.")
    ] = "127.0.0.1:7379",
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line is the password.")
    ] = None,
    persist: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what is stored in this folder.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Run a store for tensors and scripts, in the foreground, until a signal."""
    from launcher.serving import serve

    serve(Home(home).path / "stores", listen, password_file, persist)


@app.command()
def stop(run: RunArgument, home: HomeOption = None) -> None:
    """Stop a run; returns when nothing of it is left running."""
    folder = Home(home).find(run)
    runs.check_alive(folder)
    runs.stop(folder)
    print(f"run {run} was stopped", file=sys.stderr)


@app.command()
def rm(run: RunArgument, home: HomeOption = None) -> None:
    """Remove a run's folder, with its checkpoints and weights."""
    home_ = Home(home)
    folder = home_.find(run)
    plan = None
    with suppress(StorageUnavailable):  # what is damaged is all the more to be removed
        plan = folder.read(folder.plan)
    home_.remove(folder)
    if plan is not None and plan["registry"]:
        registry = Registry(plan["registry"], run, Timing(**plan["timing"]))
        try:
            registry.delete_run()
        finally:
            registry.close()


def _watch(folder: RunFolder, as_json: bool, quiet: bool) -> None:
    """Shows a run to its end. From here on a Ctrl-C ends the watching, and not the run."""
    try:
        if not quiet:
            print(f"run {folder.id} in {folder.path}", file=sys.stderr)
        steps = int((folder.read(folder.plan) or {}).get("steps", 0))
        display = Quiet(steps) if quiet else Bar(steps) if sys.stderr.isatty() else Plain(steps)
        with display:
            summary = runs.follow(folder, display.show)
    except KeyboardInterrupt:
        raise Detached(
            f"run {folder.id} goes on: 'p2p-launch attach {folder.id}' shows it again, "
            f"'p2p-launch stop {folder.id}' ends it"
        ) from None
    if as_json:
        print(json.dumps(summary), flush=True)
    runs.check_ended_well(summary)
    if not as_json and not quiet:
        _tell(summary)


def _timing(given: list[str], patience: float) -> Timing:
    values = {field.name for field in fields(Timing)}
    chosen = {"patience_s": patience}
    for each in given:
        name, _, value = each.partition("=")
        if name not in values:
            raise InputError(f"--timing {each}: there is no {name!r}; there are {sorted(values)}")
        try:
            chosen[name] = float(value)
        except ValueError:
            raise InputError(f"--timing {each}: write it as NAME=SECONDS") from None
    return Timing(**chosen)


def _settings(given: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name:
            raise InputError(f"--set {each}: write it as NAME=VALUE")
        settings[name] = value
    return settings


def _kill(given: str) -> tuple[int, int]:
    slot, _, step = given.partition("@")
    if not (slot.isdecimal() and step.isdecimal()):
        raise InputError(f"--kill {given}: write it as SLOT@STEP, as in 2@60")
    return int(slot), int(step)


def _status(folder: RunFolder) -> dict[str, Any]:
    plan = folder.read(folder.plan) or {}
    ready = folder.read(folder.supervisor)
    summary = folder.read(folder.summary)
    found: dict[str, Any] = {"run": folder.id, "state": "broken off", "folder": str(folder.path)}
    if summary is not None and not folder.alive():
        return {**found, **summary}
    if ready is None or not folder.alive():
        return found
    found |= {"state": "running", "total_steps": plan.get("steps", 0)}
    registry = Registry(ready["registry"], folder.id, Timing(**plan["timing"]))
    try:
        snapshot = registry.read()
    except RegistryUnavailable:
        return {**found, "registry": "does not answer"}
    finally:
        registry.close()
    view = snapshot.view
    members = view.members if view is not None else ()
    found["step"] = max([d.step for p, d in snapshot.doing.items() if p in members], default=0)
    found["checkpoint"] = snapshot.checkpoint
    found["view"] = view.number if view is not None else None
    found["plays"] = {peer: view.shards_of(peer) for peer in members} if view is not None else {}
    story = Story()
    story.take(folder.read_events())
    found["traffic"] = {peer: story.traffic[peer] for peer in members if peer in story.traffic}
    from launcher.relay_counts import relay_counts  # brings in numpy

    found["relays"] = relay_counts(ready["relays"], folder.keys)
    found["read_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return found


def _tell(summary: dict[str, Any]) -> None:
    invocations, stalls = summary["invocations"], summary["stall_ms"]["death"]
    metrics = "".join(f"  {name} {value:.4f}" for name, value in summary["metrics"].items())
    print(f"finished     {summary['steps']} steps in {summary['wall_s']:.1f} s{metrics}")
    print(f"weights      {summary['folder']}/final.safetensors")
    print(f"state        {summary['digest']}")
    print(f"invocations  {invocations['total']}, {invocations['cold']} of them cold")
    lost = f", stalls {', '.join(f'{stall:.0f} ms' for stall in stalls)}" if stalls else ""
    print(f"deaths       {summary['deaths']}, steps lost {summary['steps_lost']}{lost}")
    handed = summary["stall_ms"]["handover"]
    typical = f", stall {median(handed):.0f} ms (median)" if handed else ""
    print(f"hand-overs   {summary['handovers']}{typical}")
    traffic = Counter(summary["traffic"])
    relayed, direct, named = (
        traffic[f"{way}_bytes"] / 1e6 for way in ("relayed", "direct", "named")
    )
    ways = f"{relayed:.1f} MB by relays, {direct:.1f} MB direct, {named:.1f} MB in place"
    print(f"bytes        {ways}; {traffic['asks']:.0f} asks", flush=True)


def main() -> int:
    """The entry point; returns the exit code."""
    gc.freeze()  # modules stay: they need not be looked through, least of all at the end
    try:
        # a number for --help and the like, and for a Ctrl-C that ended no run
        code: int | None = app(standalone_mode=False)
    except MayflyError as error:
        trace = getattr(error, "trace", "")
        if trace:
            print(trace.rstrip(), file=sys.stderr)
        print(f"p2p-launch: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        said = " ".join(usage().split()).rstrip(".")
        if said:  # without a command the help was shown instead
            print(f"p2p-launch: {said}; see 'p2p-launch --help'", file=sys.stderr)
        return InputError.exit_code
    return code or 0
