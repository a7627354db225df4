-- What scripts over the versions of a name share. `value` is what the hash versions:<name> holds of a version:
-- "<digest> <manifest JSON>", the digest of 71 characters.
--@include base

local function digest_of(value) return string.sub(value, 1, 71) end

-- The run and step of its manifest; nil if it is damaged.
local function origin_of(value)
  local whole, manifest = pcall(cjson.decode, string.sub(value, 73))
  if not whole or type(manifest) ~= 'table' then return nil end
  if type(manifest.run) ~= 'string' or type(manifest.step) ~= 'number' then return nil end
  return manifest.run, manifest.step
end

-- The answer to whoever may not write, or nil.
local function fence(name, run, attempt)
  local newest = call('HGET', key('run', run), 'attempt')
  if (number(newest) or 0) > tonumber(attempt) then return {'fenced', run, newest} end
  local held = call('HMGET', key('name', name), 'owner_run', 'owner_attempt', 'released')
  if held[1] ~= run or held[2] ~= attempt or held[3] == '1' then
    return {'fenced', held[3] ~= '1' and held[1] or '', held[2] or ''}
  end
  return nil
end

-- Who holds the name now, or nil.
local function holder(name)
  local held = call('HMGET', key('name', name), 'owner_run', 'released', 'held_until')
  local ended = (held[3] or '') ~= '' and (number(held[3]) or 0) <= now_ms()
  return held[2] ~= '1' and not ended and held[1] or nil
end

local function leased(digest)
  local leases = key('leases', digest)
  call('ZREMRANGEBYSCORE', leases, '-inf', now_ms())
  return call('ZCARD', leases) > 0
end

-- No cjson: a script must not fail on a record that is corrupt, nor count for hours.
local function count_chunks(meta)
  local count = string.match(meta, '"chunks": (%d+)}$')
  return count and #count <= 6 and tonumber(count) or 0
end

local function keys_of_bytes(digest)
  local meta = redis.pcall('GET', key('bytes', digest))
  if not meta then return {} end
  local keys = {key('bytes', digest)}
  -- Of another type: nothing says what chunks there are.
  if type(meta) == 'table' then return keys end
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
  local run, number_of_step = origin_of(value)
  if not run then return end
  local step = run .. ' ' .. string.format('%d', number_of_step)
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

-- The newest version is `latest`; a name without any is listed as long as a damaged one waits for a decision.
local function settle(name)
  local latest = 0
  for _, version in ipairs(call('HKEYS', key('versions', name))) do latest = math.max(latest, number(version) or 0) end
  if latest > 0 then
    call('HSET', key('name', name), 'latest', string.format('%d', latest))
  else
    call('HDEL', key('name', name), 'latest')
  end
  local listed = latest > 0 or call('SCARD', key('damaged', name)) > 0
  call(listed and 'SADD' or 'SREM', 'foundry:names', name)
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
