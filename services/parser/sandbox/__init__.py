"""The sandbox: parsers of hostile bytes, each in a process of its own that can be thrown away.

`frames` is what parent and worker say to each other, `worker` is the process, `readers` what it
runs on documents, `pool` the parent's side: warm workers, deadlines, replacement.
"""
