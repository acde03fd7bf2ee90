"""Independent tasks over processes of one machine or over a Ray cluster, each with one thread.

One thread per process makes the numbers of a task the same wherever it runs and however many run beside it: sums of
several threads are rounded in another order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from qdexport.core.children import safe_path
from qdexport.core.processes import die_with_parent
from qdexport.errors import MissingDependencyError, QdExportError

__all__ = ["Job", "Workers", "map_tasks", "one_thread", "usual_workers"]

logger = logging.getLogger(__name__)

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Where tasks run.

    Attributes:
        count: processes on this machine; 1 works in the calling process. On Ray the most tasks at once, where 1
            stands for as many as the cluster has cores.
        ray: address of a Ray cluster (``auto``, ``host:6379``; ``local`` starts one on this machine), or None. Its
            machines need this package and the model at the same path.
    """

    count: int = 1
    ray: str | None = None


def usual_workers(count: int | None, ray: str | None) -> Workers:
    """What a user asked for, or one process per core; on Ray as many tasks as the cluster has cores."""
    return Workers(count=count or (1 if ray else os.cpu_count() or 1), ray=ray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[State, Task, Result]):
    """What workers do; both functions must be importable (top level of a module, or ``functools.partial`` of such).

    Attributes:
        prepare: called once per worker, loads what all tasks need.
        run: called per task with what ``prepare`` returned.
    """

    prepare: Callable[[], State]
    run: Callable[[State, Task], Result]


def map_tasks(job: Job[State, Task, Result], tasks: Sequence[Task], workers: Workers) -> Iterator[tuple[int, Result]]:
    """Runs tasks and yields ``(index, result)`` as they are finished, in any order.

    With several processes the caller's main module must be importable without side effects
    (``if __name__ == "__main__":``), as always with the start method ``spawn``.

    Args:
        job: what is done.
        tasks: picklable values.
        workers: where.

    Raises:
        MissingDependencyError: a Ray cluster is asked for, and Ray is not installed or does not answer.
        QdExportError: a worker process was killed.
    """
    if not tasks:
        return
    if workers.ray is not None:
        yield from _on_ray(job, tasks, workers)
    elif workers.count == 1 or len(tasks) == 1:
        with one_thread():
            state = job.prepare()
            for index, task in enumerate(tasks):
                yield index, job.run(state, task)
    else:
        yield from _in_processes(job, tasks, workers.count)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets PyTorch compute with one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_processes(job: Job[State, Task, Result], tasks: Sequence[Task], count: int) -> Iterator[tuple[int, Result]]:
    with safe_path():  # all processes start now, and one that watches their semaphores
        pool = concurrent.futures.ProcessPoolExecutor(
            max_workers=min(count, len(tasks)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(job,),
        )
        futures = {pool.submit(_work, task): index for index, task in enumerate(tasks)}
    try:
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise QdExportError(
            f"a worker process died ({error}); most often memory was short: use fewer workers. "
            "What was finished is kept, the same command continues there"
        ) from error
    except BaseException:  # an interrupt, or a task that failed: what the others compute is not wanted any more
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """The state of a worker process."""

    job: Job[Any, Any, Any] | None = None
    state: Any = None
    prepared = False


def _start(job: Job[Any, Any, Any]) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    _Worker.job = job


def _work(task: Any) -> Any:
    if _Worker.job is None:
        raise RuntimeError("the worker was not started")
    # not in the initializer: an error there would reach the caller as a dead worker without its message
    if not _Worker.prepared:
        _Worker.state, _Worker.prepared = _Worker.job.prepare(), True
    return _Worker.job.run(_Worker.state, task)


def _on_ray(job: Job[State, Task, Result], tasks: Sequence[Task], workers: Workers) -> Iterator[tuple[int, Result]]:
    ray = _connected(workers.ray or "auto")
    try:
        actor = ray.remote(_RayWorker)
        shared = ray.put(job)
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = min(workers.count if workers.count > 1 else max(cores, 1), len(tasks))
        idle = [actor.options(num_cpus=1).remote(shared) for _ in range(count)]
        logger.info("%d tasks on %d workers of the Ray cluster", len(tasks), count)
        waiting, running = list(enumerate(tasks)), dict[Any, tuple[int, Any]]()
        while waiting or running:
            while waiting and idle:
                index, task = waiting.pop(0)
                worker = idle.pop()
                running[worker.run.remote(task)] = (index, worker)
            (done,), _ = ray.wait(list(running), num_returns=1)
            index, worker = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise QdExportError(
                    f"a worker of the Ray cluster died ({error}); what was finished is kept, run it again"
                ) from error
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            idle.append(worker)
            yield index, result
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """Ray, connected to a cluster."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"the package ray cannot be imported ({error}): pip install 'qdexport[ray]', or leave --ray out"
        ) from error
    try:
        ray.init(
            address=address,  # "local" starts a cluster; None would first look for one, and wait for one that is gone
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MissingDependencyError(
            f"no Ray cluster can be used at {address!r} ({error}); start one with `ray start --head` (one with tokens "
            "wants RAY_AUTH_TOKEN), or use --ray local"
        ) from error
    return ray


class _RayWorker:
    """A process of a Ray cluster; the job comes through the cluster's store once per machine."""

    def __init__(self, job: Job[Any, Any, Any]) -> None:
        _start(job)

    def run(self, task: Any) -> Any:
        return _work(task)
