-- name, version -> ok | missing | conflict, why
--@include pointers

local name, version = ARGV[1], ARGV[2]
local value = call('HGET', key('versions', name), version)
local damaged = call('SISMEMBER', key('damaged', name), version) == 1
if not value and not damaged then return {'missing'} end
if call('HGET', key('name', name), 'latest') == version then return {'conflict', 'latest'} end
local tag = tag_of(name, version)
if tag then return {'conflict', tag} end
if value then
  drop_hot(name, version, digest_of(value))
  forget_version(name, version, value)
end
if damaged then
  call('SREM', key('damaged', name), version)
  settle(name)
end
return {'ok'}
