-- id, spec, name, tenant, events -> ok
--@include runs

local id, now = ARGV[1], ms(now_ms())
if call('EXISTS', run_key(id)) == 1 then return {'ok'} end
call('HSET', run_key(id), 'spec', ARGV[2], 'name', ARGV[3], 'attempt', '0', 'desired', '', 'created', now)
list(id, ARGV[4], now)
enqueue(id, ARGV[5])
return {'ok'}
