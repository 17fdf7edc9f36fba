"""What Python's cyclic garbage collector need not walk through: a full collection visits every list and its elements.

With a million keys it took 300 ms, every ten to twenty seconds, for a list of keys that never becomes garbage. It still
does in a replica that came to them while it ran, until it is started again or fetches a state.
"""

import gc


def set_apart() -> None:
    """Have later collections pass over everything that is there now; what was set apart before is looked through once.

    Takes as long as a full collection: called where a replica has just read its state, which takes longer. What is
    set apart is freed as ever when nothing refers to it; only cycles wait for the next call.
    """
    give_free()
    gc.freeze()


def give_free() -> None:
    """Free what was set apart and is in use no more, before something as large takes its place."""
    gc.unfreeze()
    gc.collect()
