"""Lua scripts of the sweeper, over the keys that scripts.py lists. Each is one atomic step.

With `dry` = 1 a script says what it would do and changes nothing.
"""

from foundry.store.redis.scripts import LIBRARY

_HOT_SHARE = """
-- What a version has in Redis: digest, bytes, versions that share them; no bytes if none are kept for it.
local function hot_share(name, version, digest)
  local num_bytes, refs = 0, key('refs', digest)
  if call('SISMEMBER', refs, name .. '@' .. version) == 1 then
    for _, chunk in ipairs(keys_of_bytes(digest)) do num_bytes = num_bytes + call('STRLEN', chunk) end
  end
  return {version, digest, string.format('%d', num_bytes), call('SCARD', refs)}
end
"""

# name, keep_hot, dry -> ok, [version, digest, bytes in Redis, versions that share them] ...
TRIM = (
    LIBRARY
    + _HOT_SHARE
    + """
local name, gone = ARGV[1], {}
for _, each in ipairs(trimmable(name, tonumber(ARGV[2]))) do
  local version, value = each[1], each[2]
  table.insert(gone, hot_share(name, version, digest_of(value)))
  if ARGV[3] ~= '1' then drop_version(name, version, value) end
end
return {'ok', gone}
"""
)

# name, version, dry -> ok, as in TRIM | unknown | kept, why. Forgets a durable version unless something needs it.
RETIRE = (
    LIBRARY
    + _HOT_SHARE
    + """
local name, version = ARGV[1], ARGV[2]
if call('HGET', key('pending', name), version) then return {'kept', 'being published'} end
local value = call('HGET', key('versions', name), version)
if not value then return {'unknown'} end
if call('HGET', key('name', name), 'latest') == version then return {'kept', 'latest'} end
local tag = tag_of(name, version)
if tag then return {'kept', 'tag ' .. tag} end
if leased(digest_of(value)) then return {'kept', 'leased'} end
local owner = holder(name)
if owner and cjson.decode(string.sub(value, 73)).run == owner then
  return {'kept', 'run ' .. owner .. ' holds the name'}
end
local share = hot_share(name, version, digest_of(value))
if ARGV[3] ~= '1' then
  drop_hot(name, version, digest_of(value))
  forget_version(name, version, value)
end
return {'ok', share}
"""
)

# name, version, dry -> ok, as in TRIM if it was there.
# After its manifest was deleted or withdrawn: a rebuild meanwhile may have brought it back.
FORGET = (
    LIBRARY
    + _HOT_SHARE
    + """
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
for _, other in ipairs(call('HKEYS', key('versions', name))) do latest = math.max(latest, tonumber(other)) end
if latest > 0 then
  call('HSET', key('name', name), 'latest', string.format('%d', latest))
else
  call('HDEL', key('name', name), 'latest')
  call('SREM', 'foundry:names', name)
end
return {'ok', share}
"""
)

# mark's ms (0: dry), digest... -> ok, for each: '' (condemned) | leased | reserved | versions that have it in Redis
CONDEMN = (
    LIBRARY
    + """
local reserved, answers = {}, {}
for _, name in ipairs(call('SMEMBERS', 'foundry:reserving')) do
  local pending = call('HVALS', key('pending', name))
  for _, each in ipairs(pending) do reserved[string.match(each, '(%S+) %d$')] = true end
  if #pending == 0 and ARGV[1] ~= '0' then call('SREM', 'foundry:reserving', name) end
end
for i = 2, #ARGV do
  local digest, answer = ARGV[i], ''
  if leased(digest) then
    answer = 'leased'
  elseif reserved[digest] then
    answer = 'reserved'
  else
    answer = table.concat(call('SMEMBERS', key('refs', digest)), ' ')
  end
  if answer == '' and ARGV[1] ~= '0' then call('SET', key('condemned', digest), '1', 'PX', ARGV[1]) end
  table.insert(answers, answer)
end
return {'ok', answers}
"""
)

# digest... -> ok
ABSOLVE = LIBRARY + "for i = 1, #ARGV do call('DEL', key('condemned', ARGV[i])) end return {'ok'}\n"
