"""The `tollgate` command: the mesh on one machine, and a client of any mesh anywhere.

`up` and `demo` supervise daemons as processes of their own (`supervisor`). All other commands are
plain clients of the router (`tollgate-tenant` or an API key) and, for the ledger, of the cost
daemon (an identity signed with the mesh secret). Each is in the file of its name; `mode` is in
`backends`, `keys` and `token` are in `access`.

    main        the list of commands
    command     the options that all commands share, and how a command ends
    terminal    what people see, and what programs see with --json
    caller      a daemon as a client sees it
    intake      files on their way in: which, under which ids, each followed through its stages
    spans, waterfall, money, ports    trace files, their drawing, amounts, addresses

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 the daemon cannot be reached, 130 interrupted.
"""
