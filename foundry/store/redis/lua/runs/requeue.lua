-- id, attempt, events -> ok | cancel: nothing is done, nobody would take it up | fenced, attempt, state | missing
--@include runs

local refused = fence(ARGV[1], ARGV[2])
if refused then return refused end
if call('HGET', run_key(ARGV[1]), 'desired') == 'cancel' then return {'cancel'} end
call('ZREM', 'foundry:runs:leases', ARGV[1])
enqueue(ARGV[1], ARGV[3])
return {'ok'}
