-- Forget a durable version unless something needs it.
-- name, version, dry 0|1: say what it would do, change nothing -> ok, as in gc/trim | unknown | kept, why
--@include hot_share

local name, version = ARGV[1], ARGV[2]
if call('HGET', key('pending', name), version) then return {'kept', 'being published'} end
local value = call('HGET', key('versions', name), version)
-- Somebody is to decide about it.
if call('SISMEMBER', key('damaged', name), version) == 1 then return {'kept', 'damaged'} end
if not value then return {'unknown'} end
if call('HGET', key('name', name), 'latest') == version then return {'kept', 'latest'} end
local tag = tag_of(name, version)
if tag then return {'kept', 'tag ' .. tag} end
if leased(digest_of(value)) then return {'kept', 'leased'} end
local owner = holder(name)
if owner and (origin_of(value) or owner) == owner then
  return {'kept', 'run ' .. owner .. ' holds the name'}
end
local share = hot_share(name, version, digest_of(value))
if ARGV[3] ~= '1' then
  drop_hot(name, version, digest_of(value))
  forget_version(name, version, value)
end
return {'ok', share}
