-- name, kind (latest | tag | version | digest), value -> ok, version, digest | missing
-- | dangling, version | damaged, version: what it means, or may mean, can't be read
--@include pointers

local name, kind, version = ARGV[1], ARGV[2], ARGV[3]
local versions = key('versions', name)
if kind == 'latest' then version = call('HGET', key('name', name), 'latest')
elseif kind == 'tag' then version = call('HGET', key('tags', name), version)
elseif kind == 'digest' then
  local wanted, best = version, nil
  local all = call('HGETALL', versions)
  for i = 1, #all, 2 do
    local version = number(all[i])
    if version and digest_of(all[i + 1]) == wanted and (not best or version < number(best)) then best = all[i] end
  end
  version = best
end
if kind == 'latest' then
  local newest = 0
  for _, each in ipairs(call('SMEMBERS', key('damaged', name))) do newest = math.max(newest, number(each) or 0) end
  if newest > (number(version) or 0) then return {'damaged', string.format('%d', newest)} end
end
if not version then return {'missing'} end
local value = call('HGET', versions, version)
if not value then
  if call('SISMEMBER', key('damaged', name), version) == 1 then return {'damaged', version} end
  if kind == 'latest' or kind == 'tag' then return {'dangling', version} end
  return {'missing'}
end
return {'ok', version, digest_of(value)}
