"""Lua scripts over runs and their queue. Each is one atomic step; its reply starts with a status.

runs            zset    run id -> created, ms
runs:queue      zset    run id -> queued, ms
runs:leases     zset    run id -> when its worker is given up, ms
runs:bell       list    wakes waiting workers; what is in it means nothing
run:<id>        hash    spec, name, state, attempt, worker, desired, waiting_for, error, result, last_event, times in ms
run-events:<id> stream  what happened, as JSON in `event`
"""

_LIBRARY = """
local call = redis.call
local function run_key(id) return 'foundry:run:' .. id end
local function now_ms() local t = call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end
local function ms(value) return string.format('%d', value) end
local over = {succeeded = true, failed = true, cancelled = true}

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

-- The answer to whoever does not hold the run, or nil.
local function fence(id, attempt)
  local held = call('HMGET', run_key(id), 'attempt', 'state')
  if not held[1] then return {'missing'} end
  if held[1] ~= attempt or over[held[2]] or held[2] == 'queued' then return {'fenced', held[1], held[2]} end
  return nil
end
"""

# id, spec, name, events -> ok
ENQUEUE = (
    _LIBRARY
    + """
local id, now = ARGV[1], ms(now_ms())
if call('EXISTS', run_key(id)) == 1 then return {'ok'} end
call('HSET', run_key(id), 'spec', ARGV[2], 'name', ARGV[3], 'attempt', '0', 'desired', '', 'created', now)
call('ZADD', 'foundry:runs', now, id)
enqueue(id, ARGV[4])
return {'ok'}
"""
)

_CLAIMING = (
    _LIBRARY
    + """
-- The reply to the worker that holds the run from now on; nil if it is to pause, which it then does.
local function take(id, worker, lease_ms, length)
  local now, desired = now_ms(), call('HGET', run_key(id), 'desired')
  if desired == 'pause' then
    call('HSET', run_key(id), 'state', 'paused', 'worker', '', 'waiting_for', '')
    tell_state(id, 'paused', length)
    return nil
  end
  local attempt = ms(call('HINCRBY', run_key(id), 'attempt', 1))
  call('HSET', run_key(id), 'state', 'running', 'worker', worker, 'waiting_for', '')
  call('HSETNX', run_key(id), 'started', ms(now))
  call('ZADD', 'foundry:runs:leases', ms(now + tonumber(lease_ms)), id)
  tell_state(id, 'running', length)
  return {'ok', id, attempt, call('HGET', run_key(id), 'spec'), desired or ''}
end
"""
)

# worker, lease ms, events -> ok, id, attempt, spec, desired | none, ms until the next lease ends or -1
CLAIM = (
    _CLAIMING
    + """
while true do
  local now = now_ms()
  -- First what a dead worker left, so that work begun is not overtaken.
  local id = call('ZRANGEBYSCORE', 'foundry:runs:leases', '-inf', now, 'LIMIT', 0, 1)[1]
  if id then
    call('ZREM', 'foundry:runs:leases', id)
  else
    id = call('ZPOPMIN', 'foundry:runs:queue')[1]
  end
  if not id then
    local next = call('ZRANGE', 'foundry:runs:leases', 0, 0, 'WITHSCORES')[2]
    return {'none', next and ms(next - now) or '-1'}
  end
  local taken = take(id, ARGV[1], ARGV[2], ARGV[3])
  if taken then return taken end
end
"""
)

# id, worker, lease ms, events
# -> ok, id, attempt, spec, desired | none, ms until its lease ends or -1 (it is paused) | over, state | missing
CLAIM_RUN = (
    _CLAIMING
    + """
local id = ARGV[1]
local state = call('HGET', run_key(id), 'state')
if not state then return {'missing'} end
if over[state] then return {'over', state} end
local left = (call('ZSCORE', 'foundry:runs:leases', id) or 0) - now_ms()
if left > 0 then return {'none', ms(left)} end
local unheld = call('ZREM', 'foundry:runs:leases', id) + call('ZREM', 'foundry:runs:queue', id)
-- What is paused and in neither was told so already.
if unheld == 0 and call('HGET', run_key(id), 'desired') == 'pause' then return {'none', '-1'} end
return take(id, ARGV[2], ARGV[3], ARGV[4]) or {'none', '-1'}
"""
)

# -> ok, ids that a worker holds, ids that wait for one. Those that are paused meanwhile are in neither.
ACTIVE = (
    _LIBRARY
    + """
local now = now_ms()
local held = call('ZRANGEBYSCORE', 'foundry:runs:leases', '(' .. ms(now), '+inf')
local left = call('ZRANGEBYSCORE', 'foundry:runs:leases', '-inf', ms(now))
for _, id in ipairs(call('ZRANGE', 'foundry:runs:queue', 0, -1)) do table.insert(left, id) end
return {'ok', held, left}
"""
)

# id, waiting_for, events -> ok. Only a run in the queue: of a held one its worker says what it waits for.
EXPLAIN_QUEUED = (
    _LIBRARY
    + """
local id = ARGV[1]
local before = call('HMGET', run_key(id), 'state', 'waiting_for')
if before[1] == 'queued' and before[2] ~= ARGV[2] then
  call('HSET', run_key(id), 'waiting_for', ARGV[2])
  tell_state(id, 'queued', ARGV[3])
end
return {'ok'}
"""
)

# id, attempt, lease ms, state, waiting_for, events -> ok, desired | fenced, attempt, state | missing
HEARTBEAT = (
    _LIBRARY
    + """
local id = ARGV[1]
local refused = fence(id, ARGV[2])
if refused then return refused end
call('ZADD', 'foundry:runs:leases', ms(now_ms() + tonumber(ARGV[3])), id)
local before = call('HMGET', run_key(id), 'state', 'waiting_for')
call('HSET', run_key(id), 'state', ARGV[4], 'waiting_for', ARGV[5])
if before[1] ~= ARGV[4] or before[2] ~= ARGV[5] then tell_state(id, ARGV[4], ARGV[6]) end
return {'ok', call('HGET', run_key(id), 'desired') or ''}
"""
)

# id, attempt -> ok | fenced | missing
CHECK = _LIBRARY + "return fence(ARGV[1], ARGV[2]) or {'ok'}\n"

# id, attempt, event, events -> ok, event id | fenced | missing
REPORT = (
    _LIBRARY
    + """
local refused = fence(ARGV[1], ARGV[2])
if refused then return refused end
call('HSET', run_key(ARGV[1]), 'last_event', ARGV[3])
return {'ok', tell(ARGV[1], ARGV[3], ARGV[4])}
"""
)

# id, attempt, events -> ok | cancel: nothing is done, nobody would take it up | fenced | missing
REQUEUE = (
    _LIBRARY
    + """
local refused = fence(ARGV[1], ARGV[2])
if refused then return refused end
if call('HGET', run_key(ARGV[1]), 'desired') == 'cancel' then return {'cancel'} end
call('ZREM', 'foundry:runs:leases', ARGV[1])
enqueue(ARGV[1], ARGV[3])
return {'ok'}
"""
)

# id, attempt, state, error, result, terminal event, events -> ok | fenced | missing
FINISH = (
    _LIBRARY
    + """
local id, attempt, state = ARGV[1], ARGV[2], ARGV[3]
local held = call('HMGET', run_key(id), 'attempt', 'state', 'name')
-- The reply to the first call may have been lost, or the durable record not written.
if held[1] == attempt and held[2] == state then return {'ok'} end
local refused = fence(id, attempt)
if refused then return refused end
call('HSET', run_key(id), 'state', state, 'error', ARGV[4], 'result', ARGV[5], 'worker', '', 'desired', '',
     'waiting_for', '', 'finished', ms(now_ms()))
call('ZREM', 'foundry:runs:leases', id)
tell(id, ARGV[6], ARGV[7])
-- Followers have a day; after that the archive answers.
call('EXPIRE', 'foundry:run-events:' .. id, 86400)
local pointer = 'foundry:name:' .. held[3]
if call('HGET', pointer, 'owner_run') == id then call('HSET', pointer, 'released', '1') end
return {'ok'}
"""
)

# id, desired (pause | resume | cancel), events -> ok | unheld, attempt | over, state | conflict | missing
REQUEST = (
    _LIBRARY
    + """
local id, wish = ARGV[1], ARGV[2]
local state, desired = unpack(call('HMGET', run_key(id), 'state', 'desired'))
if not state then return {'missing'} end
if over[state] then return {'over', state} end
if desired == 'cancel' and wish ~= 'cancel' then return {'conflict'} end
local held = call('ZSCORE', 'foundry:runs:leases', id)
call('HSET', run_key(id), 'desired', wish == 'resume' and '' or wish)
if held then return {'ok'} end
if wish == 'pause' and state == 'queued' then
  call('ZREM', 'foundry:runs:queue', id)
  call('HSET', run_key(id), 'state', 'paused')
  tell_state(id, 'paused', ARGV[3])
elseif wish == 'resume' and state == 'paused' then
  enqueue(id, ARGV[3])
elseif wish == 'cancel' then
  -- Nobody works on it: the caller becomes its holder for long enough to end it.
  call('ZREM', 'foundry:runs:queue', id)
  call('HSET', run_key(id), 'state', 'running')
  call('ZADD', 'foundry:runs:leases', ms(now_ms() + 30000), id)
  return {'unheld', ms(call('HINCRBY', run_key(id), 'attempt', 1))}
end
return {'ok'}
"""
)

# server run, id, spec, name, created ms, attempt, desired, lease ms, state or '', error, result, finished ms
# -> ok | over: another restored it, or another server is there now
RESTORE = (
    _LIBRARY
    + """
if restored or server_run ~= ARGV[1] then return {'over'} end
local _, id, spec, name, created, attempt, desired, lease, final, error, result, finished = unpack(ARGV)
local run = run_key(id)
local known = call('HMGET', run, 'attempt', 'state')
if tonumber(known[1] or 0) > tonumber(attempt) then attempt = known[1] end
call('HSET', run, 'spec', spec, 'name', name, 'created', created, 'attempt', attempt, 'desired', desired)
call('ZADD', 'foundry:runs', created, id)
local pointer = 'foundry:name:' .. name
local owner = call('HMGET', pointer, 'owner_run', 'owner_attempt')
if final ~= '' then
  call('HSET', run, 'state', final, 'error', error, 'result', result, 'finished', finished)
  call('ZREM', 'foundry:runs:leases', id)
  call('ZREM', 'foundry:runs:queue', id)
  if owner[1] == id then call('HSET', pointer, 'released', '1') end
elseif over[known[2]] then
  return {'ok'}
elseif tonumber(attempt) > 0 then
  -- Its worker may be alive and keeps it by the next heartbeat; if not, the lease ends and another takes it.
  call('HSET', run, 'state', 'running')
  call('ZREM', 'foundry:runs:queue', id)
  call('ZADD', 'foundry:runs:leases', ms(now_ms() + tonumber(lease)), id)
  if not owner[1] or (owner[1] == id and tonumber(owner[2]) < tonumber(attempt)) then
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
return {'ok'}
"""
)
