-- name -> ok | missing | conflict, owner. Counter and limit stay: numbers are never used twice.
--@include pointers

local name = ARGV[1]
if call('SISMEMBER', 'foundry:names', name) == 0 then return {'missing'} end
local other = holder(name)
if other then return {'conflict', other} end
local all = call('HGETALL', key('versions', name))
for i = 1, #all, 2 do drop_hot(name, all[i], digest_of(all[i + 1])) end
for _, kind in ipairs({'versions', 'durable', 'steps', 'pending', 'tags', 'tag-history', 'hot', 'damaged'}) do
  call('DEL', key(kind, name))
end
call('HDEL', key('name', name), 'latest')
call('SREM', 'foundry:names', name)
return {'ok'}
