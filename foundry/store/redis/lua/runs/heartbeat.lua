-- id, attempt, lease ms, state, waiting_for, events -> ok, desired | fenced, attempt, state | missing
--@include runs

local id = ARGV[1]
local refused = fence(id, ARGV[2])
if refused then return refused end
call('ZADD', 'foundry:runs:leases', ms(now_ms() + tonumber(ARGV[3])), id)
local before = call('HMGET', run_key(id), 'state', 'waiting_for')
call('HSET', run_key(id), 'state', ARGV[4], 'waiting_for', ARGV[5])
if before[1] ~= ARGV[4] or before[2] ~= ARGV[5] then tell_state(id, ARGV[4], ARGV[6]) end
return {'ok', call('HGET', run_key(id), 'desired') or ''}
