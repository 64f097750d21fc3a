-- Every switch of a mode; the latest of a service is the one that holds.
CREATE TABLE mode_changes (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service text NOT NULL,
    mode text NOT NULL CHECK (mode IN ('MOCK', 'REAL', 'HYBRID')),
    set_at timestamptz NOT NULL DEFAULT now(),
    set_by text NOT NULL
);
CREATE INDEX mode_changes_latest ON mode_changes (service, number DESC);

GRANT SELECT, INSERT ON mode_changes TO tollgate_router;
