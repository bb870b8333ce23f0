"""The REST bridge, as the protos declare it: which path and verb is which method."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.api import annotations_pb2
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import admin_pb2
from tokenloom.telemetry.v1 import telemetry_pb2

__all__ = ["INFERENCE", "PUBLIC_SERVICES", "ROUTER_ADMIN", "TELEMETRY", "RestMethod", "descriptor_set", "rest_methods"]

INFERENCE: Final[ServiceDescriptor] = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
TELEMETRY: Final[ServiceDescriptor] = telemetry_pb2.DESCRIPTOR.services_by_name["TelemetryService"]
ROUTER_ADMIN: Final[ServiceDescriptor] = admin_pb2.DESCRIPTOR.services_by_name["RouterAdminService"]
PUBLIC_SERVICES: Final = (INFERENCE, TELEMETRY, ROUTER_ADMIN)
_VARIABLE: Final = re.compile(r"\{[a-z_]+\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestMethod:
    """One method of the bridge."""

    name: str
    """Of the rpc."""
    verb: str
    template: str
    """Its path, with `{name}` for one segment."""

    @property
    def has_variables(self) -> bool:
        """Whether the path is a pattern."""
        return _VARIABLE.search(self.template) is not None

    @property
    def pattern(self) -> str:
        """The path as a regular expression (RE2)."""
        literals = _VARIABLE.split(self.template)
        return "[^/]+".join(re.escape(literal) for literal in literals)


def rest_methods(service: ServiceDescriptor) -> Iterator[RestMethod]:
    """The methods of a service that have a REST form."""
    for method in service.methods:
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        verb = rule.WhichOneof("pattern")
        if verb is not None:
            yield RestMethod(name=method.name, verb=verb.upper(), template=getattr(rule, verb))


def descriptor_set() -> bytes:
    """What a transcoder has to know: the public services, and the details of an error, for those are JSON as well."""
    files: dict[str, FileDescriptor] = {}
    for root in (*(service.file for service in PUBLIC_SERVICES), error_details_pb2.DESCRIPTOR, status_pb2.DESCRIPTOR):
        _collect(root, files)
    found = FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(found.file.add())
    return found.SerializeToString(deterministic=True)


def _collect(file: FileDescriptor, files: dict[str, FileDescriptor]) -> None:
    # A file comes after what it imports.
    if file.name not in files:
        for imported in file.dependencies:
            _collect(imported, files)
        files[file.name] = file
