"""tokenloom workers list, drain, undrain and cordon."""

from argparse import Namespace

from google.protobuf.json_format import MessageToJson
from tokenloom.router.v1 import admin_pb2

from services.mesh.edge_client import ask_router
from services.mesh.state import State

__all__ = ["cordon", "drain", "list_workers", "undrain"]


def list_workers(arguments: Namespace) -> int:
    """Lists the workers as the router sees them."""
    answer = ask_router(State(arguments.state_dir), "ListWorkers", admin_pb2.ListWorkersRequest())
    if arguments.json:
        print(MessageToJson(answer, preserving_proto_field_name=True))
        return 0
    rows = [("NAME", "POOL", "MODELS", "STATE", "LEASES", "RUNNING", "KV", "REPORT"), *map(_row, answer.workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def drain(arguments: Namespace) -> int:
    """Has a worker finish what it has and take nothing new."""
    request = admin_pb2.DrainWorkerRequest(worker_id=arguments.worker)
    ask_router(State(arguments.state_dir), "DrainWorker", request)
    print(f"{arguments.worker} is drained: it finishes what it has and gets nothing new")
    return 0


def undrain(arguments: Namespace) -> int:
    """Gives a worker that was drained or cordoned new work again."""
    request = admin_pb2.UndrainWorkerRequest(worker_id=arguments.worker)
    ask_router(State(arguments.state_dir), "UndrainWorker", request)
    print(f"{arguments.worker} gets work again")
    return 0


def cordon(arguments: Namespace) -> int:
    """Gives a worker no new work, without telling it."""
    request = admin_pb2.CordonWorkerRequest(worker_id=arguments.worker)
    ask_router(State(arguments.state_dir), "CordonWorker", request)
    print(f"{arguments.worker} is cordoned: it gets nothing new")
    return 0


def _row(worker: admin_pb2.Worker) -> tuple[str, ...]:
    said, load = worker.registration, worker.load
    models = ",".join(card.name for card in load.models or said.models)
    running = f"{load.running_count}/{said.max_running_count}"
    age = worker.report_age_duration.ToMilliseconds()
    state = worker.excluded_reason or "ready"
    kv = f"{100 * load.kv_usage_ratio:.0f} %"
    return said.worker_id, said.pool, models, state, str(worker.lease_count), running, kv, f"{age} ms ago"
