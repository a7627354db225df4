-- Give staged bytes their digest, show the version, move `latest` forward, announce, trim.
-- name, run, attempt, step, digest, durable 0|1, version, manifest, keep_hot, events, token, meta of the
-- bytes, traceparent
-- -> ok | unreserved | incomplete | fenced, run or '', attempt or ''
--@include pointers

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
