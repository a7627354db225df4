-- worker, lease ms, events -> ok, id, attempt, spec, desired, tenant | none, ms until the next lease ends or -1
--@include claiming

while true do
  local now = now_ms()
  -- First what a dead worker left, so that work begun is not overtaken.
  local id = call('ZRANGEBYSCORE', 'foundry:runs:leases', '-inf', now, 'LIMIT', 0, 1)[1]
  if id then
    call('ZREM', 'foundry:runs:leases', id)
  else
    id = call('ZPOPMIN', 'foundry:runs:queue')[1]
  end
  if not id then
    local next = call('ZRANGE', 'foundry:runs:leases', 0, 0, 'WITHSCORES')[2]
    return {'none', next and ms(next - now) or '-1'}
  end
  local taken = take(id, ARGV[1], ARGV[2], ARGV[3])
  -- A damaged one must not keep others from those behind it.
  if taken and taken[1] == 'ok' then return taken end
end
