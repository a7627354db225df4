-- id, attempt, state, error, result, terminal event, events -> ok | fenced, attempt, state | missing
--@include runs

local id, attempt, state = ARGV[1], ARGV[2], ARGV[3]
local held = call('HMGET', run_key(id), 'attempt', 'state', 'name')
-- The reply to the first call may have been lost, or the durable record not written.
if held[1] == attempt and held[2] == state then return {'ok'} end
local refused = fence(id, attempt)
if refused then return refused end
call('HSET', run_key(id), 'state', state, 'error', ARGV[4], 'result', ARGV[5], 'worker', '', 'desired', '',
     'waiting_for', '', 'finished', ms(now_ms()))
call('ZREM', 'foundry:runs:leases', id)
call('HDEL', 'foundry:open-runs', id)
tell(id, ARGV[6], ARGV[7])
-- Followers have a day; after that the archive answers.
call('EXPIRE', 'foundry:run-events:' .. id, 86400)
local pointer = 'foundry:name:' .. held[3]
if call('HGET', pointer, 'owner_run') == id then call('HSET', pointer, 'released', '1') end
return {'ok'}
