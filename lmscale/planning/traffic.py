"""Bytes that devices receive in a step, counted from the ids of a batch alone: the rows that must travel, both ways."""

import numpy as np

ID_BYTES = 4


def row_bytes_received(ids, shared_ids, *, placement, row_bytes):
    """What devices receive for rows to come from their owners, and for their gradients to get back.

    Args:
      ids: [num_devices, n] int, those that each device needs the rows of.
      shared_ids: [s] int, those that every device needs.
      placement: `Placement` of the rows.
      row_bytes: int, bytes of a row or of its gradient.

    Returns:
      {"ids", "rows" or "row_gradients": [num_devices] int64}.
    """
    num_devices = placement.num_shards
    # asked[i, j]: different rows of shard j that device i needs; those of its own shard do not travel.
    asked = np.zeros([num_devices, num_devices], np.int64)
    for device, own in enumerate(ids):
        owners = placement.owner(np.union1d(own, shared_ids))
        asked[device] = np.bincount(owners, minlength=num_devices)
    np.fill_diagonal(asked, 0)
    of_others, of_own = asked.sum(axis=1), asked.sum(axis=0)
    return {"ids": ID_BYTES * of_own, "rows": row_bytes * of_others, "row_gradients": row_bytes * of_own}


def all_reduce_bytes(num_bytes, *, num_devices):
    """What each device receives of an all-reduce of so many bytes, at best."""
    return 2 * (num_devices - 1) * num_bytes // num_devices


def all_gather_bytes(num_bytes, *, num_devices):
    """What each device receives of an all-gather of so many bytes of each."""
    return (num_devices - 1) * num_bytes
