"""What Redis holds. Every key is `foundry:<kind>`, or `foundry:<kind>:<id>`; the Lua scripts spell them likewise.

Cartridges:

    names                   set     cartridge names
    name:<name>             hash    counter, limit, latest, owner_run, owner_attempt, released, held_until (ms;
                                    '' for ever)
    versions:<name>         hash    version -> "<digest> <manifest JSON>"
    durable:<name>          set     versions whose manifest is in object storage
    damaged:<name>          set     durable versions that could not be read when pointers were restored: nothing passes
                                    over them, somebody is to decide
    steps:<name>            hash    "<run> <step>" -> "<version> <digest>"
    pending:<name>          hash    reserved version -> "<run> <attempt> <step> <digest> <durable 0|1>"
    tags:<name>             hash    tag -> version
    tag-history:<name>      hash    tag -> "<when it was moved, ms> <versions that it meant before, newest first>"
    hot:<name>              zset    versions whose bytes are in Redis
    refs:<digest>           set     "<name>@<version>" that keep the hot bytes
    leases:<digest>         zset    holder -> expiry in ms
    bytes:<digest>          string  JSON {header, chunks}
    bytes:<digest>:<i>      string  chunk i: the next at most 2 MiB of a layer, layers in order
    staged:<token>:<i>      string  the same of an upload that no commit has taken yet
    events                  stream  published versions
    reserving               set     names that have reservations, or had
    condemned:<digest>      string  a mark: stands while the blob is deleted as garbage; no leases, no reservations

Runs:

    runs                    zset    run id -> created, ms
    tenant-runs:<tenant>    zset    those of a tenant, ""'s too
    open-runs               hash    run id -> tenant, of runs that are not over
    runs:queue              zset    run id -> queued, ms
    runs:leases             zset    run id -> when its worker is given up, ms
    runs:bell               list    wakes waiting workers; what is in it means nothing
    run:<id>                hash    spec, name, tenant, state, attempt, worker, desired, waiting_for, error, result,
                                    last_event, times in ms; for a day after it was deleted: deleted, attempt
    run-events:<id>         stream  what happened, as JSON in `event`

Of gateways:

    limits:<counter>        string  what a caller used, by the library `limits`, in this minute or the one before

And `epoch`, string: the run id of the server for which all this was last restored; "<run id> <token>" while a rebuild
restores it.
"""

from __future__ import annotations


def key(kind: str, *ids: str | int) -> str:
    return ":".join(("foundry", kind, *map(str, ids)))
