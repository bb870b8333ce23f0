"""tokenloom policy show and apply."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from tokenloom.router.v1 import admin_pb2

from services.common import config
from services.common.policy import Policy, policy_from, policy_json
from services.mesh.edge_client import ask_router, door_of

__all__ = ["apply", "show"]


def show(arguments: Namespace) -> int:
    """Shows the routing policy in force."""
    answer = ask_router(door_of(arguments), "GetPolicy", admin_pb2.GetPolicyRequest())
    print(answer.policy_json)
    sys.stderr.write(f"version {answer.version}\n")
    return 0


def apply(arguments: Namespace) -> int:
    """Puts a routing policy in force: the `routing` of a mesh.yaml, or a file with nothing else in it."""
    policy = _read(arguments.file)
    request = admin_pb2.SetPolicyRequest(policy_json=policy_json(policy))
    answer = ask_router(door_of(arguments), "SetPolicy", request)
    print(f"the policy of {arguments.file} is in force, as version {answer.version}")
    return 0


def _read(path: Path) -> Policy:
    raw: Any = config.read(path)
    where = str(path)
    if isinstance(raw, dict) and "routing" in raw:
        raw, where = raw["routing"], f"{path}: routing"
    return policy_from(raw, where=where)
