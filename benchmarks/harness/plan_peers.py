"""Which peers are run, and what each loads."""

from __future__ import annotations

import argparse

from sdrt.benchmarks.document.document import Subject
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.plan import ModelPlan
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import SubjectPlan
from sdrt.benchmarks.options import AUTO, NONE, names
from sdrt.benchmarks.peers import registry as peers
from sdrt.benchmarks.peers.prepare import prepared
from sdrt.runtime.errors import BackendError, SdrtError, UsageError


def check_peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The peers to run: those that were named, or all that are installed.

    Raises:
        UsageError: No peer of that name.
        BackendError: One that was named is not installed.
    """
    if arguments.peers == NONE:
        return ()
    if arguments.peers == AUTO:
        return tuple(name for name in peers.PEERS if peers.is_installed(name))
    wanted = names(arguments.peers)
    for name in wanted:
        if name not in peers.PEERS:
            raise UsageError(f"unknown peer {name!r}; there is {AUTO}, {NONE}, {', '.join(peers.PEERS)}")
        if not peers.is_installed(name):
            raise BackendError(f"the peer {name} is not installed: `sd-bench peers install {name}`")
    return wanted


def peer_plans(
    model: ModelPlan,
    arguments: argparse.Namespace,
    recorder: Recorder,
    progress: Progress,
) -> list[SubjectPlan]:
    """Each peer with its form of the checkpoint, converted if need be; one without is a row of the report."""
    wanted = check_peers(arguments)
    if wanted and model.checkpoint is None:
        if arguments.peers != AUTO:
            raise UsageError(
                f"the peers {', '.join(wanted)} start from a checkpoint, and {model.source} is a bundle: "
                "name what it was exported from with --checkpoint DIR, or give --peers none"
            )
        progress.note(
            f"no peers: they start from a checkpoint, and {model.source} is a bundle; see --checkpoint"
        )
        return []
    found = []
    for name in wanted:
        assert model.checkpoint is not None
        subject = Subject(name, peers.PEERS[name].label, "peer")
        progress.block(f"{name}: bringing the model into its form", 1)
        try:
            folder = prepared(name, model.checkpoint, progress.ongoing)
        except SdrtError as error:
            recorder.set_subject(subject)
            recorder.fail(model.name, name, "converting the model", error)
            progress.note(f"{name}: the model was not converted: {error}")
            continue
        found.append(
            SubjectPlan(
                subject,
                tuple(peers.worker_command(name)),
                folder,
                installed_bytes=peers.installed_bytes(name),
            )
        )
    return found
