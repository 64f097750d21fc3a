"""The gate on the wire: meters, the way of a call through the gate, and the operators' RPCs."""
