"""Where a session's KV is, as a table: a pair that is missing is a bug."""

from enum import Enum


class Residency(Enum):
    """Where the bytes are."""

    RESIDENT = "resident"
    LEAVING = "leaving"
    SWAPPED = "swapped"
    ARRIVING = "arriving"


TRANSITIONS: dict[tuple[Residency, str], Residency] = {
    (Residency.RESIDENT, "swap_out"): Residency.LEAVING,
    (Residency.LEAVING, "swapped_out"): Residency.SWAPPED,
    (Residency.SWAPPED, "swap_in"): Residency.ARRIVING,
    (Residency.ARRIVING, "swapped_in"): Residency.RESIDENT,
}


def advance(state: Residency, event: str) -> Residency:
    """The state after `event`; an event that the state does not know is a bug."""
    assert (state, event) in TRANSITIONS, f"{event} in state {state.value}"
    return TRANSITIONS[state, event]
