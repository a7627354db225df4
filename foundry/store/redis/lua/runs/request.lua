-- id, desired (pause | resume | cancel), events -> ok | unheld, attempt | over, state | conflict | missing
--@include runs

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
  pause(id, ARGV[3])
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
