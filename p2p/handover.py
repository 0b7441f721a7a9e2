"""Leaving before the deadline: the last step, the swap, and what to do when neither comes about.

The successor has followed for a while (`following.py`) when this peer stops at a step boundary.
As soon as it says that it holds the same state, the swap is proposed, and this peer leaves when it
sees the new view. Whatever goes wrong costs a moment: this peer goes on and tries again, and when
its time is up it leaves at a boundary, so that the others adopt its shards without having to find
out that it is gone. Inviting the successor in time is `fault/membership.py`'s. Sans-I/O.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from fault.membership import Membership
from fault.records import Peer, Timing
from p2p.following import Leader
from p2p.steps import Steps

CLOSE_STEPS = 2
"""A successor that is so many steps behind is there in a moment."""
PATIENCE_S = 1.0
"""After so long a successor that is ready and does not come closer is waited for."""
RETRY_S = 1.0
STEP_TIMES_KEPT = 8


class HandOver:
    """One member's; the core tells it what happens."""

    def __init__(
        self, membership: Membership, steps: Steps, leader: Leader, timing: Timing
    ) -> None:
        self._membership = membership
        self._steps = steps
        self._leader = leader
        self._timing = timing
        self._ready: Peer = ""
        self._ready_since = 0.0
        self._heard: tuple[float, tuple[int, str]] = (0.0, (-1, ""))
        """When the successor last got on, and where it stood then."""
        self._proposed = False
        self._again_at = -float("inf")
        self._stood_at = float("inf")
        self._step_times: deque[float] = deque(maxlen=STEP_TIMES_KEPT)

    # --- at a step boundary -----------------------------------------------------------------

    def at_boundary(self, now: float) -> None:
        """Stops the steps if the successor is close enough; before the next step is begun."""
        if now > self._stood_at:
            self._step_times.append(now - self._stood_at)
        self._stood_at = now
        membership, steps = self._membership, self._steps
        # not the longest: one that stood still for an outage says nothing of the next
        membership.step_s = median(self._step_times) if self._step_times else 0.0
        successor = membership.ready_successor(now)
        if successor != self._ready:
            self._ready, self._ready_since = successor, now
        if not successor or now < self._again_at or not self._is_close(successor, now):
            return
        membership.successor = successor
        steps.stopped = True
        self._heard = (now, self._leader.standing(successor))
        self.look(now)

    def _is_close(self, successor: Peer, now: float) -> bool:
        step, _ = self._leader.standing(successor)
        if self._steps.step - step <= CLOSE_STEPS:
            return True
        view = self._membership.view
        alone = view is not None and len(view.members) == 1
        return now - self._ready_since > PATIENCE_S and (alone or self._leader.covers(step))

    def out_of_time(self, now: float) -> bool:
        """Whether the next step may not end before the deadline."""
        membership, slack_s = self._membership, self._timing.deadline_slack_s
        return now + 1.5 * membership.step_s + slack_s > membership.deadline

    def someone_stays(self) -> bool:
        """Whether another member has time left, judged so that never all of them leave at once.

        The registry's answer is of one moment: of two members whose time is up, the second to say
        so sees that the first has said it, or has left.
        """
        snapshot, me = self._membership.snapshot, self._membership.me
        view = self._membership.view
        if snapshot is None or view is None:
            return False
        doing = snapshot.doing
        return (me in doing and doing[me].near_deadline) and any(
            peer in snapshot.leased and peer in doing and not doing[peer].near_deadline
            for peer in view.members
            if peer != me
        )

    # --- while stopped ----------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Proposes the swap if the successor holds this peer's state; goes on if it comes to none.

        To be called whenever the successor says something, and at every beat.
        """
        steps, membership = self._steps, self._membership
        if not steps.stopped:
            return
        standing = self._leader.standing(membership.successor)
        if standing == (steps.step, steps.digest):
            self._proposed = self._proposed or membership.propose_swap(membership.successor)
        if standing != self._heard[1]:
            self._heard = (now, standing)
        patience = self._timing.handover_ack_s * (2 if self._proposed else 1)
        if now - self._heard[0] > patience:
            steps.stopped = self._proposed = False
            self._again_at = now + RETRY_S
            steps.begin(now)

    def on_part_wanted(self, source: Peer, now: float) -> None:
        """A successor that is still being sent a state gets on as well."""
        if source == self._membership.successor:
            self._heard = (now, self._heard[1])

    def on_answer(self) -> None:
        """The registry refused the swap, or did not answer: with its next word, propose again."""
        self._proposed = False
