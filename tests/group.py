"""Several processes of one run, started from a server that has the libraries loaded already."""

import multiprocessing
import os
import socket
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.runs"])


def _one(work, args, rank, world, port, results):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        results.put((rank, True, work(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


def together(work, *args, world=2, timeout=120, silent=()):
    """What `work(*args)`, a function of a module, gives in each of `world` processes of one group; AssertionError with
    the traceback where one fails. The processes in `silent` say nothing, and None is theirs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_one, args=(work, args, r, world, port, results)) for r in range(world)]
    for p in processes:
        p.start()
    found = {}
    try:
        for _ in range(world - len(silent)):
            rank, fine, value = results.get(timeout=timeout)
            assert fine, f"process {rank}:\n{value}"
            found[rank] = value
    finally:
        for p in processes:
            p.join(10)
            if p.is_alive():
                p.kill()
    return [found.get(r) for r in range(world)]
