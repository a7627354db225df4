-- After a manifest was deleted or withdrawn: a rebuild meanwhile may have brought the version back.
-- name, version, dry 0|1: say what it would do, change nothing -> ok, as in gc/trim if it was there
--@include hot_share

local name, version = ARGV[1], ARGV[2]
local value = call('HGET', key('versions', name), version)
local share = value and hot_share(name, version, digest_of(value))
if ARGV[3] == '1' then return {'ok', share} end
call('HDEL', key('pending', name), version)
if not value then
  if call('SREM', key('damaged', name), version) == 1 then settle(name) end
  return {'ok'}
end
drop_hot(name, version, digest_of(value))
forget_version(name, version, value)
local tags = call('HGETALL', key('tags', name))
for i = 1, #tags, 2 do
  if tags[i + 1] == version then
    call('HDEL', key('tags', name), tags[i])
    call('HDEL', key('tag-history', name), tags[i])
  end
end
settle(name)
return {'ok', share}
