-- id, spec, name, events -> ok
--@include runs

local id, now = ARGV[1], ms(now_ms())
if call('EXISTS', run_key(id)) == 1 then return {'ok'} end
call('HSET', run_key(id), 'spec', ARGV[2], 'name', ARGV[3], 'attempt', '0', 'desired', '', 'created', now)
call('ZADD', 'foundry:runs', now, id)
enqueue(id, ARGV[4])
return {'ok'}
