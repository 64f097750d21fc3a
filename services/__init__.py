"""The daemons, one folder each; none imports another."""

import os

# gRPC reads it when it is imported. Daemons start processes by exec alone, so its fork handlers
# have nothing to do but warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
