-- id, worker, lease ms, events
-- -> ok, id, attempt, spec, desired, tenant | none, ms until its lease ends or -1 (it is paused) | over, state | missing | damaged
--@include claiming

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
