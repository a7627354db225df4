-- id, spec, name, tenant, events, most runs of the tenant that may be open or '' -> ok | full, as many as are
--@include runs

local id, tenant, most, now = ARGV[1], ARGV[4], tonumber(ARGV[6]), ms(now_ms())
if call('EXISTS', run_key(id)) == 1 then return {'ok'} end
local open = most and num_open(tenant)
if most and open >= most then return {'full', open} end
call('HSET', run_key(id), 'spec', ARGV[2], 'name', ARGV[3], 'attempt', '0', 'desired', '', 'created', now)
list(id, tenant, now)
call('HSET', 'foundry:open-runs', id, tenant)
enqueue(id, ARGV[5])
return {'ok'}
