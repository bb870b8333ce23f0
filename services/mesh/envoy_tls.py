"""TLS at the edge: which certificate it shows, and whose it wants to see."""

from dataclasses import dataclass
from typing import Any

from services.mesh.envoy_types import any_of

__all__ = ["EdgeTls", "transport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeTls:
    """Files in PEM form, as the edge's process finds them."""

    certificate: str
    """Its own certificate, and those between it and its root."""
    key: str
    client_ca: str | None = None
    """The roots of clients' certificates, which each has to show; None: clients need none."""
    minimum: str = "1.2"
    """The least version of TLS."""


def transport(tls: EdgeTls) -> dict[str, Any]:
    """The transport socket of a listener's filter chain."""
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": any_of(
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            common_tls_context={
                "tls_params": {"tls_minimum_protocol_version": f"TLSv{tls.minimum.replace('.', '_')}"},
                "tls_certificates": [
                    {"certificate_chain": {"filename": tls.certificate}, "private_key": {"filename": tls.key}}
                ],
                "alpn_protocols": ["h2", "http/1.1"],
                **(
                    {} if tls.client_ca is None else {"validation_context": {"trusted_ca": {"filename": tls.client_ca}}}
                ),
            },
            require_client_certificate=tls.client_ca is not None,
        ),
    }
