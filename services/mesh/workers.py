"""tokenloom workers: list them, take them out of service and back, put them to sleep, give them other weights."""

from argparse import Namespace

from google.protobuf.json_format import MessageToJson
from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import admin_pb2

from services.mesh.edge_client import ask_router, door_of
from services.mesh.rolling import roll
from services.mesh.table import print_table

__all__ = ["cordon", "drain", "list_workers", "reload", "sleep", "undrain", "wake"]


def list_workers(arguments: Namespace) -> int:
    """Lists the workers as the router sees them, and why some are slow."""
    answer = ask_router(door_of(arguments), "ListWorkers", admin_pb2.ListWorkersRequest())
    if arguments.json:
        print(MessageToJson(answer, preserving_proto_field_name=True))
        return 0
    heads = ("NAME", "POOL", "MODELS", "STATE", "LEASES", "RUNNING", "KV", "REPORT")
    print_table([heads, *map(_row, answer.workers)])
    for worker in answer.workers:
        for reason in worker.slow_reasons:
            print(f"{worker.registration.worker_id} is slow: {reason}")
    return 0


def drain(arguments: Namespace) -> int:
    """Has a worker finish what it has and take nothing new."""
    request = admin_pb2.DrainWorkerRequest(worker_id=arguments.worker)
    ask_router(door_of(arguments), "DrainWorker", request)
    print(f"{arguments.worker} is drained: it finishes what it has and gets nothing new")
    return 0


def undrain(arguments: Namespace) -> int:
    """Gives a worker that was drained or cordoned new work again."""
    request = admin_pb2.UndrainWorkerRequest(worker_id=arguments.worker)
    ask_router(door_of(arguments), "UndrainWorker", request)
    print(f"{arguments.worker} gets work again")
    return 0


def cordon(arguments: Namespace) -> int:
    """Gives a worker no new work, without telling it."""
    request = admin_pb2.CordonWorkerRequest(worker_id=arguments.worker)
    ask_router(door_of(arguments), "CordonWorker", request)
    print(f"{arguments.worker} is cordoned: it gets nothing new")
    return 0


def sleep(arguments: Namespace) -> int:
    """Has workers give their GPUs' memory back, in turn."""
    return roll(arguments, "sleeps", sleep=worker_pb2.SleepRequest(level=arguments.level))


def wake(arguments: Namespace) -> int:
    """Has workers take their GPUs' memory again, in turn."""
    return roll(arguments, "is awake", wake=worker_pb2.WakeRequest())


def reload(arguments: Namespace) -> int:
    """Has workers replace their weights, in turn, so that the others serve meanwhile."""
    return roll(arguments, "has other weights", reload_weights=worker_pb2.ReloadWeightsRequest(path=arguments.path))


def _row(worker: admin_pb2.Worker) -> tuple[str, ...]:
    said, load = worker.registration, worker.load
    models = ",".join(card.name for card in load.models or said.models)
    running = f"{load.running_count}/{said.max_running_count}"
    age = worker.report_age_duration.ToMilliseconds()
    state = worker.excluded_reason or "ready"
    kv = f"{100 * load.kv_usage_ratio:.0f} %"
    return said.worker_id, said.pool, models, state, str(worker.lease_count), running, kv, f"{age} ms ago"
