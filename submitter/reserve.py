"""Reserves a task's row before its request is sent, or takes over the row of a dead submitter.

The row holds the idempotency key (`external_task_id`) and a lease to send. If a process is killed at
any point, another one continues with its row, and no second task is created.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from submitter.clock import Clock
from submitter.create import Candidate, Creator
from submitter.errors import IdConflict
from submitter.ledger.base import Reserved, Tasks
from submitter.log import Logger
from submitter.observation import SendLease
from submitter.preflight import Prepared
from submitter.stored_request import differences
from submitter.task import RefusedBy, Task, TaskStatus, is_sendable, may_send
from submitter.transition import transition

log = Logger("submitter")


class Reservations:
    """Reserves rows. A submitter has one instance, so that its callers get free slots in order."""

    def __init__(self, ledger: Tasks, creator: Creator, clock: Clock) -> None:
        self._ledger = ledger
        self._creator = creator
        self._clock = clock
        self._queues: dict[str, asyncio.Lock] = {}

    async def reserve(
        self, prepared: Prepared, candidates: Sequence[Candidate], *, callback: bool, absent_at_ms: int | None = None
    ) -> Task:
        """Return the task with this id.

        A task that is stored already with the same request is returned unchanged; while its create is
        unanswered or refused, only after its lease to send was taken over. A refused one waits for a free
        slot first, as a new one does. `absent_at_ms`: see `SendLease`.
        Raises IdConflict if the stored request differs.
        """
        now_ms = self._clock.now_ms()
        lease_owner = self._clock.new_id()
        blank = Task(
            external_task_id=prepared.external_task_id,
            vendor=candidates[0].name,
            status=TaskStatus.CREATED,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            poll_policy=candidates[0].poll_policy,
            request=prepared.stored_request,
            metadata=prepared.request.metadata,
            expects_callback=callback,
        )
        existing = await self._ledger.get_many([prepared.external_task_id])  # an existing task needs no slot
        if existing:
            reserved = Reserved(existing[0], is_new=False)
        else:
            reserved = await self._reserve_slot(blank, lease_owner, candidates)
        if reserved.is_new:
            return reserved.task
        different = differences(reserved.task, blank)
        if different:
            raise IdConflict(prepared.external_task_id, different)
        task, lease = reserved.task, partial(self._creator.send_lease, lease_owner, absent_at_ms=absent_at_ms)
        if task.status is TaskStatus.REFUSED:
            async with self._queues.setdefault(blank.vendor, asyncio.Lock()):
                await self._free_slot(candidates)
                task = await self._take(await self._ledger.get(task.external_task_id), lease(), candidates[0])
        return task if task.lease_owner == lease_owner else await self._take_over(task, lease, candidates[0])

    async def _free_slot(self, candidates: Sequence[Candidate]) -> None:
        """Return as soon as one of the vendors has a free slot."""
        while True:
            version = self._ledger.version()
            for candidate in candidates:
                slots = candidate.settings.parallel
                if slots is None or await self._ledger.open_tasks(candidate.name) < slots:
                    return
            await self._clock.wait_for_change(self._ledger, version, None)

    async def _reserve_slot(self, blank: Task, lease_owner: str, candidates: Sequence[Candidate]) -> Reserved:
        """Store the task as soon as one of the vendors has a free slot; waiting callers are served in order."""
        async with self._queues.setdefault(blank.vendor, asyncio.Lock()):
            is_queued = False
            while True:
                version = self._ledger.version()
                refused_by: tuple[RefusedBy, ...] = ()
                for candidate in candidates:
                    now_ms = self._clock.now_ms()
                    created = msgspec.structs.replace(
                        blank,
                        vendor=candidate.name,
                        poll_policy=candidate.poll_policy,
                        refused_by=refused_by,
                        created_at_ms=now_ms,
                        updated_at_ms=now_ms,
                    )
                    leased = transition(created, self._creator.send_lease(lease_owner), now_ms)
                    assert leased is not None
                    parallel = candidate.settings.parallel
                    reserved = await self._ledger.reserve(leased.task, parallel)
                    if reserved is not None:
                        return reserved
                    refused_by = (
                        *refused_by,
                        RefusedBy(candidate.name, f"the configured limit of {parallel} parallel tasks is reached"),
                    )
                if not is_queued:
                    is_queued = True
                    log.warning(
                        "submission.queued", external_task_id=blank.external_task_id, reason=refused_by[-1].reason
                    )
                await self._clock.wait_for_change(self._ledger, version, None)

    async def _take(self, task: Task, lease: SendLease, first: Candidate) -> Task:
        """Try to take the lease to send, and return the task as it is then."""
        taken = await self._creator.observe(task.external_task_id, lease)
        if taken.lease_owner == lease.lease_owner and task.status is TaskStatus.REFUSED:
            return await self._creator.move_to(taken, first, None)  # it starts again at the first vendor
        return taken

    async def _take_over(self, task: Task, lease: Callable[[], SendLease], first: Candidate) -> Task:
        """Wait until another submitter's create is answered, or take over its expired lease to send."""
        is_waiting = False
        while is_sendable(task):
            version = self._ledger.version()
            task = await self._ledger.get(task.external_task_id)
            now_ms = self._clock.now_ms()
            if may_send(task, now_ms):
                wanted = lease()
                task = await self._take(task, wanted, first)
                if task.lease_owner == wanted.lease_owner:
                    return task
            else:
                if not is_waiting:
                    is_waiting = True
                    log.warning(
                        "submission.waiting",
                        external_task_id=task.external_task_id,
                        reason="another submitter is sending this task; this one continues when that lease expires",
                    )
                left_s = max(0.05, (task.lease_until_ms - now_ms) / 1000)
                await self._clock.wait_for_change(self._ledger, version, left_s)
        return task
