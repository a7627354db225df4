-- Runs before the pointers are restored.
-- token, id, spec, name, tenant, created ms, attempt, desired, lease ms, state or '', error, result, finished ms
-- -> ok | over
--@include runs
--@include restoring

local _, id, spec, name, tenant, created, attempt, desired, lease, final, error, result, finished = unpack(ARGV)
local run = run_key(id)
local known = call('HMGET', run, 'attempt', 'state')
if (number(known[1]) or 0) > tonumber(attempt) then attempt = known[1] end
call('HSET', run, 'spec', spec, 'name', name, 'created', created, 'attempt', attempt, 'desired', desired)
list(id, tenant, created)
local pointer = 'foundry:name:' .. name
local owner = call('HMGET', pointer, 'owner_run', 'owner_attempt')
if final ~= '' then
  call('HSET', run, 'state', final, 'error', error, 'result', result, 'finished', finished)
  call('ZREM', 'foundry:runs:leases', id)
  call('ZREM', 'foundry:runs:queue', id)
  call('HDEL', 'foundry:open-runs', id)
  if owner[1] == id then call('HSET', pointer, 'released', '1') end
elseif over[known[2]] then
  return {'ok'}
elseif tonumber(attempt) > 0 then
  -- Its worker may be alive and keeps it by the next heartbeat; if not, the lease ends and another takes it.
  call('HSET', run, 'state', 'running')
  call('ZREM', 'foundry:runs:queue', id)
  call('ZADD', 'foundry:runs:leases', ms(now_ms() + tonumber(lease)), id)
  if not owner[1] or (owner[1] == id and (number(owner[2]) or 0) < tonumber(attempt)) then
    call('HSET', pointer, 'owner_run', id, 'owner_attempt', attempt, 'released', '0')
  end
elseif desired == 'pause' then
  call('HSET', run, 'state', 'paused')
  call('ZREM', 'foundry:runs:queue', id)
else
  call('HSET', run, 'state', 'queued')
  call('ZADD', 'foundry:runs:queue', 'NX', created, id)
  ring()
end
if final == '' then call('HSET', 'foundry:open-runs', id, tenant) end
return {'ok'}
