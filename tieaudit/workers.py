"""Work spread over a bounded number of processes. One that is killed costs its own piece of work, and no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

AHEAD = 4
"""Pieces handed out for each process: enough to keep it busy, few enough not to hold a hundred thousand at once."""
PIECES_EACH = 500
"""Pieces after which processes are replaced, by a new pool: what libraries leave behind in them does not add up. The
pool's own way of replacing single ones can hang (python/cpython#115634)."""


def spread(
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    n_processes: int,
    lost: Callable[[Piece, str], Result],
) -> Iterator[Result]:
    """`work` of every piece, in the order in which they are done.

    `work` must be a module's function and catch what it raises. When a process ends without an answer (killed, out of
    memory, a crash in a library), those pieces that were at work are tried once more, each alone, and `lost` answers
    for the one that ends its process again. Processes end with this one, however it ends.
    """
    rest = list(reversed(pieces))
    suspects: list[Piece] = []
    while rest or suspects:
        if suspects:
            yield _alone(work, suspects.pop(), lost)
            continue
        unfinished: list[Piece] = []
        yield from _round(work, rest, n_processes, unfinished)
        suspects.extend(unfinished)


def _round(
    work: Callable[[Piece], Result], rest: list[Piece], n_processes: int, unfinished: list[Piece]
) -> Iterator[Result]:
    """Answers until a share of the rest is done or a process is lost; then `unfinished` gets what was handed out."""
    n_left = PIECES_EACH * n_processes
    pool = _pool(min(n_processes, len(rest)))
    running: dict[Future[Result], Piece] = {}
    ended = False
    try:
        while rest and n_left or running:
            while rest and n_left and len(running) < AHEAD * n_processes:
                piece, n_left = rest.pop(), n_left - 1
                try:
                    running[pool.submit(work, piece)] = piece
                except BrokenProcessPool:
                    unfinished.append(piece)
                    break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = bool(unfinished)
            for future in done:
                piece = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    unfinished.append(piece)
                    broken = True
            if broken:
                unfinished.extend(running.values())
                break
        ended = True
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not ended:  # interrupted: nobody waits for what is at work
            for child in multiprocessing.active_children():
                child.kill()


def _alone(work: Callable[[Piece], Result], piece: Piece, lost: Callable[[Piece, str], Result]) -> Result:
    """One piece in a process of its own."""
    pool = _pool(1)
    try:
        return pool.submit(work, piece).result()
    except BrokenProcessPool:
        return lost(piece, "the process that read it was killed or ended by a library: out of memory, or a crash")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(n_processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        n_processes,
        mp_context=multiprocessing.get_context("spawn"),  # no state of ours, no thread of ours in them
        initializer=_begin,
        initargs=(os.getpid(),),
    )


def _begin(parent: int) -> None:
    """In each process: interrupts are the parent's affair, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
