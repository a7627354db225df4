"""Lua scripts over the pointers of cartridges. Each is one atomic step; its reply starts with a status.

Keys, all starting with `foundry:` (`name:` is `name:<cartridge name>` and so on):

    names            set     cartridge names
    name:            hash    counter, limit, latest, owner_run, owner_attempt, released, held_until (ms; '' for ever)
    versions:        hash    version -> "<digest> <manifest JSON>"
    durable:         set     versions whose manifest is in object storage
    steps:           hash    "<run> <step>" -> "<version> <digest>"
    pending:         hash    reserved version -> "<run> <attempt> <step> <digest> <durable 0|1>"
    tags:            hash    tag -> version
    tag-history:     hash    tag -> "<when it was moved, ms> <versions that it meant before, newest first>"
    hot:             zset    versions whose bytes are in Redis
    refs:<digest>    set     "<name>@<version>" that keep the hot bytes
    leases:<digest>  zset    holder -> expiry in ms
    bytes:<digest>   string  JSON {header, chunks}; `bytes:<digest>:<i>` are the chunks (see bytes.py)
    staged:<token>:<i>       chunks of an upload that no commit has taken yet
    events           stream  published versions
    reserving        set     names that have reservations, or had
    condemned:<digest>  string  stands while the sweeper deletes that blob: no leases, no reservations
"""

# Versions that a tag meant before and can go back to.
MAX_TAG_HISTORY = 32

_LIBRARY = """
local call = redis.call
local function key(kind, id) return 'foundry:' .. kind .. ':' .. id end
local function now_ms() local t = call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end
local function digest_of(value) return string.sub(value, 1, 71) end

-- The answer to whoever may not write, or nil.
local function fence(name, run, attempt)
  local newest = call('HGET', key('run', run), 'attempt')
  if newest and tonumber(newest) > tonumber(attempt) then return {'fenced', run, newest} end
  local held = call('HMGET', key('name', name), 'owner_run', 'owner_attempt', 'released')
  if held[1] ~= run or held[2] ~= attempt or held[3] == '1' then
    return {'fenced', held[3] ~= '1' and held[1] or '', held[2] or ''}
  end
  return nil
end

-- Who holds the name now, or nil.
local function holder(name)
  local held = call('HMGET', key('name', name), 'owner_run', 'released', 'held_until')
  local ended = (held[3] or '') ~= '' and tonumber(held[3]) <= now_ms()
  return held[2] ~= '1' and not ended and held[1] or nil
end

local function leased(digest)
  local leases = key('leases', digest)
  call('ZREMRANGEBYSCORE', leases, '-inf', now_ms())
  return call('ZCARD', leases) > 0
end

-- No cjson: a script must not fail on a record that is corrupt.
local function count_chunks(meta) return tonumber(string.match(meta, '"chunks": (%d+)}$') or 0) end

local function keys_of_bytes(digest)
  local meta = call('GET', key('bytes', digest))
  if not meta then return {} end
  local keys = {key('bytes', digest)}
  for i = 0, count_chunks(meta) - 1 do table.insert(keys, key('bytes', digest) .. ':' .. i) end
  return keys
end

local function drop_bytes(digest)
  for _, chunk in ipairs(keys_of_bytes(digest)) do call('UNLINK', chunk) end
end

local function drop_hot(name, version, digest)
  call('ZREM', key('hot', name), version)
  local refs = key('refs', digest)
  call('SREM', refs, name .. '@' .. version)
  if call('SCARD', refs) > 0 then return end
  if leased(digest) then
    local last = call('ZRANGE', key('leases', digest), -1, -1, 'WITHSCORES')[2]
    for _, chunk in ipairs(keys_of_bytes(digest)) do call('PEXPIREAT', chunk, string.format('%d', last)) end
  else
    drop_bytes(digest)
  end
end

local function forget_version(name, version, value)
  call('HDEL', key('versions', name), version)
  call('SREM', key('durable', name), version)
  local manifest = cjson.decode(string.sub(value, 73))
  local step = manifest.run .. ' ' .. string.format('%d', manifest.step)
  local seen = call('HGET', key('steps', name), step)
  if seen and string.match(seen, '^%d+') == version then call('HDEL', key('steps', name), step) end
end

-- Versions beyond the newest `keep` whose bytes may leave Redis: {version, value}.
local function trimmable(name, keep)
  local spared, found = {[call('HGET', key('name', name), 'latest') or ''] = true}, {}
  for _, version in ipairs(call('HVALS', key('tags', name))) do spared[version] = true end
  for _, version in ipairs(call('ZREVRANGE', key('hot', name), keep, -1)) do
    local value = call('HGET', key('versions', name), version)
    if value and not spared[version] and not leased(digest_of(value)) then table.insert(found, {version, value}) end
  end
  return found
end

-- A tag that means the version, or nil.
local function tag_of(name, version)
  local tags = call('HGETALL', key('tags', name))
  for i = 1, #tags, 2 do
    if tags[i + 1] == version then return tags[i] end
  end
  return nil
end

-- Bytes leave Redis, and a version that was only there is forgotten.
local function drop_version(name, version, value)
  drop_hot(name, version, digest_of(value))
  if call('SISMEMBER', key('durable', name), version) == 0 then forget_version(name, version, value) end
end

local function trim(name, keep)
  local hot = key('hot', name)
  for _, version in ipairs(call('ZREVRANGE', hot, 0, -1)) do
    if call('HEXISTS', key('versions', name), version) == 0 then call('ZREM', hot, version) end
  end
  for _, each in ipairs(trimmable(name, keep)) do drop_version(name, each[1], each[2]) end
end
"""

LIBRARY = _LIBRARY

# name, run, attempt, ms to hold it or ''
# -> ok, pending durable versions of others | conflict, owner | fenced, run, attempt
ACQUIRE = (
    _LIBRARY
    + """
local name, run, attempt = ARGV[1], ARGV[2], ARGV[3]
local newest = call('HGET', key('run', run), 'attempt')
if newest and tonumber(newest) > tonumber(attempt) then return {'fenced', run, newest} end
local state = key('name', name)
local held = call('HMGET', state, 'owner_run', 'owner_attempt')
if held[1] == run and tonumber(attempt) < tonumber(held[2]) then return {'fenced', run, held[2]} end
local other = holder(name)
if other and other ~= run then return {'conflict', other} end
local held_until = ARGV[4] ~= '' and string.format('%d', now_ms() + ARGV[4]) or ''
call('HSET', state, 'owner_run', run, 'owner_attempt', attempt, 'released', '0', 'held_until', held_until)
local stale, pending = {}, call('HGETALL', key('pending', name))
for i = 1, #pending, 2 do
  local by, as, durable = string.match(pending[i + 1], '^(%S+) (%d+) .* (%d)$')
  if by ~= run or as ~= attempt then
    if durable == '1' then table.insert(stale, pending[i]) else call('HDEL', key('pending', name), pending[i]) end
  end
end
return {'ok', stale}
"""
)

# name, run, attempt -> ok | fenced
RELEASE = (
    _LIBRARY
    + """
local held = call('HMGET', key('name', ARGV[1]), 'owner_run', 'owner_attempt')
if held[1] ~= ARGV[2] or held[2] ~= ARGV[3] then return {'fenced', held[1] or '', held[2] or ''} end
call('HSET', key('name', ARGV[1]), 'released', '1')
return {'ok'}
"""
)

# name, run, attempt -> ok | fenced
CHECK_OWNER = _LIBRARY + "return fence(ARGV[1], ARGV[2], ARGV[3]) or {'ok'}\n"

# name, run, attempt, step, digest, durable
# -> ok, version | committed, version, value | limit, counter | condemned | fenced
RESERVE = (
    _LIBRARY
    + """
local name, run, attempt, step, digest, durable = unpack(ARGV)
local refused = fence(name, run, attempt)
if refused then return refused end
local seen = call('HGET', key('steps', name), run .. ' ' .. step)
if seen then
  local version, published = string.match(seen, '^(%d+) (.*)$')
  local value = call('HGET', key('versions', name), version)
  if published == digest and value then return {'committed', version, value} end
end
local pending = key('pending', name)
local mine = table.concat({run, attempt, step, digest}, ' ')
local reserved = call('HGETALL', pending)
for i = 1, #reserved, 2 do
  if string.sub(reserved[i + 1], 1, -3) == mine then
    if durable == '1' then call('HSET', pending, reserved[i], mine .. ' 1') end
    return {'ok', reserved[i]}
  end
end
-- The sweeper is deleting the blob. From the reservation on it refuses to.
if durable == '1' and call('EXISTS', key('condemned', digest)) == 1 then return {'condemned'} end
local state = key('name', name)
local counts = call('HMGET', state, 'counter', 'limit')
if tonumber(counts[1] or 0) >= tonumber(counts[2] or 0) then return {'limit', counts[1] or '0'} end
local version = string.format('%d', call('HINCRBY', state, 'counter', 1))
call('HSET', pending, version, mine .. ' ' .. durable)
call('SADD', 'foundry:reserving', name)
return {'ok', version}
"""
)

# name, limit -> ok
RAISE_LIMIT = (
    _LIBRARY
    + """
local state = key('name', ARGV[1])
if tonumber(call('HGET', state, 'limit') or 0) < tonumber(ARGV[2]) then call('HSET', state, 'limit', ARGV[2]) end
return {'ok'}
"""
)

# name, run, attempt, step, digest, durable, version, manifest, keep_hot, events, token, meta of the bytes, traceparent
# -> ok | unreserved | incomplete | fenced
COMMIT = (
    _LIBRARY
    + """
local name, run, attempt, step, digest, durable, version, manifest = unpack(ARGV)
local refused = fence(name, run, attempt)
if refused then return refused end
local value = call('HGET', key('versions', name), version)
if value and digest_of(value) == digest and not call('HGET', key('pending', name), version) then return {'ok'} end
local reserved = call('HGET', key('pending', name), version)
if not reserved or string.sub(reserved, 1, -3) ~= table.concat({run, attempt, step, digest}, ' ') then
  return {'unreserved'}
end
local staged, bytes, count = key('staged', ARGV[11]), key('bytes', digest), count_chunks(ARGV[12])
for i = 0, count - 1 do
  if call('EXISTS', staged .. ':' .. i) == 0 then return {'incomplete'} end
end
-- Also over bytes that are there: they are the same, unless damaged, and then this repairs them.
drop_bytes(digest)
for i = 0, count - 1 do
  call('RENAME', staged .. ':' .. i, bytes .. ':' .. i)
  call('PERSIST', bytes .. ':' .. i)
end
call('SET', bytes, ARGV[12])
call('SADD', key('refs', digest), name .. '@' .. version)
call('ZADD', key('hot', name), version, version)
call('HDEL', key('pending', name), version)
call('HSET', key('versions', name), version, digest .. ' ' .. manifest)
call('HSET', key('steps', name), run .. ' ' .. step, version .. ' ' .. digest)
if durable == '1' then call('SADD', key('durable', name), version) end
call('SADD', 'foundry:names', name)
local state = key('name', name)
if tonumber(call('HGET', state, 'latest') or 0) < tonumber(version) then call('HSET', state, 'latest', version) end
call('XADD', 'foundry:events', 'MAXLEN', '~', ARGV[10], '*',
     'name', name, 'version', version, 'digest', digest, 'run', run, 'step', step, 'traceparent', ARGV[13])
trim(name, tonumber(ARGV[9]))
return {'ok'}
"""
)

# name, kind (latest | tag | version | digest), value -> ok, version, digest | missing
LOOKUP = (
    _LIBRARY
    + """
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
"""
)

# name, version -> ok | missing
MARK_DURABLE = (
    _LIBRARY
    + """
if call('HEXISTS', key('versions', ARGV[1]), ARGV[2]) == 0 then return {'missing'} end
call('SADD', key('durable', ARGV[1]), ARGV[2])
return {'ok'}
"""
)

_TAGS = (
    _LIBRARY
    + """
local name, tag = ARGV[1], ARGV[2]
local meant = call('HGET', key('tags', name), tag)

-- The versions that the tag meant before, newest first.
local function history()
  local older = {}
  for word in string.gmatch(call('HGET', key('tag-history', name), tag) or '', '%d+') do table.insert(older, word) end
  table.remove(older, 1)
  return older
end

local function move(version, older)
  while #older > MAX_HISTORY do table.remove(older) end
  call('HSET', key('tags', name), tag, version)
  table.insert(older, 1, string.format('%d', now_ms()))
  call('HSET', key('tag-history', name), tag, table.concat(older, ' '))
end
""".replace("MAX_HISTORY", str(MAX_TAG_HISTORY))
)

# name, tag, version -> ok, version before or '' | missing. Only durable versions are tagged.
TAG = (
    _TAGS
    + """
if call('SISMEMBER', key('durable', name), ARGV[3]) == 0 then return {'missing'} end
if meant == ARGV[3] then return {'ok', meant} end
local older = history()
if meant then table.insert(older, 1, meant) end
move(ARGV[3], older)
return {'ok', meant or ''}
"""
)

# name, tag -> ok, version, version before | missing | first. Versions that were deleted since are passed over.
ROLLBACK_TAG = (
    _TAGS
    + """
if not meant then return {'missing'} end
local older = history()
while #older > 0 do
  local version = table.remove(older, 1)
  if version ~= meant and call('SISMEMBER', key('durable', name), version) == 1 then
    move(version, older)
    return {'ok', version, meant}
  end
end
return {'first', meant}
"""
)

# name, tag -> ok, version, history | missing
TAG_RECORD = (
    _TAGS
    + """
if not meant then return {'missing'} end
return {'ok', meant, call('HGET', key('tag-history', name), tag) or '0'}
"""
)

# name, tag -> ok | missing
UNTAG = (
    _LIBRARY
    + """
if call('HDEL', key('tags', ARGV[1]), ARGV[2]) == 0 then return {'missing'} end
call('HDEL', key('tag-history', ARGV[1]), ARGV[2])
return {'ok'}
"""
)

# name, version -> ok | missing | conflict, why
DELETE_VERSION = (
    _LIBRARY
    + """
local name, version = ARGV[1], ARGV[2]
local value = call('HGET', key('versions', name), version)
if not value then return {'missing'} end
if call('HGET', key('name', name), 'latest') == version then return {'conflict', 'latest'} end
local tag = tag_of(name, version)
if tag then return {'conflict', tag} end
drop_hot(name, version, digest_of(value))
forget_version(name, version, value)
return {'ok'}
"""
)

# name -> ok | missing | conflict, owner. Counter and limit stay: numbers are never used twice.
DELETE_NAME = (
    _LIBRARY
    + """
local name = ARGV[1]
if call('SISMEMBER', 'foundry:names', name) == 0 then return {'missing'} end
local other = holder(name)
if other then return {'conflict', other} end
local all = call('HGETALL', key('versions', name))
for i = 1, #all, 2 do drop_hot(name, all[i], digest_of(all[i + 1])) end
for _, kind in ipairs({'versions', 'durable', 'steps', 'pending', 'tags', 'tag-history', 'hot'}) do
  call('DEL', key(kind, name))
end
call('HDEL', key('name', name), 'latest')
call('SREM', 'foundry:names', name)
return {'ok'}
"""
)

# digest, holder, milliseconds -> ok | condemned
LEASE = (
    _LIBRARY
    + """
if call('EXISTS', key('condemned', ARGV[1])) == 1 then return {'condemned'} end
local leases = key('leases', ARGV[1])
leased(ARGV[1])
call('ZADD', leases, 'GT', now_ms() + tonumber(ARGV[3]), ARGV[2])
call('PEXPIREAT', leases, string.format('%d', call('ZRANGE', leases, -1, -1, 'WITHSCORES')[2]))
return {'ok'}
"""
)

# digest, holder -> ok
UNLEASE = _LIBRARY + "call('ZREM', key('leases', ARGV[1]), ARGV[2]) return {'ok'}\n"

# digest -> ok, holders
LEASES = _LIBRARY + "leased(ARGV[1]) return {'ok', call('ZRANGE', key('leases', ARGV[1]), 0, -1)}\n"

# digest -> ok. For bytes found to be corrupt.
DROP_BYTES = _LIBRARY + "drop_bytes(ARGV[1]) return {'ok'}\n"

# token, number of chunks -> ok
DROP_STAGED = (
    _LIBRARY
    + """
for i = 0, tonumber(ARGV[2]) - 1 do call('UNLINK', key('staged', ARGV[1]) .. ':' .. i) end
return {'ok'}
"""
)
