"""Sessions leave memory for disk and come back: FastSwitch (arXiv 2411.18424) for one device.

    RESIDENT ─swap_out▶ LEAVING ─last write▶ SWAPPED ─swap_in▶ ARRIVING ─last read▶ RESIDENT

Leaving frees the buffers as soon as what the disk lacks has found room in staging, mostly at once,
for that is little: KV is written behind the decode. Arriving reads straight into the buffers while
others compute. Nothing here waits for the disk but `close`.

Deciding who leaves and who comes is the scheduler's.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass

from edgekv.clock import Clock
from edgekv.engine.lead import ALONE_LEAD, Ended, Lead
from edgekv.engine.request import EngineSession
from edgekv.engine.restores import ReadJob, Restore, Restores
from edgekv.engine.writes import Staging, WriteJob, WriteLanes, stored_prefix
from edgekv.errors import EngineFailed
from edgekv.kv.layout import BLOCK_TOKENS
from edgekv.kv.pool import KVPool
from edgekv.kv.residency import Residency
from edgekv.kv.runs import unpack_state
from edgekv.ranks.orders import Verb
from edgekv.store import Store
from edgekv.store.disk_io import Files, Io, IoDone
from edgekv.store.values import state_ends

SCARCE = 0.5  # of what sessions may own
GROUPS_PER_STEP = 4  # of one session, at most: a millisecond each


@dataclass(kw_only=True)
class SwapCounters:
    """What moved so far."""

    num_swap_outs: int = 0  # sessions that left memory with their KV kept
    num_swap_ins: int = 0  # sessions that came back
    num_restored_tokens: int = 0  # tokens read back
    # Tokens whose KV was given up: it had no place on disk, or could not be read back.
    num_forgotten_tokens: int = 0
    num_io_errors: int = 0  # reads and writes that failed
    staging_bytes: int = 0  # memory set aside for KV on its way to disk
    restore_ms: float = 0.0  # time that reads took, of all threads together


class SwapManager:
    """Moves KV between pool and store, or forgets it where there is no store.

    Owned by the engine thread.
    """

    def __init__(
        self,
        store: Store | None,
        io: Io | None,  # its owner ends it after `close`
        ended: Ended,  # where it says what has ended
        pool: KVPool,
        staging: Staging,  # without buffers KV is forgotten
        clock: Clock,
        *,
        behind: bool,  # write behind the decode, else everything at each swap-out
        lead: Lead = ALONE_LEAD,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._lead = lead
        self._behind = behind
        self._staging = staging
        self._ended = ended
        self._arrived: list[EngineSession] = []
        # Of which some is still to be gathered, in order, and how many of its writes had failed
        # before: their buffers are free when all of it has found room in staging.
        self.leaving: dict[EngineSession, int] = {}
        # Whose last tokens are still to be written, for staging had no room or the disk refused.
        self._tails: dict[EngineSession, None] = {}
        # Leaving or closed, and not done with until nothing of them is on its way.
        self._unsettled: dict[EngineSession, None] = {}
        # Whose windows must roll, and which lack staging for that until some I/O has ended.
        self.short: set[EngineSession] = set()
        # What a token's restore took, of late; 0 without a store, and until the first.
        self.restore_ms_per_token = 0.0
        self.counters = SwapCounters(staging_bytes=staging.total_bytes)
        self.store = store if staging.num_buffers else None
        if self.store is not None:
            assert io is not None
            self._io = io
            self._writes = WriteLanes(self.store, io, staging, pool.layout, lead.orders)
            self._restores = Restores(self.store, io, pool.layout)

    @property
    def keeps(self) -> bool:
        """Whether what is written behind the decode is there for who leaves memory."""
        return self.store is not None and self._behind

    @property
    def busy(self) -> bool:
        """Whether I/O is under way whose end changes what can be admitted."""
        return self.store is not None and bool(
            self.leaving or self._writes.lanes or self._restores.num_active
        )

    def key(self, session: EngineSession) -> int:
        """The session's key in the store, which gets to know it if need be."""
        assert self.store is not None
        if session.key is None:
            stored = self.store.session(
                session.app, session.store_name, persistent=session.persistent
            )
            session.key = stored.key
        return session.key

    def writing(self, session: EngineSession) -> bool:
        """Whether anything of a session is on its way to disk."""
        return self.store is not None and session.key in self._writes.lanes

    # --- out ---

    def write_behind(self, session: EngineSession) -> None:
        """Write whole groups that are not on disk yet, if staging has room; waits for nothing.

        Of a session that dies with the process only once memory gets scarce: before that it would
        wear the disk for nothing. With states a group ends at each snapshot: memory keeps a few.
        """
        if self.store is not None and (session.persistent or self._scarce()):
            most = self._writes.group_tokens_max
            self._hand_over(session, min(most, self._pool.layout.snapshot_tokens or most))

    def note_tail(self, session: EngineSession) -> None:
        """An answer has ended: `collect` writes the rest of its session, so that a kill leaves it.

        Of one that outlives the process; what finds no room is tried again as I/O ends.
        """
        if self.store is not None and self._behind and session.persistent:
            self._tails[session] = None

    def _write_tails(self) -> None:
        for session in list(self._tails):
            if not self._staging.num_free:
                return  # looking at all of them each time would take as long as a step
            kv = session.kv
            if session.active is None and kv.resident and not session.closed:
                self._hand_over(session, 1)
                if kv.num_to_hand and not kv.lost_rows:
                    continue
            del self._tails[session]

    def _hand_over(self, session: EngineSession, least: int) -> None:
        """Hand to the writer what the disk lacks, if it is `least` tokens and staging has room."""
        kv = session.kv
        if not kv.resident or not self._can_write(session):
            return
        if kv.lost_rows and least > 1:
            return  # perhaps another session has it on disk one day: that is looked up at the end
        if kv.num_to_hand < least or not self._link(session) or kv.lost_rows:
            return
        for _ in range(GROUPS_PER_STEP):
            if kv.num_to_hand < least or not self._staging.num_free:
                return
            self._writes.hand(session, self.key(session), rests=least == 1)

    def _scarce(self) -> bool:
        pool = self._pool.snapshot()
        return pool.used_bytes > SCARCE * pool.sessions_bytes

    def swap_out(self, session: EngineSession) -> None:
        """Take a session's KV out of memory: at once if staging has room, else as soon as it has.

        Nothing waits here for the I/O of others.
        """
        kv = session.kv
        assert kv.resident
        kv.truncate(kv.provenance.exact_prefix)
        if self.store is None or not kv.num_tokens:
            self.forget(session)
            return
        self.key(session)
        if not self._behind:
            kv.note_stored(0)
        kv.move("swap_out")
        self.counters.num_swap_outs += 1
        self.leaving[session] = session.num_write_failures
        self._gather(session)

    def make_slots(self, session: EngineSession) -> bool:
        """Roll a session's windows; what goes with that is handed to the writer first.

        Nothing else waits for the disk: False, if there is no staging until a write has ended; till
        then it is one of `short`. What cannot be written at all is lost to whoever goes back behind
        it, and to the disk.
        """
        kv, layout, active = session.kv, self._pool.layout, session.active
        base = layout.window_base(kv.num_tokens)
        # Of an evaluation it is of use if that is preempted, and never again.
        lasts = active is None or active.logits is None or self._scarce()
        while lasts and kv.next_to_hand < base and self._can_write(session):
            linked = self._link(session)
            if linked and (kv.lost_rows or kv.next_to_hand >= base):
                break
            if not linked or not self._staging.num_free:
                self.short.add(session)
                return False
            self._writes.hand(session, self.key(session), rests=False)
        kv.roll(layout)
        return True

    def copied(self, session: EngineSession) -> None:
        """A session took over KV in memory; what was out of its windows is on disk alone."""
        if self.keeps and session.kv.lost_rows:
            self._link(session)

    def _can_write(self, session: EngineSession) -> bool:
        """Whether a session's KV is written before it leaves memory, and none of it failed now."""
        wanted = self.keeps and not session.closed
        return wanted and self._clock.now_ms() >= session.write_again_ms

    def go_back(self, session: EngineSession, num_tokens: int) -> None:
        """Let a session leave that goes on behind `num_tokens`, where a state is in a record.

        What was computed behind is forgotten; what is on its way to disk gets there first.
        """
        session.kv.move("swap_out")
        self.truncate(session, num_tokens)
        self.leaving[session] = session.num_write_failures
        self._gather(session)

    def _gather(self, session: EngineSession) -> None:
        """Hand what a leaving session still has to the writer; its buffers are free after that."""
        kv = session.kv
        failed = session.num_write_failures != self.leaving[session]
        if not failed:
            if self._behind and kv.num_to_hand and not self._link(session):
                return
            if kv.lost_rows:
                self.counters.num_forgotten_tokens += kv.num_tokens - kv.handed
                self.truncate(session, kv.handed)
            while kv.num_to_hand:
                if not self._staging.num_free:
                    return
                self._writes.hand(session, self.key(session), rests=True)
        del self.leaving[session]
        kv.release(self._pool)
        if failed:  # only what is on disk can be kept
            self._keep_stored(session)
        self._settle(session)

    def _link(self, session: EngineSession) -> bool:
        """Before something is written: what the store has already need not be written again.

        That is looked up before a session's first write, when its app may have the same tokens of
        another, and where it lacks rows that another may have written: it copied what windows of
        that one reached. And later the store may have had to make room for others.

        Returns:
            False if another session is having the same tokens written: to be tried again later.
        """
        assert self.store is not None
        kv = session.kv
        if self.writing(session):
            return True
        if kv.handed:
            kv.note_stored(min(kv.stored, self.store.stored_end(self.key(session))))
        if kv.handed and not kv.lost_rows:
            return True
        tokens = kv.tokens[: kv.provenance.exact_prefix]
        num_tokens, donor = self._on_disk(session, tokens)
        if self._writes.on_the_way(session) >= num_tokens + BLOCK_TOKENS:
            return False
        if donor is not None:
            num_tokens = self._share(session, donor, tokens[:num_tokens])
        kv.handed = kv.stored = num_tokens
        kv.states.note_written(self._state_ends(session, num_tokens))
        return True

    def truncate(self, session: EngineSession, num_tokens: int) -> None:
        """Forget a session's KV from `num_tokens` on, wherever it is."""
        session.kv.truncate(num_tokens)
        if self.store is not None:
            self._writes.cut(session)

    def forget(self, session: EngineSession) -> None:
        """Give up the KV of a session that is not moving; what is on disk stays there."""
        self.counters.num_forgotten_tokens += session.kv.num_tokens
        self.truncate(session, 0)
        session.kv.drop(self._pool)

    def discard(self, session: EngineSession) -> None:
        """Forget the KV of a session that is not moving, and what of it is on disk."""
        self.forget(session)
        if self.store is not None and session.key is not None:
            self._lead.cut(self.store, session.key, 0)

    def close_session(self, session: EngineSession) -> None:
        """Nobody will ask a session again: to disk with what outlives the process."""
        kv = session.kv
        assert kv.residency is not Residency.ARRIVING
        if session.persistent and self.store is not None and self._behind:
            if kv.resident:
                self.swap_out(session)
            return
        self.truncate(session, 0)
        if not kv.moving:
            kv.drop(self._pool)
        self._settle(session)

    def _keep_stored(self, session: EngineSession) -> None:
        kv = session.kv
        num_tokens = kv.num_tokens
        self.counters.num_forgotten_tokens += num_tokens - kv.truncate(kv.stored)

    def _settle(self, session: EngineSession) -> None:
        """Once nothing of it is on its way, a leaving session has left, a closed one can go."""
        if self.writing(session) or session in self.leaving:
            self._unsettled[session] = None
            return
        self._unsettled.pop(session, None)
        kv = session.kv
        if kv.residency is Residency.LEAVING:
            self._keep_stored(session)
            kv.move("swapped_out")
            if not kv.num_tokens:
                kv.drop(self._pool)
        key, store = session.key, self.store
        if session.closed and not session.persistent and key is not None and store is not None:
            session.key = None
            store.forget(key)
            self._lead.forgotten(session.app, session.store_name)
            self._io.submit("write", store.flush, None)  # or with whatever is committed next

    # --- in ---

    def match(self, session: EngineSession, token_ids: list[int]) -> int:
        """How many of these tokens, from 0, a session that is not in memory could begin with.

        They are on disk: its own, perhaps of an earlier history, or another's of its app.
        """
        if self.store is None or not self._behind or self.writing(session):
            return 0
        return self._on_disk(session, token_ids)[0]

    def adopt(self, session: EngineSession, token_ids: list[int]) -> None:
        """Let a session that is not in memory begin with what `match` found."""
        num_tokens, donor = self._on_disk(session, token_ids)
        if donor is not None:
            num_tokens = self._share(session, donor, token_ids[:num_tokens])
        session.kv.drop(self._pool)
        if num_tokens:
            session.kv.adopt(token_ids[:num_tokens], self._state_ends(session, num_tokens))

    def _on_disk(self, session: EngineSession, token_ids: list[int]) -> tuple[int, int | None]:
        """How many of these tokens, from 0, are on disk for the app, and whose; None: its own."""
        assert self.store is not None
        own = stored_prefix(self.store, session, token_ids)
        donor, num_tokens = self.store.match(session.app, token_ids, but_not=session.key)
        num_tokens = self._on_all_disks(donor, num_tokens)
        if num_tokens >= own + BLOCK_TOKENS:  # less is not worth reading a whole record
            return num_tokens, donor
        return own, None

    def _on_all_disks(self, key: int, num_tokens: int) -> int:
        """How many of a session's first tokens other ranks have, too, if this one has so many."""
        lane = None if self._lead.alone else self._writes.lanes.get(key)
        stored = None if lane is None or self.store is None else self.store.lookup(key)
        if lane is None or stored is None:
            return num_tokens
        return stored.resume_point(min([num_tokens, *(write.start for write in lane.writes())]))

    def _state_ends(self, session: EngineSession, num_tokens: int) -> list[int]:
        """Behind how many of a session's tokens a state is on disk, up to `num_tokens`."""
        assert self.store is not None
        stored = None if session.key is None else self.store.lookup(session.key)
        return [end for end in (stored.state_ends if stored else ()) if end <= num_tokens]

    def _share(self, session: EngineSession, donor: int, token_ids: list[int]) -> int:
        """Make these tokens of the donor's the session's too; return how many it has then."""
        assert self.store is not None
        key = self.key(session)
        # What it has of an earlier history could be longer, and would stay.
        self._lead.cut(self.store, key, len(token_ids) - 1)
        self._lead.adopt(self.store, key, donor, len(token_ids))
        return stored_prefix(self.store, session, token_ids)  # the donor's may just be evicted

    def swap_in(self, session: EngineSession) -> None:
        """Begin to read a swapped session into the buffers that it was given."""
        session.kv.move("swap_in")
        restore = None
        if self.store is not None:
            restore = self._restores.start(session, self._clock.now_ms())
        if restore is None:  # the store had to make room for others, or nothing moves here
            self._arrive(Restore(session=session, key=session.key or 0, good_end=0, started_ms=0.0))

    def _arrive(self, restore: Restore) -> None:
        session, kv = restore.session, restore.session.kv
        restored = min(restore.good_end, kv.num_tokens)
        kv.states.note_written(end for end in state_ends(restore.refs) if end <= restored)
        self.counters.num_swap_ins += 1
        self.counters.num_restored_tokens += restored
        self.counters.num_forgotten_tokens += kv.num_tokens - restored
        self.counters.restore_ms += restore.read_ms
        kv.truncate(restored)
        kv.move("swapped_in")
        if kv.buffers is not None:
            state_job = restore.state_job if restored else -1
            kv.buffers.order(Verb.ARRIVED, restored, state_job)
        if restored and restore.state is not None:
            assert restore.state_end == kv.num_tokens
            kv.states.move_on(unpack_state(self._pool.layout, restore.state))
        session.num_restored, session.restore_ms = restored, restore.read_ms
        if restored:
            ms_per_token = (self._clock.now_ms() - restore.started_ms) / restored
            old = self.restore_ms_per_token
            self.restore_ms_per_token = old + 0.2 * (ms_per_token - old) if old else ms_per_token
        self._arrived.append(session)

    # --- completions ---

    def collect(self) -> list[EngineSession]:
        """Take in what has ended, write tails; return the sessions that are resident again.

        No step runs meanwhile.
        """
        while True:
            try:
                self._take_in(self._ended.get_nowait())
            except queue.Empty:
                break
        self._write_tails()
        arrived, self._arrived = self._arrived, []
        return arrived

    def _take_in(self, io: IoDone) -> None:
        tag = io.tag
        self.short.clear()
        if isinstance(io.error, EngineFailed):  # a bug, not a disk that refuses
            raise io.error
        if io.error is not None:
            self.counters.num_io_errors += 1
        if isinstance(tag, WriteJob):
            self._writes.done(tag, io, self._clock.now_ms())
        elif isinstance(tag, ReadJob):
            restore = self._restores.done(tag, io)
            if restore is not None:
                self._arrive(restore)
        if self.store is not None:
            self._writes.pump_refused()
        for session in list(self.leaving):
            self._gather(session)
        for session in list(self._unsettled):
            self._settle(session)

    def close(self, sessions: list[EngineSession]) -> None:
        """Write what is not on disk yet of sessions that outlive the process."""
        if self.store is None:
            return
        for session in sessions:
            if session.persistent and session.kv.resident and self._behind:
                self.swap_out(session)
        while self.busy:
            self._take_in(self._ended.get())

    def check_integrity(self) -> None:
        """Assert that staging, lanes and counts agree."""
        if self.store is not None:
            self._writes.check_integrity()
            self.store.check_integrity()


@dataclass(frozen=True, kw_only=True)
class SwapTwin:
    """Another way to move KV, in place of the product's, for a bench to compare it with."""

    make: Callable[[Store, KVPool, Clock], SwapManager]  # makes the manager, on the engine thread
    files: Files  # system calls that its store makes on record files
