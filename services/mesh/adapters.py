"""tokenloom adapters: which LoRA adapters the workers serve, and others for them."""

import json
from argparse import Namespace

from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import admin_pb2

from services.mesh.edge_client import ask_router, door_of
from services.mesh.rolling import roll
from services.mesh.table import print_table

__all__ = ["list_adapters", "load", "unload"]


def list_adapters(arguments: Namespace) -> int:
    """Lists the adapters, with the model that each adapts and the workers that serve it."""
    workers = ask_router(door_of(arguments), "ListWorkers", admin_pb2.ListWorkersRequest()).workers
    served: dict[tuple[str, str], list[str]] = {}
    for worker in workers:
        for card in worker.load.models or worker.registration.models:
            if card.base_model:
                served.setdefault((card.name, card.base_model), []).append(worker.registration.worker_id)
    if arguments.json:
        rows = [{"name": name, "model": model, "workers": on} for (name, model), on in sorted(served.items())]
        print(json.dumps(rows, indent=2))
    else:
        rows_of_text = [(name, model, ",".join(on)) for (name, model), on in sorted(served.items())]
        print_table([("NAME", "MODEL", "WORKERS"), *rows_of_text])
    return 0


def load(arguments: Namespace) -> int:
    """Has workers serve an adapter, in turn."""
    request = worker_pb2.LoadAdapterRequest(name=arguments.name, path=arguments.path)
    return roll(arguments, f"serves {arguments.name}", load_adapter=request)


def unload(arguments: Namespace) -> int:
    """Has the workers that serve an adapter, or one of them, do so no more."""
    if arguments.worker is None:
        arguments.model = arguments.name
    request = worker_pb2.UnloadAdapterRequest(name=arguments.name)
    return roll(arguments, f"serves {arguments.name} no more", unload_adapter=request)
