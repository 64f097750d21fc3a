"""Ask a daemon's health and say it by exit status, as container engines want it.

    python -m chassis.probe 127.0.0.1:50051 [SERVICE]

Exits with 0 where it is SERVING, else with 1 and one line that says why.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def probe(address: str, service: str = "") -> str:
    """The health of a daemon, or of one of its services: SERVING, or what else it is."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # Its types know no methods.
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> None:
    """The command line."""
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m chassis.probe ADDRESS [SERVICE]")
    found = probe(*sys.argv[1:])
    if found != "SERVING":
        sys.exit(f"{sys.argv[1]}: {found}")


if __name__ == "__main__":
    main()
