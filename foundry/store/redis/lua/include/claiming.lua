-- What scripts that hand a run to a worker share.
--@include runs

-- The reply to the worker that holds the run from now on; nil if it is to pause, which it then does, `damaged` if
-- nobody can work on it.
local function take(id, worker, lease_ms, length)
  local known = redis.pcall('HMGET', run_key(id), 'attempt', 'spec', 'desired', 'tenant')
  if known.err or not number(known[1]) or not known[2] then return {'damaged'} end
  local now, desired = now_ms(), known[3]
  if desired == 'pause' then
    pause(id, length)
    return nil
  end
  local attempt = ms(call('HINCRBY', run_key(id), 'attempt', 1))
  call('HSET', run_key(id), 'state', 'running', 'worker', worker, 'waiting_for', '')
  call('HSETNX', run_key(id), 'started', ms(now))
  call('ZADD', 'foundry:runs:leases', ms(now + tonumber(lease_ms)), id)
  tell_state(id, 'running', length)
  return {'ok', id, attempt, call('HGET', run_key(id), 'spec'), desired or '', known[4] or ''}
end
