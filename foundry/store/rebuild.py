"""Restoring Redis from object storage after it was emptied, restarted or replaced.

Until the epoch is set, every script that reads or changes pointers refuses, so nothing moves underneath. Several
processes may restore at once: each step only brings Redis closer to what object storage says. What was read for one
server is never written to the next: much may have been published in between.
"""

from __future__ import annotations

import json

import structlog

from foundry.store.connection import Connection
from foundry.store.durable import Durable
from foundry.store.manifest import Manifest
from foundry.store.pointers import versions_value
from foundry.store.runs import RunStore

log = structlog.get_logger(__name__)

# Names, as far as Redis still knows them: an old snapshot may hold names that were deleted since.
_BEGIN = """
if restored then return {'restored'} end
return {'ok', server_run, redis.call('SMEMBERS', 'foundry:names')}
"""

# server run, name, limit, JSON {versions: {version: value}, steps: {"run step": "version digest"},
# tags: {tag: version}} -> ok | over: another restored it, or another server is there now
_RESTORE_NAME = """
if restored or server_run ~= ARGV[1] then return {'over'} end
local call = redis.call
local function key(kind) return 'foundry:' .. kind .. ':' .. ARGV[2] end
local truth = cjson.decode(ARGV[4])
local state = key('name')
for _, field in ipairs({'counter', 'limit'}) do
  if tonumber(call('HGET', state, field) or 0) < tonumber(ARGV[3]) then call('HSET', state, field, ARGV[3]) end
end
-- Whoever reserved before has to reserve again.
call('DEL', key('pending'), key('tags'))
for _, version in ipairs(call('SMEMBERS', key('durable'))) do
  if not truth.versions[version] then call('HDEL', key('versions'), version) end
end
call('DEL', key('durable'))
for version, value in pairs(truth.versions) do
  call('HSET', key('versions'), version, value)
  call('SADD', key('durable'), version)
end
for step, seen in pairs(truth.steps) do call('HSET', key('steps'), step, seen) end
for tag, version in pairs(truth.tags) do
  if truth.versions[version] then call('HSET', key('tags'), tag, version) end
end
local latest = 0
for _, version in ipairs(call('HKEYS', key('versions'))) do latest = math.max(latest, tonumber(version)) end
if latest > 0 then
  call('HSET', state, 'latest', string.format('%d', latest))
  call('SADD', 'foundry:names', ARGV[2])
else
  call('HDEL', state, 'latest')
  call('SREM', 'foundry:names', ARGV[2])
end
return {'ok'}
"""

# server run, name, JSON {tag: "<moved ms> <older versions>"}
_RESTORE_TAG_HISTORY = """
if restored or server_run ~= ARGV[1] then return {'over'} end
local histories = 'foundry:tag-history:' .. ARGV[2]
redis.call('DEL', histories)
for tag, history in pairs(cjson.decode(ARGV[3])) do redis.call('HSET', histories, tag, history) end
return {'ok'}
"""

# server run -> ok | over
_END = """
if server_run ~= ARGV[1] then return {'over'} end
redis.call('SET', 'foundry:epoch', server_run)
return {'ok'}
"""


async def rebuild(connection: Connection, durable: Durable, runs: RunStore) -> bool:
    """Restore pointers, counters, tags and unfinished runs. False if there was nothing to restore.

    Versions that were only hot are lost with Redis; their numbers are not used again. A durable version whose owner
    died between manifest and pointer is whole, and is visible from then on.
    Raises StoreUnavailable if Redis or the object storage can't be reached.
    """
    while (begin := await connection.run_restoring(_BEGIN))[0] != "restored":
        _, server_run, known = begin
        limits = await durable.limits()
        names = sorted({*known, *await durable.names(), *limits})
        for name in names:
            manifests = await durable.manifests(name)
            tags = await durable.tag_records(name)
            truth = _truth(manifests, {tag: record.version for tag, record in tags.items()})
            # A version above the limit can only come from a store that was copied by hand; its number is taken too.
            limit = max(limits.get(name, 0), max((manifest.version for manifest in manifests), default=0))
            await connection.run_restoring(_RESTORE_NAME, server_run, name, limit, truth)
            histories = {tag: " ".join(map(str, (record.moved_ms, *record.history))) for tag, record in tags.items()}
            await connection.run_restoring(_RESTORE_TAG_HISTORY, server_run, name, json.dumps(histories))
        num_runs = await runs.restore(server_run)
        if (await connection.run_restoring(_END, server_run))[0] == "ok":
            log.info("pointers_restored", num_names=len(names), num_unfinished_runs=num_runs)
            return True
    return False


def _truth(manifests: list[Manifest], tags: dict[str, int]) -> str:
    return json.dumps(
        {
            "versions": {str(manifest.version): versions_value(manifest) for manifest in manifests},
            "steps": {f"{each.run} {each.step}": f"{each.version} {each.digest}" for each in manifests},
            "tags": {tag: str(version) for tag, version in tags.items()},
        }
    )
