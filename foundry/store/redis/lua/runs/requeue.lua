-- id, attempt, events -> ok | cancel: nothing is done, nobody would take it up | fenced, attempt, state | missing
--@include runs

local refused = fence(ARGV[1], ARGV[2])
if refused then return refused end
local desired = call('HGET', run_key(ARGV[1]), 'desired')
if desired == 'cancel' then return {'cancel'} end
call('ZREM', 'foundry:runs:leases', ARGV[1])
if desired == 'pause' then pause(ARGV[1], ARGV[3]) else enqueue(ARGV[1], ARGV[3]) end
return {'ok'}
