"""A queue of jobs: several threads take them, each job is done by one of them. Code without asyncio."""

import sys
from concurrent.futures import ThreadPoolExecutor

from client import SyncClient

JOBS = 12


def work(client: SyncClient, worker: int) -> int:
    """Do jobs until there are none; return how many."""
    done = 0
    while True:
        jobs = list(client.scan("job/"))
        if not jobs:
            return done
        for name, _ in jobs:
            # Of all who see the job, one gets it: taking reads and removes at one time.
            job = client.take(name)
            if job is not None:
                client.put_new(b"done/" + name, b"%d did %s" % (worker, job))
                done += 1


def main(directory: str) -> None:
    with SyncClient.from_dir(directory) as client:
        client.delete_many([f"done/job/{number:03}" for number in range(JOBS)])
        client.put_many({f"job/{number:03}": f"task {number}" for number in range(JOBS)})
        with ThreadPoolExecutor(3) as workers:
            counts = list(workers.map(lambda worker: work(client, worker), range(3)))
        finished = list(client.scan("done/job/"))
        print(f"{sum(counts)} jobs done, {len(finished)} results, none twice: {sum(counts) == len(finished) == JOBS}")


main(sys.argv[1])
