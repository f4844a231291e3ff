"""Ranks as threads of this process: what mpiexec does, without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class ThreadComm:
    """The part of an mpi4py communicator that fastbn uses, between threads."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.calls = 0

    def Get_size(self) -> int:
        return self.world.size

    def Get_rank(self) -> int:
        return self.rank

    def Allgather(self, sendbuf: np.ndarray, recvbuf: np.ndarray) -> None:
        assert recvbuf.shape == (self.world.size, *sendbuf.shape)
        assert recvbuf.dtype == sendbuf.dtype == np.float64
        self.calls += 1
        recvbuf[...] = self.world.exchange(self.rank, sendbuf)

    def gather_rows(self, row: np.ndarray) -> np.ndarray:
        rows = np.empty((self.world.size, row.size))
        self.Allgather(row, rows)
        return rows


class World:
    """A barrier and a place for what every rank sends."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.sent: list[Any] = [None] * size

    def exchange(self, rank: int, value: np.ndarray) -> np.ndarray:
        self.sent[rank] = value.copy()
        self.barrier.wait(timeout=30)
        rows = np.stack(self.sent)
        self.barrier.wait(timeout=30)
        return rows


def run_comms(function: Callable[[ThreadComm, int], Any], size: int) -> list[Any]:
    """What function(comm, rank) returns on every rank; an error of any rank is raised here."""
    world = World(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(world, rank), rank)
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def run_ranks(function: Callable[[Callable[[np.ndarray], np.ndarray], int], Any], size: int) -> list[Any]:
    """The same, for functions that take a gather function."""
    return run_comms(lambda comm, rank: function(comm.gather_rows, rank), size)
