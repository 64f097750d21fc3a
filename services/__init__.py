"""The daemons, one folder each; none imports another."""
