-- Which type each of our keys has.
--@include base

-- What each type answers to: it says WRONGTYPE of any other.
local string, hash, set, zset = {'STRLEN'}, {'HGET', ''}, {'SCARD'}, {'ZCARD'}
local list, stream = {'LTRIM', 0, -1}, {'XREVRANGE', '+', '-', 'COUNT', 1}
-- By what stands behind `foundry:`, whole or up to the next colon.
local types = {
  names = set, name = hash, versions = hash, durable = set, damaged = set, steps = hash, pending = hash, tags = hash,
  ['tag-history'] = hash, hot = zset, refs = set, leases = zset, bytes = string, staged = string, events = stream,
  reserving = set, condemned = string, runs = zset, ['tenant-runs'] = zset, ['open-runs'] = hash, ['runs:bell'] = list, run = hash,
  ['run-events'] = stream,
  epoch = string, limits = string,
}

-- Whether another stands there.
local function of_wrong_type(each)
  local rest = each:sub(9)
  local probe = types[rest] or types[rest:match('^[^:]*')]
  if not probe then return false end
  local answer = redis.pcall(probe[1], each, unpack(probe, 2))
  if type(answer) ~= 'table' or not answer.err then return false end
  if not answer.err:find('WRONGTYPE', 1, true) then error(answer.err) end
  return true
end

-- The next cursor, and some of our keys.
local function scan(cursor) return unpack(call('SCAN', cursor, 'MATCH', 'foundry:*', 'COUNT', 1000)) end
