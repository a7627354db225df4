-- token, name, limit,
-- JSON {versions: {version: value}, steps: {"run step": "version digest"}, tags: {tag: version},
-- damaged: [version]}
-- -> ok | over
--@include pointers
--@include restoring

local name, truth = ARGV[2], cjson.decode(ARGV[4])
local state, versions, durable, tags = key('name', name), key('versions', name), key('durable', name), key('tags', name)
for _, field in ipairs({'counter', 'limit'}) do
  local known = number(call('HGET', state, field))
  if not known or known < tonumber(ARGV[3]) then call('HSET', state, field, ARGV[3]) end
end
-- Whoever reserved before has to reserve again.
call('DEL', key('pending', name), tags)
for _, version in ipairs(call('SMEMBERS', durable)) do
  local value = call('HGET', versions, version)
  if value and not truth.versions[version] then
    drop_hot(name, version, digest_of(value))
    call('HDEL', versions, version)
  end
end
call('DEL', durable)
-- What no publisher wrote would be met by every script that comes by.
local all = call('HGETALL', versions)
for i = 1, #all, 2 do
  if not (number(all[i]) and origin_of(all[i + 1])) then call('HDEL', versions, all[i]) end
end
for version, value in pairs(truth.versions) do
  call('HSET', versions, version, value)
  call('SADD', durable, version)
end
local damaged = key('damaged', name)
call('DEL', damaged)
for _, version in ipairs(truth.damaged) do call('SADD', damaged, version) end
for step, seen in pairs(truth.steps) do call('HSET', key('steps', name), step, seen) end
for tag, version in pairs(truth.tags) do
  if truth.versions[version] or call('SISMEMBER', damaged, version) == 1 then call('HSET', tags, tag, version) end
end
settle(name)
return {'ok'}
