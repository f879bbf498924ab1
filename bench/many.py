"""Measure how the throughput of small rooms grows with the processes that nginx spreads them over.

    python -m bench.many

Servers, nginx and load share the cores.
"""

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from bench.load import Crowd
from bench.peer import Many


async def many(processes: int) -> float:
    """Return how many messages a second 60 rooms of 4 carry, each with 60 on the way."""
    with tempfile.TemporaryDirectory() as folder:
        servers = Many(Path(folder), processes)
        await servers.start()
        crowds = [Crowd(servers, 4, f"MANY{room // 8 + 2}{room % 8 + 2}") for room in range(60)]
        for crowd in crowds:
            await crowd.join()

        async def talk(crowd: Crowd) -> None:
            said = 0
            while True:
                for _ in range(60):
                    crowd.peers[0].send(say=f"sent@{said:015}", id=f"i{said}")
                    said += 1
                while crowd.count < said * crowd.size:
                    await asyncio.sleep(0.001)

        talks = [asyncio.create_task(talk(crowd)) for crowd in crowds]
        await asyncio.sleep(2)
        before, started = sum(crowd.count for crowd in crowds), time.perf_counter()
        await asyncio.sleep(5)
        after, seconds = sum(crowd.count for crowd in crowds), time.perf_counter() - started
        for talk in talks:
            talk.cancel()
        for crowd in crowds:
            await crowd.leave()
        servers.stop()
    return (after - before) / 4 / seconds


def main() -> None:
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has nginx
    for processes in (1, 2, 4):
        rates = sorted(asyncio.run(many(processes)) for _ in range(3))
        print(
            f"{processes} processes: {rates[1]:.0f} messages/s ({rates[0]:.0f} to {rates[2]:.0f})"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
