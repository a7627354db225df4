-- What scripts over runs and their queue share.
--@include base

local function run_key(id) return key('run', id) end
local function ms(value) return string.format('%d', value) end
local over = {succeeded = true, failed = true, cancelled = true}

-- From now on it is seen.
local function list(id, tenant, created)
  call('HSET', run_key(id), 'tenant', tenant)
  call('ZADD', 'foundry:runs', created, id)
  call('ZADD', 'foundry:tenant-runs:' .. tenant, created, id)
end

-- Runs of a tenant that are not over. Those of a tenant are few: there is a limit.
local function num_open(tenant)
  local count = 0
  for _, each in ipairs(call('HVALS', 'foundry:open-runs')) do
    if each == tenant then count = count + 1 end
  end
  return count
end

local function tell(id, event, length)
  return call('XADD', 'foundry:run-events:' .. id, 'MAXLEN', '~', length, '*', 'event', event)
end

local function tell_state(id, state, length)
  local attempt, waiting = unpack(call('HMGET', run_key(id), 'attempt', 'waiting_for'))
  local event = {type = 'state', state = state, attempt = tonumber(attempt or 0), waiting_for = waiting or ''}
  tell(id, cjson.encode(event), length)
end

local function ring()
  call('RPUSH', 'foundry:runs:bell', '1')
  -- Tokens that nobody waits for must not pile up.
  call('LTRIM', 'foundry:runs:bell', 0, 63)
end

local function enqueue(id, length)
  call('HSET', run_key(id), 'state', 'queued', 'worker', '', 'waiting_for', '')
  call('ZADD', 'foundry:runs:queue', ms(now_ms()), id)
  tell_state(id, 'queued', length)
  ring()
end

-- Out of the queue, until it is resumed.
local function pause(id, length)
  call('HSET', run_key(id), 'state', 'paused', 'worker', '', 'waiting_for', '')
  tell_state(id, 'paused', length)
end

-- Forget a run. What is left for a day keeps a worker that slept through all this from taking up the name: no attempt of
-- its is that high.
local function drop(id)
  local tenant = call('HGET', run_key(id), 'tenant') or ''
  for _, listed in ipairs({'runs', 'tenant-runs:' .. tenant, 'runs:queue', 'runs:leases'}) do
    call('ZREM', 'foundry:' .. listed, id)
  end
  call('UNLINK', run_key(id), 'foundry:run-events:' .. id)
  call('HSET', run_key(id), 'deleted', '1', 'attempt', '9007199254740991')
  call('EXPIRE', run_key(id), 86400)
end

-- The answer to whoever does not hold the run, or nil.
local function fence(id, attempt)
  local held = call('HMGET', run_key(id), 'attempt', 'state')
  if not held[1] or not held[2] then return {'missing'} end
  if held[1] ~= attempt or over[held[2]] or held[2] == 'queued' or held[2] == 'paused' then return {'fenced', held[1], held[2]} end
  return nil
end
