-- Whoever comes while another restores joins in: all steps under one token bring Redis closer to the same.
-- new token -> ok, token of the rebuild | restored

if restored then return {'restored'} end
local token = type(epoch) == 'string' and string.match(epoch, '^' .. server_run .. ' (%x+)$')
if not token then
  token = ARGV[1]
  redis.call('SET', 'foundry:epoch', server_run .. ' ' .. token)
end
return {'ok', token}
