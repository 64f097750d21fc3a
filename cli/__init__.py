"""The `tollgate` command: the mesh on one machine, and a client of any mesh anywhere.

`up` and `demo` supervise daemons as processes of their own (`supervisor`, `database`). All other
commands are plain clients of the router (`tollgate-tenant` or an API key) and, for the ledger, of
the cost daemon (an identity signed with the mesh secret).

    main        the list of commands, and how a command ends
    command     the options that all commands share; exit codes
    terminal    what people see, and what programs see with --json
    caller      a daemon as a client sees it
    money, waterfall, traces, ports    pure parts: amounts, drawing, trace files, addresses

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 the daemon cannot be reached, 130 interrupted.
"""
