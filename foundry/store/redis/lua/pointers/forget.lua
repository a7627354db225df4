-- After a manifest was deleted or withdrawn: a rebuild meanwhile may have brought the version back.
-- name, version, dry 0|1: say what it would do, change nothing -> ok, as in gc/trim if it was there
--@include hot_share

local name, version = ARGV[1], ARGV[2]
local value = call('HGET', key('versions', name), version)
local share = value and hot_share(name, version, digest_of(value))
if ARGV[3] == '1' then return {'ok', share} end
call('HDEL', key('pending', name), version)
if not value then return {'ok'} end
drop_hot(name, version, digest_of(value))
forget_version(name, version, value)
local tags = call('HGETALL', key('tags', name))
for i = 1, #tags, 2 do
  if tags[i + 1] == version then
    call('HDEL', key('tags', name), tags[i])
    call('HDEL', key('tag-history', name), tags[i])
  end
end
local latest = 0
for _, other in ipairs(call('HKEYS', key('versions', name))) do latest = math.max(latest, number(other) or 0) end
if latest > 0 then
  call('HSET', key('name', name), 'latest', string.format('%d', latest))
else
  call('HDEL', key('name', name), 'latest')
  call('SREM', 'foundry:names', name)
end
return {'ok', share}
