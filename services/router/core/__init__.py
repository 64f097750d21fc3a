"""The rules of the gate, pure: which backend serves a call, and what its hold is."""
