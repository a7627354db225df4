-- -> ok, ids that a worker holds, ids that wait for one. Those that are paused meanwhile are in neither.
--@include runs

local now = now_ms()
local held = call('ZRANGEBYSCORE', 'foundry:runs:leases', '(' .. ms(now), '+inf')
local left = call('ZRANGEBYSCORE', 'foundry:runs:leases', '-inf', ms(now))
for _, id in ipairs(call('ZRANGE', 'foundry:runs:queue', 0, -1)) do table.insert(left, id) end
return {'ok', held, left}
