-- name, kind (latest | tag | version | digest), value -> ok, version, digest | missing
--@include pointers

local name, kind, version = ARGV[1], ARGV[2], ARGV[3]
local versions = key('versions', name)
if kind == 'latest' then version = call('HGET', key('name', name), 'latest')
elseif kind == 'tag' then version = call('HGET', key('tags', name), version)
elseif kind == 'digest' then
  local wanted, best = version, nil
  local all = call('HGETALL', versions)
  for i = 1, #all, 2 do
    if digest_of(all[i + 1]) == wanted and (not best or tonumber(all[i]) < tonumber(best)) then best = all[i] end
  end
  version = best
end
local value = version and call('HGET', versions, version)
if not value then return {'missing'} end
return {'ok', version, digest_of(value)}
