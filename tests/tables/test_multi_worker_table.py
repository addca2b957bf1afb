"""The table over processes on loopback, one shard each."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from lmscale.tables.table import ShardedTable

NUM_WORKERS = 2


def _free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def test_two_processes_pull_and_push_as_one_table():
    script = Path(__file__).with_name("multi_worker_table.py")
    addresses = _free_addresses(NUM_WORKERS)
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(i), *addresses],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(NUM_WORKERS)
    ]
    try:
        outputs = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    seen = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]

    first = ShardedTable(vocab_size=11, embed_dim=3, seed=5).read_rows("embedding", 0, 11)
    expected = first.copy()
    # Each process pushes ones for its own ids, and for the shared ones.
    for row in (1, 4, 4, 10, 0, 4, 0, 4):
        expected[row] -= 1
    for worker, own_ids in zip(seen, ([1, 4], [4, 10]), strict=True):
        np.testing.assert_array_equal(np.float32(worker["rows"]), first[own_ids])
        np.testing.assert_array_equal(np.float32(worker["shared"]), first[[0, 4]])
        np.testing.assert_allclose(worker["after"], expected, atol=1e-6)
